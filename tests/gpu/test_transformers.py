"""Models of transformers on GPUs: ranks learn what one process learns with the model's own experts."""

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist

from tests.gpu.cases import TRANSPORTS, GpuJob, placed, strategy_options
from tests.gpu.rank_pool import NUM_RANKS
from tests.jobs import largest_error, make_trainer, our_trainer

pytest.importorskip("transformers")

from torch.nn import functional as F

from lightning_swiftmoe.hf import NAME
from tests.hf.families import model_of

pytestmark = pytest.mark.gpu

SEQUENCES = 2 * NUM_RANKS
BOUND = {"32-true": 2e-4, "bf16-mixed": 3e-2}


class Causal(pl.LightningModule):
    """Next-token training."""

    def __init__(self, job, family, implementation):
        super().__init__()
        self.job = job
        self.model = model_of(family, implementation, torch.float32)

    def training_step(self, batch, batch_idx):
        logits = self.model(input_ids=batch, use_cache=False).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())

    def configure_optimizers(self):
        return self.job.optimizer(self)


def train(job, family, alone=False):
    """The weights afterwards."""
    rank, num_ranks = (0, 1) if alone else (dist.get_rank(), dist.get_world_size())
    ids = torch.randint(3, 40, (job.steps, SEQUENCES, 9), generator=torch.Generator().manual_seed(11))
    batches = ids[:, rank * SEQUENCES // num_ranks : (rank + 1) * SEQUENCES // num_ranks]
    job.strategy = strategy_options(job)
    trainer = make_trainer(job, **placed()) if alone else our_trainer(job, **placed())
    module = Causal(job, family, "eager" if alone else NAME)
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
    options = {"optimizer": sgd_of, "precision": precision, "steps": 6, "slots": "auto", "transport": transport}
    (want,) = one.run(train, GpuJob(**options), family, True)
    first, *others = several.run(train, GpuJob(**options, strategy=strategy), family)
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)
    assert largest_error(first, want) < BOUND[precision]


def sgd_of(module):
    """Adam turns a rounding of a tiny gradient into a full step; SGD keeps roundings their size."""
    return torch.optim.SGD(module.parameters(), lr=0.05)
