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
BOUND = {"32-true": 2e-4, "bf16-mixed": 3e-2}


class Causal(pl.LightningModule):
    """Next-token training."""

    def __init__(self, job, family, implementation, wide):
        super().__init__()
        self.job = job
        self.model = model_of(family, implementation, torch.float32, config=config_of(family, wide))

    def training_step(self, batch, batch_idx):
        logits = self.model(input_ids=batch, use_cache=False).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())

    def configure_optimizers(self):
        return self.job.optimizer(self)


class ErrorsOnWaits(Causal):
    """Torch raises where the host waits for the device in a layer of the model or in the backward."""

    def __init__(self, job, family, implementation, wide):
        super().__init__(job, family, implementation, wide)
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


def train(job, family, alone=False, causal=Causal, wide=False):
    """The weights afterwards.

    Wide models have sizes that our kernels take; of others torch multiplies, and the host reads where experts begin.
    """
    rank, num_ranks = (0, 1) if alone else (dist.get_rank(), dist.get_world_size())
    ids = torch.randint(3, 40, (job.steps, SEQUENCES, 9), generator=torch.Generator().manual_seed(11))
    batches = ids[:, rank * SEQUENCES // num_ranks : (rank + 1) * SEQUENCES // num_ranks]
    job.strategy = strategy_options(job)
    trainer = make_trainer(job, **placed()) if alone else our_trainer(job, **placed())
    module = causal(job, family, "eager" if alone else NAME, wide)
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    return {name: value.cpu() for name, value in module.state_dict().items()}


CASES = [
    ("qwen3_moe", "32-true", {}),
    ("qwen3_moe", "bf16-mixed", {}),
    ("qwen3_moe", "32-true", {"dense": "fsdp2"}),
    ("mixtral", "32-true", {}),
    ("deepseek_v3", "32-true", {}),
    ("gpt_oss", "32-true", {}),
    ("gpt_oss", "bf16-mixed", {}),
]


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(("family", "precision", "strategy"), CASES)
def test_ranks_equal_one_process(one, several, transport, family, precision, strategy):
    options = {"optimizer": sgd_of, "precision": precision, "steps": 6, "slots": "auto", "transport": transport}
    (want,) = one.run(train, GpuJob(**options), family, True)
    assert largest_error(alike_on_all(several, options, family, strategy), want) < BOUND[precision]


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(("family", "precision", "strategy"), CASES)
def test_sizes_of_our_kernels(one, several, transport, family, precision, strategy):
    """In bf16 ranks are as far from fp32 as the model's own experts are, and at most half as far again.

    More rounds there, and clamped gates more often to another side, than in the small models.
    """
    options = {"optimizer": sgd_of, "steps": 6, "slots": "auto", "transport": transport}
    (want,) = one.run(train, GpuJob(**options, precision="32-true"), family, True, Causal, True)
    bound = BOUND["32-true"]
    if precision != "32-true":
        (eager,) = one.run(train, GpuJob(**options, precision=precision), family, True, Causal, True)
        bound = 1.5 * largest_error(eager, want)
    found = alike_on_all(several, options | {"precision": precision}, family, strategy, wide=True)
    assert largest_error(found, want) < bound


def alike_on_all(several, options, family, strategy, wide=False):
    """The weights that ranks learned, all the same."""
    first, *others = several.run(train, GpuJob(**options, strategy=strategy), family, False, Causal, wide)
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)
    return first


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "mixtral", "deepseek_v3"])
def test_the_host_waits_for_no_layer(several, transport, family):
    """Masks may: transformers asks once a forward whether sequences are packed."""
    options = {"optimizer": sgd_of, "precision": "bf16-mixed", "steps": 6, "slots": "auto", "transport": transport}
    several.run(train, GpuJob(**options), family, False, ErrorsOnWaits, True)


def sgd_of(module):
    """Adam turns a rounding of a tiny gradient into a full step; SGD keeps roundings their size."""
    return torch.optim.SGD(module.parameters(), lr=0.05)
