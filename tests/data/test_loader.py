"""Batches: what is in them, how ranks share them, and that resuming continues with the very next one."""

from dataclasses import dataclass
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_swiftmoe.data import TextData
from lightning_swiftmoe.data.loader import Windows


@dataclass(frozen=True)
class Digits:
    """Windows of six bytes that are all different."""

    def documents(self):
        for number in range(250):
            yield f"{number}.txt", f"{number * 7919 % 999983:06d}".encode()


def test_windows_cover_the_text_once():
    windows = Windows(np.arange(22, dtype=np.uint8), 5)
    assert len(windows) == 4
    batch = torch.stack([windows[number] for number in range(4)])
    assert batch.dtype == torch.int32
    assert batch[:, :-1].flatten().tolist() == list(range(20))  # inputs
    assert batch[:, 1:].flatten().tolist() == list(range(1, 21))  # targets


def test_a_split_shorter_than_one_window():
    with pytest.raises(ValueError, match=r"a split of 5 tokens has no window of 5 \+ 1; choose a smaller seq_len"):
        Windows(np.zeros(5, dtype=np.uint8), 5)


def text_data(world=1, rank=0, **kwargs):
    data = TextData(Digits(), **{"seq_len": 6, "batch_size": 12, **kwargs})
    data.trainer = SimpleNamespace(world_size=world, global_rank=rank)
    return data


@pytest.mark.parametrize("world", [5, 8, 24])
def test_a_batch_that_ranks_cannot_share(world):
    with pytest.raises(ValueError, match=f"batch_size = 12 is for all ranks together and must divide by {world}"):
        text_data(world).train_dataloader()


def rows(batch):
    return sorted(bytes(row.to(torch.uint8).tolist()) for row in batch)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_a_global_batch_is_the_same_for_any_number_of_ranks(world):
    alone = [rows(batch) for batch in text_data().train_dataloader()]
    shared = zip(*(text_data(world, rank).train_dataloader() for rank in range(world)), strict=True)
    together = [rows(torch.cat(parts)) for parts in shared]
    assert together == alone[: len(together)]
    assert len(alone) - len(together) <= 1


def test_the_seed_shuffles_and_nothing_else():
    def first_epoch(seed):
        torch.manual_seed(torch.seed())
        return [batch.tolist() for batch in text_data(seed=seed).train_dataloader()]

    assert first_epoch(1) == first_epoch(1)
    assert first_epoch(1) != first_epoch(2)


class Recorder(pl.LightningModule):
    """Writes down the batches it is trained on."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch.tolist())
        return self.weight * 1.0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(steps, *, ckpt_path=None, callbacks=(), **kwargs):
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    options |= {"enable_checkpointing": bool(callbacks), "limit_val_batches": 0, "callbacks": list(callbacks)}
    trainer, module = pl.Trainer(max_steps=steps, **options), Recorder()
    trainer.fit(module, TextData(Digits(), seq_len=6, batch_size=48, **kwargs), ckpt_path=ckpt_path)
    return module.seen


@pytest.mark.filterwarnings("ignore::UserWarning:lightning")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_resuming_sees_the_very_next_batch(tmp_path, num_workers):
    every_step = ModelCheckpoint(
        tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1, save_on_train_epoch_end=False
    )
    seen = fit(11, callbacks=[every_step], num_workers=num_workers)
    epoch = next(number for number in range(1, 11) if rows_of(seen[:number]) & rows_of([seen[number]]))
    assert 3 <= epoch <= 5, "the run should cross two ends of an epoch"
    for step in range(1, 11) if num_workers == 0 else (2, epoch):
        assert fit(11, ckpt_path=tmp_path / f"step={step}.ckpt", num_workers=num_workers) == seen[step:], step


def rows_of(batches):
    return {tuple(row) for batch in batches for row in batch}
