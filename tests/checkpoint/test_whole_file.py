"""A name stands for a whole file at every moment, whatever ends a save."""

import errno
import multiprocessing
import os
import pickle
import random
import resource
import signal
import time
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

from lightning_swiftmoe import SwiftMoEStrategy
from lightning_swiftmoe.checkpoint.io import WholeCheckpointIO
from lightning_swiftmoe.checkpoint.reading import read_checkpoint
from lightning_swiftmoe.checkpoint.whole_file import is_unchanged, write_whole
from tests.jobs import Job, Net, data, our_trainer
from tests.ranks import run_ranks

FORK = multiprocessing.get_context("fork")


def checkpoint(step, size=500_000):
    return {"state_dict": {"w": torch.full((size,), float(step))}, "global_step": step}


def step_of(path):
    """Of a checkpoint that is read whole: every element is its step."""
    content = read_checkpoint(path)
    assert (content["state_dict"]["w"] == content["global_step"]).all()
    return content["global_step"]


def save_forever(path, told):
    io = WholeCheckpointIO()
    for step in range(10**9):
        io.save_checkpoint(checkpoint(step), path)
        told.send(step)


def test_killed_at_any_moment(tmp_path):
    """After each kill the name is of a whole file, at least as new as the last one that was reported."""
    path, moments, leftovers = tmp_path / "last.ckpt", random.Random(1), 0
    for _ in range(40):
        heard, told = FORK.Pipe(duplex=False)
        process = FORK.Process(target=save_forever, args=(path, told))
        process.start()
        for _ in range(moments.randrange(1, 3)):
            reported = heard.recv()
        time.sleep(moments.uniform(0, 0.01))  # into the next save
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert step_of(path) >= reported
        leftovers += len(list(tmp_path.glob(".last.ckpt.*.part")))
    assert leftovers, "no kill came during a save: nothing was tested"
    WholeCheckpointIO().save_checkpoint(checkpoint(1), path)
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_leftovers_of_other_names_stay(tmp_path):
    kept = [".last.ckpt.7.part", ".last.7.part", ".last.ckpt-v1.ckpt.7.part", "last.ckpt.part"]
    for name in [*kept, ".a-b.ckpt.7.part"]:
        (tmp_path / name).touch()
    WholeCheckpointIO().save_checkpoint(checkpoint(1), tmp_path / "a_b.ckpt")
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, "a_b.ckpt"])


def save_with_room_for(room_bytes, path, told):
    """The system itself refuses a longer file, in the middle of a write."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room_bytes, room_bytes))
    try:
        WholeCheckpointIO().save_checkpoint(checkpoint(2), path)
        told.send(None)
    except OSError as error:
        told.send((error.errno, str(error)))


@pytest.mark.parametrize("room_bytes", [0, 100, 50_000, 1_999_000, 2_001_000, 3_000_000])
def test_full_disk_keeps_the_last_one(tmp_path, room_bytes):
    path = tmp_path / "last.ckpt"
    WholeCheckpointIO().save_checkpoint(checkpoint(1), path)
    fits = path.stat().st_size <= room_bytes
    heard, told = FORK.Pipe(duplex=False)
    process = FORK.Process(target=save_with_room_for, args=(room_bytes, path, told))
    process.start()
    said = heard.recv()
    process.join()
    assert step_of(path) == (2 if fits else 1)
    assert os.listdir(tmp_path) == ["last.ckpt"]
    if fits:
        assert said is None
    else:
        assert said[0] == errno.EFBIG
        assert f"{path} was not saved (File too large) and is what it was before: make room there" in said[1]


def test_what_cannot_be_saved_keeps_the_last_one(tmp_path):
    """An error of the content's is told as it is, also while another one is handled."""
    path = tmp_path / "last.ckpt"
    WholeCheckpointIO().save_checkpoint(checkpoint(1), path)
    try:
        raise OSError(errno.ENOSPC, "an earlier one")
    except OSError:
        with pytest.raises((AttributeError, pickle.PicklingError)):
            WholeCheckpointIO().save_checkpoint({**checkpoint(2), "x": lambda: 0}, path)
    assert step_of(path) == 1
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_the_disk_has_it_before_the_name_does(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append((str(a), str(b))), replace(a, b)))
    path = tmp_path / "sub" / "last.ckpt"
    WholeCheckpointIO().save_checkpoint(checkpoint(1), path)
    part = str(tmp_path / "sub" / f".last.ckpt.{os.getpid()}.part")
    assert done == [part, (part, str(path)), str(path.parent)]


def fit_and_look(folder, save_last):
    """Train with checkpoints, and after every change of names look whether ``last`` is of a whole file."""
    looks, before = [], {name: getattr(os, name) for name in ("remove", "unlink", "replace", "rename", "symlink")}

    def looking(name):
        def change(*args, **kwargs):
            before[name](*args, **kwargs)
            looks.extend(read_checkpoint(last)["global_step"] for last in Path(folder).glob("last*"))

        return change

    for name in before:
        setattr(os, name, looking(name))
    saver = ModelCheckpoint(folder, every_n_train_steps=1, save_last=save_last)
    job = Job(steps=4, slots=5, callbacks=lambda: [saver])
    our_trainer(job, enable_checkpointing=True).fit(Net(job), data(job))
    return looks


@pytest.mark.parametrize("save_last", [True, "link"])
def test_last_never_names_a_broken_file(tmp_path, save_last):
    looks = run_ranks(1, fit_and_look, tmp_path, save_last)[0]
    assert len(set(looks)) == 4
    assert looks == sorted(looks)
    assert (tmp_path / "last.ckpt").is_symlink() == (save_last == "link")


def test_others_read_it(tmp_path):
    """``torch.load`` as it is, also of a part of the file at a time, and Lightning's own."""
    path = tmp_path / "a.ckpt"
    WholeCheckpointIO().save_checkpoint(checkpoint(3), path)
    contents = [
        torch.load(path),
        torch.load(path, weights_only=True, mmap=True),
        TorchCheckpointIO().load_checkpoint(path, weights_only=True),
        WholeCheckpointIO().load_checkpoint(path, weights_only=False),
    ]
    for content in contents:
        assert torch.equal(content["state_dict"]["w"], torch.full((500_000,), 3.0))


def test_a_plugin_of_the_users_wins():
    own = TorchCheckpointIO()
    assert trainer_with([own]).strategy.checkpoint_io is own
    assert type(trainer_with([]).strategy.checkpoint_io) is WholeCheckpointIO
    wrapped = trainer_with([AsyncCheckpointIO()]).strategy.checkpoint_io
    assert type(wrapped.checkpoint_io) is WholeCheckpointIO
    assert trainer_with([AsyncCheckpointIO(own)]).strategy.checkpoint_io.checkpoint_io is own


def trainer_with(plugins):
    return pl.Trainer(strategy=SwiftMoEStrategy(), accelerator="cpu", devices=1, logger=False, plugins=plugins)


def test_other_file_systems_are_lightnings():
    io = WholeCheckpointIO()
    io.save_checkpoint(checkpoint(5), "memory://folder/a.ckpt")
    assert io.load_checkpoint("memory://folder/a.ckpt")["global_step"] == 5
    io.remove_checkpoint("memory://folder/a.ckpt")
    with pytest.raises(FileNotFoundError):
        io.load_checkpoint("memory://folder/a.ckpt")


def test_a_flipped_bit_of_any_byte_is_noticed(tmp_path):
    path = tmp_path / "a.ckpt"
    write_whole(path, lambda file: torch.save({"a": torch.arange(3)}, file))
    whole = path.read_bytes()
    assert is_unchanged(path)
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        if is_unchanged(path) is not False:
            # Only the mark by which every reader finds the end of a zip file: nobody reads it without.
            assert len(whole) - 38 <= position < len(whole) - 34
            with pytest.raises(Exception, match="central directory"):
                torch.load(path)
