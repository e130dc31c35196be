"""What users of Lightning do around ``fit``: validate, test, predict, optimize by hand, save, other launchers."""

import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_swiftmoe import ExpertRebalancer
from lightning_swiftmoe.strategy import SwiftMoEStrategy
from lightning_swiftmoe.trace_file import read_trace
from tests.jobs import (
    InEvalMode,
    Job,
    Net,
    adamw,
    data,
    largest_error,
    make_trainer,
    our_trainer,
    sgd,
    train,
    train_alone,
)
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

JOB = Job(slots=3, steps=4)


def fit_and_evaluate():
    trainer, module = our_trainer(JOB, val_check_interval=2, check_val_every_n_epoch=None), Net(JOB)
    batches = data(JOB, dist.get_rank(), dist.get_world_size())
    two = list(data(dataclasses.replace(JOB, steps=2), dist.get_rank(), dist.get_world_size()))
    held_out = DataLoader(two, batch_size=None)
    trainer.fit(module, batches, held_out)
    during = trainer.callback_metrics["val"].item()
    after = trainer.validate(module, held_out, verbose=False)[0]["val"]
    tested = trainer.test(module, held_out, verbose=False)[0]["val"]
    predicted = torch.cat(trainer.predict(module, held_out))
    return module.state_dict(), during, after, tested, predicted


def test_validate_test_and_predict():
    weights, during, after, tested, _ = run_ranks(2, fit_and_evaluate)[0]
    parts = [predicted for *_, predicted in run_ranks(2, fit_and_evaluate)]
    module = Net(JOB).double()
    module.load_state_dict(weights)
    module.eval()
    batches = list(data(dataclasses.replace(JOB, steps=2)))
    expected = np.mean([module.loss(batch).item() for batch in batches])
    assert during == pytest.approx(expected, rel=1e-6)  # Lightning logs in fp32
    assert after == pytest.approx(expected, rel=1e-6)
    assert tested == pytest.approx(expected, rel=1e-6)
    halves = [torch.cat([part.chunk(2)[i] for part in parts]) for i in range(2)]
    for half, (x, _) in zip(halves, batches, strict=True):
        torch.testing.assert_close(half, module(x), rtol=1e-12, atol=1e-12)


class Manual(Net):
    """Two backwards a step, clipped by hand before the optimizer sees them."""

    def __init__(self, job):
        super().__init__(job)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        for _ in range(2):
            self.manual_backward(self.loss(batch))
        self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="norm")
        optimizer.step()


def fit_manually():
    module = Manual(JOB)
    our_trainer(JOB).fit(module, data(JOB, dist.get_rank(), dist.get_world_size()))
    return module.state_dict()


class Adapted(InEvalMode):
    """Experts and routers are frozen; what is in front of them learns."""

    def __init__(self, job):
        super().__init__(job)
        self.moes.requires_grad_(False)


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("module", [InEvalMode, Adapted])
@pytest.mark.parametrize("extra", [{}, {"accumulate_grad_batches": 2}])
def test_training_in_eval_mode(module, num_ranks, extra):
    moe = {"aux_loss_coef": 0.1, "bias_update_rate": 0.5, "score": "sigmoid"}
    job = Job(steps=4, slots=6, module=module, moe=moe, trainer=extra)
    alone = train_alone(job)
    for result in run_ranks(num_ranks, train, job):
        assert largest_error(result, alone) < 1e-13


def fit_traced(module, path):
    options = {"policy": "balanced", "rebalancer": {"trace": str(path)}}
    train(Job(steps=4, slots=6, module=module, moe={"aux_loss_coef": 0.0}, **options))


def test_loads_in_eval_mode_are_followed(tmp_path):
    traces = []
    for module in (Net, InEvalMode):
        run_ranks(2, fit_traced, module, tmp_path / f"{module.__name__}.npy.gz")
        traces.append(read_trace(tmp_path / f"{module.__name__}.npy.gz"))
    wanted, got = traces
    assert wanted["counts"].any()
    for key in ("counts", "replicas", "rank_load"):
        np.testing.assert_array_equal(got[key], wanted[key])


def checkpointed_in_eval_mode():
    class Checkpointed(InEvalMode):
        def forward(self, x):
            x = self.inp(x)
            for moe in self.moes:
                x = x + checkpoint(moe, torch.tanh(x), use_reentrant=True)
            return self.out(x)

    with pytest.raises(RuntimeError, match=r"did not count as training: in eval mode .* Put the model in train mode"):
        our_trainer(JOB).fit(Checkpointed(JOB), data(JOB, dist.get_rank(), dist.get_world_size()))


def test_forwards_that_nobody_can_count_are_refused():
    run_ranks(2, checkpointed_in_eval_mode)


class LooksAfterTheStep(Net):
    """The new weights run before anybody knows that the step is over."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()
        with torch.no_grad():
            self.seen.append(self.loss(batch).item())


class Looks(pl.Callback):
    """In front of the rebalancer, whose hook ends the step."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        module.eval()
        with torch.no_grad():
            module.loss(batch)
        module.train()


@pytest.mark.parametrize("options", [{"module": LooksAfterTheStep}, {"callbacks": lambda: [Looks()]}])
def test_a_forward_between_a_step_and_its_end(options):
    """It needs the new weights where experts are; the next forward needs them where they will be then."""
    job = Job(steps=4, slots=3, **options)
    alone = train_alone(job)
    for result in run_ranks(2, train, job):
        assert largest_error(result, alone) < 1e-9


def test_manual_optimization():
    alone = Manual(JOB).double()
    make_trainer(JOB).fit(alone, data(JOB))
    for result in run_ranks(2, fit_manually):
        assert largest_error(result, alone.state_dict()) < 1e-9


def fit_twice_and_save(path):
    module = Net(JOB)
    for _ in range(2):
        trainer = our_trainer(JOB)
        trainer.fit(module, data(JOB, dist.get_rank(), dist.get_world_size()))
    trainer.save_checkpoint(path)
    return module.state_dict()


def test_fit_again_then_save(tmp_path):
    path = tmp_path / "after.ckpt"
    alone = Net(JOB).double()
    for _ in range(2):
        make_trainer(JOB).fit(alone, data(JOB))
    result = run_ranks(2, fit_twice_and_save, str(path))[0]
    assert largest_error(result, alone.state_dict()) < 1e-9
    saved = torch.load(path, weights_only=True)
    assert largest_error(saved["state_dict"], result) == 0
    moment = saved["optimizer_states"][0]["state"][4]["exp_avg"]
    assert moment.shape == result["moes.0.experts.up_proj"].shape


def fit_every_other_step():
    job = dataclasses.replace(JOB, steps=6)
    seen = []

    def policy(loads, cluster, previous):
        seen.append(int(loads.sum()))
        return previous

    strategy = SwiftMoEStrategy(slots_per_rank=3, timeout=30)
    from tests.ranks import Ranks

    trainer = make_trainer(
        job, strategy, num_nodes=2, plugins=[Ranks()], callbacks=[ExpertRebalancer(policy, every_n_steps=3)]
    )
    trainer.fit(Net(job), data(job, dist.get_rank(), 2))
    return seen


def test_cadence_adds_loads_up():
    # Two layers decide on steps 3 and 6, each from three steps of 24 tokens to 2 experts.
    assert run_ranks(2, fit_every_other_step)[0][1:] == [3 * 24 * 2] * 4  # behind the trial


SCRIPT = """
import lightning.pytorch as pl, torch, os, sys
torch.set_num_threads(1)
import lightning_swiftmoe
from lightning_swiftmoe import ExpertRebalancer
from tests.jobs import Job, Net, data

class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return data(Job(slots=3, steps=4), self.trainer.global_rank, self.trainer.world_size)

if __name__ == "__main__":
    module = Net(Job(slots=3, steps=4))
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy="{name}", max_steps=4, precision="64-true", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )
    trainer.fit(module, Data())
    assert any(isinstance(c, ExpertRebalancer) for c in trainer.callbacks) or "{name}" != "swiftmoe"
    if trainer.is_global_zero:
        torch.save(module.state_dict(), sys.argv[1])
"""


@pytest.mark.parametrize(
    "name", ["swiftmoe", "swiftmoe_fork", pytest.param("swiftmoe_spawn", marks=pytest.mark.exhaustive)]
)
def test_by_name_whatever_starts_the_ranks(tmp_path, name):
    script, result = tmp_path / "job.py", tmp_path / "weights.pt"
    script.write_text(textwrap.dedent(SCRIPT.format(name=name)))
    root = Path(__file__).parents[2]
    log = tmp_path / "log"
    with log.open("w") as output:
        code = subprocess.call(
            [sys.executable, str(script), str(result)],
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=120,
            env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        )
    assert code == 0, log.read_text()[-3000:]
    # Forked and spawned ranks hand their weights to the parent's module, which is fp32.
    bound = 1e-9 if name == "swiftmoe" else 1e-6
    assert largest_error(torch.load(result), train_alone(dataclasses.replace(JOB, steps=4))) < bound


@pytest.mark.parametrize("start", ["", "_spawn", "_fork"])
def test_names_for_parameters_without_gradients(start):
    name = f"swiftmoe{start}_find_unused_parameters_true"
    trainer = pl.Trainer(strategy=name, accelerator="cpu", devices=2, logger=False, enable_checkpointing=False)
    assert isinstance(trainer.strategy, SwiftMoEStrategy)
    assert trainer.strategy._ddp_kwargs == {"find_unused_parameters": True}
    assert trainer.strategy._start_method == (start[1:] or "popen")


def fit_offloaded(path):
    job = dataclasses.replace(JOB, strategy={"offload_optimizer": True}, optimizer=adamw)
    devices = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            devices.extend(p.device.type for group in trainer.optimizers[0].param_groups for p in group["params"])

    trainer = our_trainer(dataclasses.replace(job, callbacks=lambda: [Look()]))
    trainer.fit(Net(job), data(job, dist.get_rank(), dist.get_world_size()))
    return devices


def test_offload_keeps_shards_on_the_host(tmp_path):
    assert set(run_ranks(2, fit_offloaded, str(tmp_path))[0]) == {"cpu"}


def fit_with_trace(path):
    job = dataclasses.replace(JOB, optimizer=sgd)
    strategy = SwiftMoEStrategy(slots_per_rank=3, timeout=30)
    from tests.ranks import Ranks

    rebalancer = ExpertRebalancer("proportional", trace=path)
    trainer = make_trainer(job, strategy, num_nodes=2, plugins=[Ranks()], callbacks=[rebalancer], logger=False)
    trainer.fit(Net(job), data(job, dist.get_rank(), 2))
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def test_trace_and_metrics(tmp_path):
    path = tmp_path / "folder" / "trace.npy.gz"
    metrics = run_ranks(2, fit_with_trace, str(path))[0]
    trace = read_trace(path)
    assert trace["counts"].shape == (4, 2, 2, 5)
    assert (trace["counts"].sum(axis=(2, 3)) == 24 * 2).all()
    assert trace["steps"].tolist() == [1, 2, 3, 4]
    assert metrics["moe/token_survival"] == 1.0
    last = trace["counts"][-1].sum(axis=1)
    assert metrics["moe/expert_imbalance"] == pytest.approx((last.max(1) / last.mean(1)).mean(), rel=1e-6)
    names = {"moe/rank_imbalance", "moe/replicas_moved", "moe/aux_loss", "moe/bytes_gradient", "moe/ms_weight"}
    assert names <= metrics.keys()


class ToldToEnd(pl.Callback):
    """A signal for rank 1 alone, in its second step."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 1 and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def fit_until_told():
    trainer = our_trainer(dataclasses.replace(JOB, callbacks=lambda: [ToldToEnd()]))
    with pytest.raises(SIGTERMException):
        trainer.fit(Net(JOB), data(JOB, dist.get_rank(), dist.get_world_size()))
    return trainer.global_step


def test_a_signal_to_one_rank_ends_all_at_the_head_of_a_step():
    assert run_ranks(2, fit_until_told) == [2, 2]


def validate_until_told():
    trainer = our_trainer(dataclasses.replace(JOB, steps=1))
    module, batches = Net(JOB), data(JOB, dist.get_rank(), dist.get_world_size())
    trainer.fit(module, batches)
    seen = []

    def validation_step(batch, batch_idx):
        seen.append(batch_idx)
        os.kill(os.getpid(), signal.SIGTERM)

    module.validation_step = validation_step
    with pytest.raises(SIGTERMException):
        trainer.validate(module, batches, verbose=False)
    return seen


def test_outside_fit_a_signal_ends_a_rank_after_its_batch():
    assert run_ranks(2, validate_until_told) == [[0], [0]]
