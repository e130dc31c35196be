"""What Lightning users do, a function for each row: it tries one system and returns the verdict."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
)
from lightning.pytorch.utilities import grad_norm

from tests.jobs import full
from tests.semantics.peers.cells import TIMEOUT_S, Cell, Ended, Job, compare, difference
from tests.semantics.peers.systems import ALONE, Batches, Model, SlurmRanks, System, make_trainer

RIGHT = "right"


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Args:
        what: the user does.
        test: of ours, below ``tests``, that shows it.
        fn: tries it.
    """

    what: str
    test: str
    fn: Callable[[Cell], str]


ROWS: dict[str, Row] = {}


def row(what: str, test: str) -> Callable[[Callable[[Cell], str]], Callable[[Cell], str]]:
    """Register a function as a row of its name."""

    def register(fn: Callable[[Cell], str]) -> Callable[[Cell], str]:
        ROWS[fn.__name__] = Row(what, test, fn)
        return fn

    return register


# -- a step -----------------------------------------------------------------------------------------------------------


@row("nothing special", "strategy/test_master_oracle.py::test_ranks_equal_one_process")
def plain(cell):
    return cell.equals_one_process()


class InEvalMode(Model):
    def __init__(self, system):
        super().__init__(system)
        self.eval()


@row(
    "a module that stays in eval mode, as `from_pretrained` returns models",
    "strategy/test_lightning.py::test_training_in_eval_mode",
)
def in_eval_mode(cell):
    return cell.equals_one_process(module=InEvalMode)


class ClipsInHook(Model):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.seen.append(float(torch.nn.utils.clip_grad_norm_(self.parameters(), 0.05)))


@row(
    "`clip_grad_norm_(self.parameters())` in `configure_gradient_clipping`",
    "semantics/test_clipping.py::test_in_a_hook",
)
def clips_in_hook(cell):
    return cell.equals_one_process(module=ClipsInHook)


class ClipsByHand(Model):
    automatic_optimization = False

    def __init__(self, system):
        super().__init__(system)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        self.clip(optimizer)
        optimizer.step()

    def clip(self, optimizer):
        self.seen.append(float(torch.nn.utils.clip_grad_norm_(self.parameters(), 0.05)))


@row("the same in manual optimization", "semantics/test_clipping.py::test_in_manual_optimization")
def clips_by_hand(cell):
    return cell.equals_one_process(module=ClipsByHand)


class ClipsValuesByHand(ClipsByHand):
    def clip(self, optimizer):
        self.clip_gradients(optimizer, gradient_clip_val=0.001, gradient_clip_algorithm="value")


@row('`clip_gradients(..., "value")` in manual optimization', "semantics/test_clipping.py::test_in_manual_optimization")
def clips_values_by_hand(cell):
    return cell.equals_one_process(module=ClipsValuesByHand)


@row("`Trainer(gradient_clip_val=0.05)`", "strategy/test_master_oracle.py::test_variants")
def trainer_clips_norm(cell):
    return cell.equals_one_process(trainer={"gradient_clip_val": 0.05})


@row('the same with `gradient_clip_algorithm="value"`', "strategy/test_master_oracle.py::test_variants")
def trainer_clips_values(cell):
    return cell.equals_one_process(trainer={"gradient_clip_val": 0.001, "gradient_clip_algorithm": "value"})


class SkipsByHand(Model):
    def __init__(self, system):
        super().__init__(system)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        self.manual_backward(self.loss(batch))
        if batch_idx % 2 == 0:
            optimizer.zero_grad()
            return
        optimizer.step()
        optimizer.zero_grad()


@row(
    "`manual_backward; optimizer.zero_grad(); return`: a step skipped",
    "semantics/test_skipping.py::test_in_manual_optimization",
)
def skips_by_hand(cell):
    return cell.equals_one_process(module=SkipsByHand, steps=3, batches=6)


class ZeroesInHook(Model):
    def on_after_backward(self):
        if self.trainer.fit_loop.batch_idx == 2:
            self.zero_grad()


@row("`self.zero_grad()` in a hook drops a micro-batch", "semantics/test_skipping.py::test_in_a_hook")
def zeroes_in_hook(cell):
    return cell.equals_one_process(module=ZeroesInHook, trainer={"accumulate_grad_batches": 2})


class Toggles(Model):
    """Two optimizers take turns, as a GAN's do."""

    leaves_unused = True

    def __init__(self, system):
        super().__init__(system)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)
            self.manual_backward(self.loss(batch))
            optimizer.step()
            optimizer.zero_grad()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self):
        others = [p for name, p in self.named_parameters() if "experts" not in name]
        return [torch.optim.SGD(self.experts, lr=0.05), torch.optim.SGD(others, lr=0.05)]


@row("two optimizers that take turns, `toggle_optimizer`", "semantics/test_freezing.py::test_toggle_optimizer")
def toggles(cell):
    return cell.equals_one_process(module=Toggles)


class TwoHoldExperts(Toggles):
    """Each steps with a half of the experts' matrices."""

    def training_step(self, batch, batch_idx):
        self.manual_backward(self.loss(batch))
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self):
        names = dict(self.named_parameters())
        up = [p for name, p in names.items() if "up_proj" in name]
        rest = [p for name, p in names.items() if "up_proj" not in name]
        return [torch.optim.SGD(up, lr=0.03, momentum=0.9), torch.optim.SGD(rest, lr=0.05)]


@row("two optimizers that hold experts", "semantics/test_optimizers.py::test_two_optimizers_that_hold_experts")
def two_hold_experts(cell):
    return cell.equals_one_process(module=TwoHoldExperts)


class SmallLogits(Model):
    moe = {"z_loss_coef": 0.05}  # noqa: RUF012


@row("accumulation: auxiliary losses count once (z-loss)", "semantics/test_counts.py::test_under_the_strategy")
def accumulates(cell):
    return cell.equals_one_process(module=SmallLogits, trainer={"accumulate_grad_batches": 2})


class BalancesLoad(Model):
    moe = {"aux_loss_coef": 0.5}  # noqa: RUF012


@row("accumulation", "strategy/test_master_oracle.py::test_variants")
def accumulates_plainly(cell):
    return cell.equals_one_process(trainer={"accumulate_grad_batches": 2})


@row("a load-balance loss over the tokens of all ranks", "strategy/test_master_oracle.py::test_variants")
def balances_load(cell):
    return cell.equals_one_process(module=BalancesLoad)


# -- weights that the user changes or looks at -------------------------------------------------------------------------


class Edits(Model):
    """Changes weights once, between the second and the third step."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.trainer.global_step == 2:
            self.edit()


class Loads(Edits):
    def edit(self):
        shapes = {name: p.shape for name, p in Model(ALONE).named_parameters()}
        generator = torch.Generator().manual_seed(11)
        state = {k: torch.rand(s, generator=generator, dtype=torch.float64) - 0.5 for k, s in shapes.items()}
        self.load_state_dict(state, strict=False)


@row("`load_state_dict` of whole weights during fit", "semantics/test_edits.py::test_at_the_end_of_a_batch")
def loads(cell):
    return cell.equals_one_process(module=Loads)


class Resets(Edits):
    def edit(self):
        torch.manual_seed(5)
        for moe in self.moes:
            moe.experts.reset_parameters()


@row("`reset_parameters` of experts during fit", "semantics/test_edits.py::test_at_the_end_of_a_batch")
def resets(cell):
    return cell.equals_one_process(module=Resets)


class Clamps(Model):
    def on_train_batch_end(self, outputs, batch, batch_idx):
        with torch.no_grad():
            for p in self.experts:
                p.clamp_(-0.05, 0.05)


@row("weights clamped after every step", "semantics/test_edits.py::test_on_every_step")
def clamps(cell):
    return cell.equals_one_process(module=Clamps)


class LogsNorms(Model):
    def on_before_optimizer_step(self, optimizer):
        # Lightning adds the total up in 32 bits.
        self.seen.append({k: float(v) for k, v in grad_norm(self, norm_type=2).items() if "total" not in k})


@row("`grad_norm(self)` is logged", "semantics/test_observing.py::test_grad_norm")
def logs_norms(cell):
    return cell.equals_one_process(module=LogsNorms)


class Penalises(Model):
    def training_step(self, batch, batch_idx):
        return self.loss(batch) + 0.05 * sum(p.square().sum() for p in self.parameters())


@row("an L2 term over `self.parameters()` in the loss", "semantics/test_observing.py::test_penalties_in_the_loss")
def penalises(cell):
    return cell.equals_one_process(module=Penalises)


class Dumps(Model):
    """Whole tensors, or such as ``full_tensor()`` makes whole."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        state = self.state_dict()
        self.seen.append({k: full(v).detach().clone() for k, v in state.items() if "expert_bias" not in k})


@row("`self.state_dict()` in a hook: names and whole values", "semantics/test_observing.py::test_state_dict")
def dumps(cell):
    return cell.equals_one_process(module=Dumps)


class Averages(Model):
    def on_train_start(self):
        self.average = {name: p.detach().clone() for name, p in self.named_parameters()}

    @torch.no_grad()
    def on_train_batch_end(self, outputs, batch, batch_idx):
        for name, p in self.named_parameters():
            self.average[name].lerp_(p, 0.1)

    def on_train_end(self):
        self.seen.append({name: full(value) for name, value in self.average.items()})


@row("an average of the weights by the user's own hand", "semantics/test_observing.py::test_own_averages")
def averages(cell):
    return cell.equals_one_process(module=Averages)


# -- what trains ------------------------------------------------------------------------------------------------------


class Unfreezes(BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze([moe.experts for moe in pl_module.moes])

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group([moe.experts for moe in pl_module.moes], optimizer, lr=0.03)


class StartsFrozen(Model):
    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05, momentum=0.9)


@row("`BaseFinetuning.unfreeze_and_add_param_group`", "semantics/test_freezing.py::test_unfreeze_and_add_param_group")
def unfreezes(cell):
    return cell.equals_one_process(module=StartsFrozen, batches=2, callbacks=lambda: [Unfreezes()])


class TiedExperts(Model):
    def __init__(self, system):
        super().__init__(system)
        self.moes[1].experts = self.moes[0].experts


@row("two layers share one `experts` module", "semantics/test_tied.py::test_tied_experts")
def ties(cell):
    return cell.equals_one_process(module=TiedExperts)


class ExpertsFrozen(StartsFrozen):
    moe = {"bias_update_rate": 0.01, "score": "sigmoid"}  # noqa: RUF012

    def __init__(self, system):
        super().__init__(system)
        for p in self.experts:
            p.requires_grad_(False)


@row(
    "all experts frozen, balanced by their bias",
    "semantics/test_freezing.py::test_steps_end_where_all_experts_are_frozen",
)
def freezes_experts(cell):
    return cell.equals_one_process(module=ExpertsFrozen)


class OnlyExperts(StartsFrozen):
    def __init__(self, system):
        super().__init__(system)
        for name, p in self.named_parameters():
            p.requires_grad_("experts" in name)


@row("only experts train", "semantics/test_freezing.py::test_dense_frozen_before_fit")
def trains_experts_only(cell):
    return cell.equals_one_process(module=OnlyExperts)


class ScheduleFree(torch.optim.Optimizer):
    """Schedule-free SGD (arXiv 2405.15682), unknown to torch: the gradient is taken between ``z`` and ``x``."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr, "k": 0})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["k"] += 1
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["z"] = p.clone()
                    state["x"] = p.clone()
                state["z"].sub_(p.grad, alpha=group["lr"])
                state["x"].lerp_(state["z"], 1 / group["k"])
                p.copy_(state["z"]).lerp_(state["x"], 0.9)
        return loss


class TrainsScheduleFree(Model):
    def configure_optimizers(self):
        return ScheduleFree(self.parameters(), lr=0.05)


@row("a schedule-free optimizer of the user's own", "semantics/test_schedule_free.py::test_equals_one_process")
def trains_schedule_free(cell):
    return cell.equals_one_process(module=TrainsScheduleFree)


# -- callbacks and loops -----------------------------------------------------------------------------------------------


class Finds(Model):
    lr = 0.3


@row("`LearningRateFinder`", "semantics/test_callbacks.py::test_learning_rate_finder_callback")
def finds_rate(cell):
    # The rate found follows the loss of the first rank's own tokens, so nobody takes it over.
    finder = lambda: [LearningRateFinder(num_training_steps=3, update_attr=False)]  # noqa: E731
    root = {"default_root_dir": str(cell.folder)}
    return cell.equals_one_process(module=Finds, callbacks=finder, trainer=root)


@row("`GradientAccumulationScheduler`", "semantics/test_stock_callbacks.py::test_accumulation_schedule")
def schedules_accumulation(cell):
    scheduler = lambda: [GradientAccumulationScheduler({0: 1, 1: 2})]  # noqa: E731
    return cell.equals_one_process(batches=2, callbacks=scheduler)


class PrunesExperts(ModelPruning):
    """Half of every expert matrix, by magnitude, once."""

    def __init__(self, system):
        super().__init__("l1_unstructured", parameters_to_prune=None, amount=0.5, use_global_unstructured=False)

    def setup(self, trainer, pl_module, stage):
        self._parameters_to_prune = [(m.experts, n) for m in pl_module.moes for n in ("up_proj", "down_proj")]
        super().setup(trainer, pl_module, stage)


@row("`ModelPruning` of experts", "semantics/test_pruning.py::test_of_experts_is_refused")
def prunes(cell):
    return cell.equals_one_process(batches=2, callbacks=lambda: [PrunesExperts(cell.system)])


@row(
    "ranks with 3 and 2 validation batches in fit",
    "semantics/test_uneven_validation.py::test_every_rank_sees_its_batches",
)
def validates_unevenly(cell):
    return cell.equals_one_process(val_batches=(3, 2), trainer={"num_sanity_val_steps": 0})


def fit_often(system: System, folder: Path) -> int:
    """How many file descriptors nine fits leave behind after the first."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    open_files = []
    for _ in range(10):
        make_trainer(system, max_steps=1).fit(Model(system), Batches(1, rank, num_ranks))
        gc.collect()
        open_files.append(len(os.listdir("/proc/self/fd")))
    return open_files[-1] - open_files[0]


@row("ten fits in one process: open files", "endurance/test_endurance.py::test_nothing_grows")
def fits_often(cell):
    more = max(cell.run(2, fit_often, cell.system))
    return RIGHT if more <= 0 else f"wrong: {more} more file descriptors after nine further fits"


# -- checkpoints -------------------------------------------------------------------------------------------------------


def resumes(cell: Cell, num_ranks: int) -> str:
    """Whether the second half after a checkpoint equals the second half without, bit for bit."""
    path = str(cell.folder / "half.ckpt")
    whole = cell.train(Job(Wide, steps=6, save_to=path, save_at=3), num_ranks)[0].weights
    resumed = cell.train(Job(Wide, steps=6, ckpt_path=path), num_ranks)[0].weights
    if all(torch.equal(whole[k], resumed[k]) for k in whole):
        return RIGHT
    return f"wrong: weights off by {difference(resumed, whole):.1e}"


@row(
    "resume in the middle of an epoch on 2 ranks, bit for bit",
    "strategy/test_checkpoint.py::test_same_ranks_bit_for_bit",
)
def resumes_on_two(cell):
    return resumes(cell, 2)


@row(
    "the same on 3 ranks",
    "strategy/test_checkpoint.py::test_losses_and_weights_of_every_later_step_bit_for_bit",
)
def resumes_on_three(cell):
    return resumes(cell, 3)


@row("saved on 2 ranks, resumed on 3", "strategy/test_checkpoint.py::test_other_ranks_to_rounding")
def resumes_on_more(cell):
    path = str(cell.folder / "half.ckpt")
    cell.train(Job(steps=6, save_to=path, save_at=3))
    expected = cell.alone(Job(steps=6))
    return compare(cell.train(Job(steps=6, ckpt_path=path), 3), expected, cell.system.bound)


@row(
    "saved on 2 ranks, resumed in one process without the strategy",
    "strategy/test_checkpoint.py::test_one_process_without_the_strategy",
)
def resumes_alone(cell):
    path = str(cell.folder / "half.ckpt")
    cell.train(Job(steps=6, save_to=path, save_at=3))
    expected = cell.alone(Job(steps=6))
    return compare([cell.alone(Job(steps=6, ckpt_path=path))], expected, cell.system.bound)


def try_to_resume(system: System, path: str, folder: Path) -> tuple[str, bool]:
    """What a rank said that was to go on from a checkpoint, empty where it trained; and is its module as before?"""
    module, first = Model(system), Model(system)
    trainer = make_trainer(system, max_steps=6)
    try:
        trainer.fit(module, Batches(6, dist.get_rank(), dist.get_world_size()), ckpt_path=path, weights_only=False)
    except Exception as error:
        said = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        expected = dict(first.named_parameters())
        # Of sharded weights a rank holds parts, under the same names.
        mine = {name: full(p) for name, p in module.named_parameters()}
        same = all(
            name not in mine or mine[name].shape != p.shape or torch.equal(mine[name], p)
            for name, p in expected.items()
        )
        return said, same
    return "", False


def refuses(cell: Cell, damage: Callable[[Path], None]) -> str:
    """A damaged checkpoint must be refused before training. DeepSpeed's are folders: the largest file is damaged."""
    path = cell.folder / "half.ckpt"
    cell.train(Job(steps=6, save_to=str(path), save_at=3))
    files = [path] if path.is_file() else list(path.rglob("*.pt"))
    damage(max(files, key=lambda file: file.stat().st_size))
    results = cell.run(2, try_to_resume, cell.system, str(path))
    if not all(said for said, _ in results):
        return "wrong: loads and trains on"
    said = results[0][0]
    return (
        f"refused: {said}"
        if all(same for _, same in results)
        else f"wrong: refused, but the module is half overwritten ({said})"
    )


def flip(file: Path) -> None:
    """One bit in the middle of the largest record: a number of expert weights or of their momenta."""
    with torch.serialization._open_zipfile_reader(str(file)) as reader:
        names = [name for name in reader.get_all_records() if "data/" in name]
        largest = max(names, key=lambda name: len(reader.get_record(name)))
        middle = len(reader.get_record(largest)) // 16 * 8
        offset = reader.get_record_offset(largest) + middle + 6  # in the exponent of a number of 64 bits
    content = bytearray(file.read_bytes())
    content[offset] ^= 16
    file.write_bytes(content)


@row("one bit of a checkpoint is flipped", "strategy/test_bad_checkpoint.py::test_refused_and_untouched")
def bit_flipped(cell):
    return refuses(cell, flip)


def edit(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Load, change the weights, save."""
    content = torch.load(file, weights_only=False)
    change(content["module"] if "module" in content else content["state_dict"])
    torch.save(content, file)


def drop_a_matrix(state: dict[str, Any]) -> None:
    """Of one expert layer."""
    del state[next(name for name in state if "down_proj" in name)]


def put_nan(state: dict[str, Any]) -> None:
    """Into one weight of an expert."""
    state[next(name for name in state if "down_proj" in name)].view(-1)[0] = float("nan")


@row("a matrix is missing in a checkpoint", "strategy/test_bad_checkpoint.py::test_refused_and_untouched")
def matrix_missing(cell):
    return refuses(cell, lambda file: edit(file, drop_a_matrix))


@row("a weight in a checkpoint is NaN: told", "checkpoint/test_reading.py::test_weights_that_are_no_numbers_are_named")
def weight_is_nan(cell):
    return refuses(cell, lambda file: edit(file, put_nan))


@row("a truncated checkpoint", "strategy/test_bad_checkpoint.py::test_refused_and_untouched")
def truncated(cell):
    return refuses(cell, lambda file: os.truncate(file, file.stat().st_size // 2))


class Wide(Model):
    """Sums over ranks depend on where in a bucket an element lies."""

    width = 64


class Large(Model):
    """Files that take a while to write."""

    def __init__(self, system):
        super().__init__(system)
        self.register_buffer("ballast", torch.ones(8_000_000))


def save_forever(system: System, name: str, folder: Path) -> None:
    """A checkpoint on every step, under one name."""
    tempfile.tempdir = "/dev/shm"  # temporary files on another file system than checkpoints, as on most clusters

    class Saves(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.save_checkpoint(name)
            if trainer.is_global_zero:
                (folder / "whole").write_text(str(trainer.global_step))

    class Watcher(threading.Thread):
        """Kills the process as soon as the second save has the name of a file that is not whole."""

        def run(self):
            path, whole = Path(name), folder / "whole"
            while not whole.exists():
                pass
            files = [path] if path.is_file() else list(path.rglob("*.pt"))
            file = max(files, key=lambda file: file.stat().st_size)
            size = file.stat().st_size
            while True:
                if file.exists() and file.stat().st_size < size:
                    (folder / "killed").touch()
                    os.kill(os.getpid(), signal.SIGKILL)

    if dist.get_rank() == 0:
        Watcher(daemon=True).start()
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    trainer = make_trainer(system, max_steps=6, callbacks=[Saves()])
    trainer.fit(Large(system), Batches(6, rank, num_ranks))


@row(
    "killed (-9) while saving, the temporary folder on another file system: the name stands for a whole file",
    "checkpoint/test_whole_file.py::test_killed_at_any_moment",
)
def killed_while_saving(cell):
    path = cell.folder / "last.ckpt"
    try:
        cell.run(2, save_forever, cell.system, str(path))
    except Ended as ended:
        if not list(cell.folder.rglob("killed")):
            raise
        try:
            cell.train(Job(module=Large, steps=7, ckpt_path=str(path)))
        except Ended as error:
            return f"wrong: half a file under its final name ({error})"
        return f"right (killed: {ended})"
    return RIGHT  # six saves, and never half a file under the name


def save_with_no_room(system: System, name: str, folder: Path) -> None:
    """The second save finds a disk with room for half a file."""
    import resource

    class Saves(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 2:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (16_000_000, 16_000_000))
            trainer.save_checkpoint(name)

    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    trainer = make_trainer(system, max_steps=2, callbacks=[Saves()])
    trainer.fit(Large(system), Batches(2, rank, num_ranks))


@row(
    "the disk is full while saving: the checkpoint before stays",
    "checkpoint/test_whole_file.py::test_full_disk_keeps_the_last_one",
)
def disk_full(cell):
    path = cell.folder / "last.ckpt"
    try:
        cell.run(2, save_with_no_room, cell.system, str(path))
        return "wrong: a save that failed says nothing"
    except Ended as ended:
        said = str(ended)
    try:
        cell.train(Job(module=Large, steps=3, ckpt_path=str(path)))
    except Ended as ended:
        return f"wrong: the checkpoint is lost ({ended})"
    return f"right ({said})"


# -- signals and failures ----------------------------------------------------------------------------------------------


class Signalled(Model):
    signum, ranks = signal.SIGTERM, (0, 1)

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == 2 and self.global_rank in self.ranks and not self.trainer.ckpt_path:
            os.kill(os.getpid(), self.signum)
        return self.loss(batch)


class SignalledOne(Signalled):
    ranks = (1,)


def signalled(cell: Cell, module: type[Model]) -> str:
    """All ranks end, with a checkpoint from which the run goes on to the weights of one process."""
    saves = lambda: [ModelCheckpoint(cell.folder, "{step}", save_on_exception=True, every_n_train_steps=100)]  # noqa: E731
    job = Job(module, steps=5, callbacks=saves, trainer={"enable_checkpointing": True})
    said = ""
    try:
        cell.train(job)
        return "wrong: goes on as if nothing had come"
    except Ended as ended:
        said = str(ended)
    saved = list(cell.folder.glob("*.ckpt"))
    if "hang" in said or not saved:
        return f"wrong: no checkpoint ({said})" if not saved else f"wrong: {said}"
    expected = cell.alone(Job(steps=5))
    return compare(cell.train(replace(job, ckpt_path=str(saved[0]))), expected, cell.system.bound)


@row(
    "SIGTERM to all ranks: they end with a checkpoint, and it resumes",
    "strategy/test_signals.py::test_a_signal_ends_all_ranks_with_a_checkpoint",
)
def told_to_end(cell):
    return signalled(cell, Signalled)


@row("SIGTERM to rank 1 alone: the same", "strategy/test_signals.py::test_a_signal_ends_all_ranks_with_a_checkpoint")
def one_told_to_end(cell):
    return signalled(cell, SignalledOne)


class Requeued(Signalled):
    signum = signal.SIGUSR1


@row(
    "SLURM's requeue signal: a checkpoint, and the job is asked for again",
    "strategy/test_signals.py::test_a_job_that_slurm_requeues",
)
def requeued(cell):
    asked = cell.folder / "asked"
    scontrol = cell.folder / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {asked}\n')
    scontrol.chmod(0o755)
    before = dict(os.environ)
    os.environ.update(PATH=f"{cell.folder}{os.pathsep}{before['PATH']}", SLURM_JOB_ID="7")
    job = Job(Requeued, steps=5, trainer={"environment": SlurmRanks, "default_root_dir": str(cell.folder)})
    said = "goes on"
    try:
        cell.train(job)
    except Ended as ended:
        said = str(ended)
    finally:
        os.environ.clear()
        os.environ.update(before)
    saved = list(cell.folder.glob("hpc_ckpt_*.ckpt"))
    if not saved or not asked.exists():
        return f"wrong: {'no checkpoint' if not saved else 'nobody asked for the job again'} ({said})"
    return compare(cell.train(Job(steps=5, ckpt_path=str(saved[0]))), cell.alone(Job(steps=5)), cell.system.bound)


def launch(cell: Cell, what: str) -> tuple[int | None, list[str]]:
    """Exit code, None where it does not end, and lines of a job whose ranks Lightning starts."""
    command = [sys.executable, "-m", "tests.semantics.peers.launched", cell.system.name, what]
    log = cell.folder / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
        )
        try:
            code: int | None = process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            code = None
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return code, log.read_text().rstrip().splitlines()


def tells(cell: Cell, what: str, cause: str) -> str:
    """The job ends, and its last 30 lines, a screen, name the cause."""
    code, lines = launch(cell, what)
    if code is None:
        return f"hangs ({TIMEOUT_S:.0f} s)"
    where = [number for number, line in enumerate(reversed(lines), start=1) if cause in line]
    if code == 0 or not where:
        return f"wrong: ends with {code}, and none of {len(lines)} lines says it"
    return RIGHT if where[0] <= 30 else f"wrong: said {where[0]} lines above the end"


@row(
    "rank 1 raises: the job ends, and the last 30 lines name the cause",
    "strategy/test_failure.py::test_the_job_ends_with_the_first_cause",
)
def rank_raises(cell):
    return tells(cell, "raises", "ValueError: the first cause")


@row("rank 1 is killed (-9): the same", "strategy/test_failure.py::test_the_job_ends_with_the_first_cause")
def rank_dies(cell):
    return tells(cell, "dies", "SIGKILL")


# -- what only ours has -----------------------------------------------------------------------------------------------


def only_ours(name: str, what: str, test: str) -> None:
    """A row that other strategies have no part in; its cell of ours is the test."""
    ROWS[name] = Row(what, test, lambda cell: "right, by the test" if cell.system.name == "ours" else "-")


only_ours(
    "capacity_scope",
    '`capacity_scope="rank"` on one rank drops as a plain layer',
    "semantics/test_counts.py::test_capacity_scope_rank_on_one_rank_is_a_plain_layer",
)
only_ours(
    "stopped_run",
    "`swiftmoe train` is stopped, and goes on bit for bit",
    "cli/test_train_resume.py::test_a_stopped_run_goes_on_to_the_same_end",
)
only_ours(
    "trace",
    "the trace of a killed run that is resumed",
    "strategy/test_trace.py::test_killed_and_resumed_is_as_never_interrupted",
)
only_ours(
    "mistakes",
    "mistakes in arguments: one line, with what was meant",
    "strategy/test_bad_input.py::test_strategy_arguments",
)
only_ours("command_mistakes", "the same on the command line", "cli/test_train_mistakes.py::test_one_line_and_status_2")
only_ours(
    "vouched_optimizer",
    "an optimizer that cannot be tried, vouched for",
    "cli/test_train_mistakes.py::test_a_user_may_vouch_for_an_optimizer",
)
