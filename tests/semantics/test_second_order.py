"""Gradients of gradients: a MoE layer has none, and says so, on several ranks as in one process."""

import pytest
import torch

from tests.jobs import Job, Net
from tests.semantics.systems import GROUPS, OURS, check, on

pytestmark = pytest.mark.distributed


class Penalty(Net):
    """The gradient by the inputs should be small."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        x = batch[0].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(self(x).sum(), x, create_graph=True)
        self.seen.append(gradient.norm() > 0)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            self.manual_backward(gradient.square().sum())
        self.optimizers().step()  # or the fit would go on


@on([*OURS, *GROUPS])
@pytest.mark.parametrize("copies", [0, 1])
def test_a_gradient_penalty_is_refused(system, copies):
    # Otherwise weights in front of the experts would get a part of their gradients, and experts none.
    check(system, Job(steps=1, module=Penalty, strategy={"transient_copies": copies}))
