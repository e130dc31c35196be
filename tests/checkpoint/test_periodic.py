"""When checkpoints are saved, and which are kept."""

import lightning.pytorch as pl
import pytest
import torch

from lightning_swiftmoe.checkpoint import periodic
from lightning_swiftmoe.checkpoint.periodic import PeriodicCheckpoint, checkpoints_in, step_of


class Line(pl.LightningModule):
    def __init__(self, clock):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.clock = clock

    def training_step(self, batch):
        self.clock.now += 60
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.zeros(200, 2))


class Clock:
    now = 0.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(periodic, "time", clock)
    return clock


def saved_by(clock, callback, steps, **options):
    """The steps of every save."""
    saved = []
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        callbacks=[callback],
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    save = trainer.save_checkpoint
    trainer.save_checkpoint = lambda path: (saved.append(step_of(path)), save(path))
    trainer.fit(Line(clock))
    return saved


def test_by_steps_and_at_the_end(tmp_path, clock):
    callback = PeriodicCheckpoint(tmp_path, every_n_steps=4, every_minutes=None)
    assert saved_by(clock, callback, 10) == [4, 8, 10]
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step-8.ckpt", "step-10.ckpt"]
    assert torch.load(tmp_path / "step-10.ckpt", weights_only=True)["global_step"] == 10


def test_once_for_a_step_of_several_batches(tmp_path, clock):
    callback = PeriodicCheckpoint(tmp_path, every_n_steps=2, every_minutes=None, keep=9)
    assert saved_by(clock, callback, 4, accumulate_grad_batches=3) == [2, 4]


def test_by_minutes_since_the_last(tmp_path, clock):
    # A minute a step, looked at every 20 steps: due at 40; then at 100, because of what was saved at 50.
    callback = PeriodicCheckpoint(tmp_path, every_n_steps=50, every_minutes=25)
    assert saved_by(clock, callback, 105) == [40, 50, 80, 100, 105]


def test_a_folder_that_cannot_be_written_is_found_before_training(tmp_path, clock):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"checkpoints cannot be written to .*file/inside .*choose another folder"):
        saved_by(clock, PeriodicCheckpoint(tmp_path / "file" / "inside"), 1)
    assert clock.now == 0


@pytest.mark.parametrize("wrong", [{"every_n_steps": 0}, {"every_minutes": -1}, {"keep": 0}])
def test_periods_are_positive(tmp_path, wrong):
    with pytest.raises(ValueError, match="must be positive"):
        PeriodicCheckpoint(tmp_path, **wrong)
