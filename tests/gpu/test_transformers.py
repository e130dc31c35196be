"""Models of transformers on GPUs: ranks learn what one process learns with the model's own experts."""

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist

from tests.gpu.cases import TRANSPORTS, GpuJob, on_gpus, placed, strategy_options
from tests.gpu.rank_pool import NUM_RANKS
from tests.jobs import largest_error, make_trainer, our_trainer

pytest.importorskip("transformers")

from torch.nn import functional as F

from lightning_swiftmoe.hf import NAME
from tests.hf.families import config_of, model_of

pytestmark = pytest.mark.gpu

SEQUENCES = 2 * NUM_RANKS
FP32_BOUND = 2e-4


class Causal(pl.LightningModule):
    """Next-token training."""

    def __init__(self, job, family, implementation):
        super().__init__()
        self.job = job
        # With sizes that the kernels for GPUs take: others read the bounds of experts on the host.
        self.model = model_of(family, implementation, torch.float32, config=config_of(family, wide=True))

    def training_step(self, batch, batch_idx):
        logits = self.model(input_ids=batch, use_cache=False).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())

    def configure_optimizers(self):
        return self.job.optimizer(self)


class ErrorsOnWaits(Causal):
    """Torch raises where the host waits for the device in a layer of the model or in the backward."""

    def __init__(self, job, family, implementation):
        super().__init__(job, family, implementation)
        for layer in self.model.model.layers:
            layer.register_forward_pre_hook(lambda *_: self._debug("error"))
            layer.register_forward_hook(lambda *_: self._debug("default"))

    def on_before_backward(self, loss):
        self._debug("error")

    def on_after_backward(self):
        self._debug("default")

    def _debug(self, mode):
        if on_gpus() and self.trainer.global_step >= 3:
            torch.cuda.set_sync_debug_mode(mode)


def train(job, family, alone=False, causal=Causal):
    """The weights afterwards."""
    rank, num_ranks = (0, 1) if alone else (dist.get_rank(), dist.get_world_size())
    ids = torch.randint(3, 40, (job.steps, SEQUENCES, 9), generator=torch.Generator().manual_seed(11))
    batches = ids[:, rank * SEQUENCES // num_ranks : (rank + 1) * SEQUENCES // num_ranks]
    job.strategy = strategy_options(job)
    trainer = make_trainer(job, **placed()) if alone else our_trainer(job, **placed())
    module = causal(job, family, "eager" if alone else NAME)
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    return {name: value.cpu() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(
    ("family", "precision", "strategy"),
    [
        ("qwen3_moe", "32-true", {}),
        ("qwen3_moe", "bf16-mixed", {}),
        ("qwen3_moe", "32-true", {"dense": "fsdp2"}),
        ("mixtral", "32-true", {}),
        ("deepseek_v3", "32-true", {}),
        ("gpt_oss", "32-true", {}),
        ("gpt_oss", "bf16-mixed", {}),
    ],
)
def test_ranks_equal_one_process(one, several, transport, family, precision, strategy):
    """In mixed precision they are as far from fp32 as the model's own experts are, and at most half as far again."""
    options = {"optimizer": sgd_of, "steps": 6, "slots": "auto", "transport": transport}
    (want,) = one.run(train, GpuJob(**options, precision="32-true"), family, True)
    bound = FP32_BOUND
    if precision != "32-true":
        (eager,) = one.run(train, GpuJob(**options, precision=precision), family, True)
        bound = 1.5 * largest_error(eager, want)
    first, *others = several.run(train, GpuJob(**options, precision=precision, strategy=strategy), family)
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)
    assert largest_error(first, want) < bound


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "mixtral", "deepseek_v3"])
def test_the_host_waits_for_no_layer(several, transport, family):
    """Masks may: transformers asks once a forward whether sequences are packed."""
    options = {"optimizer": sgd_of, "precision": "bf16-mixed", "steps": 6, "slots": "auto", "transport": transport}
    several.run(train, GpuJob(**options), family, False, ErrorsOnWaits)


def sgd_of(module):
    """Adam turns a rounding of a tiny gradient into a full step; SGD keeps roundings their size."""
    return torch.optim.SGD(module.parameters(), lr=0.05)
