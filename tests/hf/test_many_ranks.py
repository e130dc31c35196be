"""One of 64 ranks starts on a model of 671 billion parameters: seconds, memory, and its exact share."""

import json
import time

import pytest

from tests.hf.many_ranks import RANKS, SLOTS
from tests.hf.paths import PYTHONPATH
from tests.processes import python

LAYERS, NUM_EXPERTS, WIDTH, HIDDEN = 58, 256, 7168, 2048  # of those that have experts


@pytest.mark.parametrize("rank", [0, RANKS - 1])
def test_deepseek_v3_starts_on_one_core(tmp_path, rank):
    began = time.monotonic()
    status, text = python("-m", "tests.hf.many_ranks", rank, cwd=tmp_path, env={"PYTHONPATH": PYTHONPATH})
    assert status == 0, text
    assert time.monotonic() - began < 60
    got = json.loads(text.splitlines()[-1])
    assert got["gib"] < 4
    expert = 3 * WIDTH * HIDDEN
    assert got["parameters"] == 671_026_404_352
    assert got["experts"] == LAYERS * NUM_EXPERTS * expert
    assert got["shards"] == got["experts"] // RANKS
    assert got["residents"] == LAYERS * SLOTS * expert
