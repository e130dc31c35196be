"""The bar of ``swiftmoe train`` ends at the last batch."""

import pytest

from lightning_swiftmoe.cli.progress import ShortProgressBar
from tests.jobs import Job, Net, SaveAt, data, make_trainer


class Bar(ShortProgressBar):
    """Notes what is shown."""

    def __init__(self):
        super().__init__()
        self.shown = []

    def on_train_batch_end(self, trainer, *args, **kwargs):
        super().on_train_batch_end(trainer, *args, **kwargs)
        task = self.train_progress_bar
        self.shown.append((int(task.completed), int(task.total)))


def test_epochs_before_the_last_are_whole():
    job = Job(steps=4, precision="32-true", trainer={"max_epochs": -1, "max_steps": 10})
    bar = Bar()
    make_trainer(job, callbacks=[bar], enable_progress_bar=True).fit(Net(job), data(job))
    assert bar.shown == [(n, 4) for n in (1, 2, 3, 4)] * 2 + [(1, 2), (2, 2)]


@pytest.mark.parametrize(("accumulate", "saved_after", "last"), [(1, None, 6), (2, None, 12), (2, 4, 12), (1, 3, 6)])
def test_the_last_batch_is_the_last_of_all(tmp_path, accumulate, saved_after, last):
    options = {"max_epochs": -1, "accumulate_grad_batches": accumulate}
    job = Job(steps=6, trainer=options, precision="32-true")
    path = None if saved_after is None else str(tmp_path / "half.ckpt")
    if path is not None:
        make_trainer(job, callbacks=[SaveAt(path, saved_after)]).fit(Net(job), data(job))
    bar = Bar()
    make_trainer(job, callbacks=[bar], enable_progress_bar=True).fit(Net(job), data(job), ckpt_path=path)
    assert bar.shown[-1] == (last, last)
