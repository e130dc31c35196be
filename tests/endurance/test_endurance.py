"""Nothing grows while training goes on, in short; ``python -m tests.endurance`` takes its time."""

import re
import threading
from pathlib import Path

import numpy as np
import pytest

from tests.endurance.fits import long_fit, many_fits
from tests.endurance.usage import Usage, faults_of, growth
from tests.ranks import run_ranks

MIB = 2**20


def noisy(leak_bytes, seed=0):
    """A process of 300 MiB, sampled 100 times, with the noise of an allocator."""
    noise = np.random.default_rng(seed).uniform(-MIB, MIB, 100)
    return [Usage(int(300 * MIB + noise[n] + n * leak_bytes), 20, 5) for n in range(100)]


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_no_growth(seed):
    assert faults_of(noisy(0, seed), 0.01) == []


def test_a_leak_is_growth():
    """500 bytes a step, 100 steps between samples."""
    (fault,) = faults_of(noisy(50_000), 0.01)
    assert re.fullmatch(r"resident memory grew by 1\.[3-6]\d%, more than 1\.00%", fault)


def test_what_is_held_to_begin_with_is_no_growth():
    samples = [Usage(100 * MIB, 3, 1) for _ in range(10)] + noisy(0)[:90]
    assert faults_of(samples, 0.01) == []


@pytest.mark.parametrize(("files", "threads", "fault"), [(21, 5, "20 files became 21"), (20, 4, "5 threads became 4")])
def test_files_and_threads_must_be_the_same(files, threads, fault):
    assert faults_of([*noisy(0), Usage(300 * MIB, files, threads)], 0.01) == [fault]


def test_growth_is_of_a_line():
    assert growth([200, 201, 202, 203, 204]) == pytest.approx(0.02)
    with pytest.raises(ValueError, match="two values"):
        growth([1])


def test_a_sample_sees_what_this_process_holds(tmp_path):
    before = Usage.now()
    ends = threading.Event()
    thread = threading.Thread(target=ends.wait)
    thread.start()
    with (tmp_path / "open").open("w"):
        held = np.ones(8 * MIB)
        during = Usage.now()
    ends.set()
    thread.join()
    assert (during.files, during.threads) == (before.files + 1, before.threads + 1)
    assert during.rss_bytes - before.rss_bytes > 0.9 * held.nbytes


def short(folder):
    return long_fit(folder, 100, save_every=50, sample_every=10), many_fits(folder, 6, 2)


@pytest.mark.exhaustive
@pytest.mark.distributed
def test_nothing_grows(tmp_path):
    """Process groups among it, whose sockets are files. Memory has not settled after so little."""
    for of_steps, of_fits in run_ranks(2, short, Path(tmp_path), timeout_s=150):
        assert faults_of(of_steps, 0.05) == []
        assert faults_of(of_fits, 0.05) == []
