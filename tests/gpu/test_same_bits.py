"""The same bits again: of a fit that is repeated, and of one that is interrupted and resumed."""

import pytest
import torch

from tests.gpu.cases import HOPPER, TRANSPORTS, GpuJob, fit
from tests.jobs import SaveAt, adamw

pytestmark = pytest.mark.gpu


def make(precision, transport, **kwargs):
    return GpuJob(width=64, moe=HOPPER, precision=precision, transport=transport, optimizer=adamw, steps=6, **kwargs)


def fit_and_save(job, path):
    return fit(job, callbacks=[SaveAt(path, 3)])


def resume(job, path):
    return fit(job, ckpt_path=path)


def assert_same_bits(first, again):
    for one, other in zip(first, again, strict=True):
        different = [key for key in one.weights if not torch.equal(one.weights[key], other.weights[key])]
        assert not different


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_repeated_fit(several, precision, transport):
    first, again = (several.run(fit, make(precision, transport)) for _ in range(2))
    assert_same_bits(first, again)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_resumed_fit(several, tmp_path, precision, transport):
    path = str(tmp_path / "half.ckpt")
    whole = several.run(fit, make(precision, transport, policy="proportional"))
    several.run(fit_and_save, make(precision, transport, policy="proportional", trainer={"max_steps": 3}), path)
    resumed = several.run(resume, make(precision, transport, policy="proportional"), path)
    assert_same_bits(whole, resumed)
