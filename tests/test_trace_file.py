"""The file of a trace: what a killed writer leaves, what a resumed one cuts, and that plain numpy reads it."""

import gzip
import json
import zlib

import numpy as np
import pytest

from lightning_swiftmoe.simulate import load_trace
from lightning_swiftmoe.trace_file import TraceFile, read_trace

META = {"layers": ["a", "b"], "ranks": 2, "experts": 3, "top_k": 2, "tokens_per_rank": 4.0, "slots_per_rank": 3}


def chunk(steps, num_ranks=2, largest=9):
    """Arrays whose values tell their step."""
    steps = np.array(list(steps))
    return {
        "steps": steps,
        "counts": np.tile((steps % 9 + 1)[:, None, None, None], (1, 2, num_ranks, 3)),
        "replicas": np.full((len(steps), 2, 3), 2),
        "rank_load": np.stack([np.tile([step, largest], (2, 1)) for step in steps]),
    }


@pytest.fixture
def path(tmp_path):
    """Steps 1 to 12 in three chunks, whose integers need one, two and four bytes."""
    file = TraceFile(tmp_path / "trace.npy.gz")
    for first, largest in ((1, 9), (5, 300), (9, 70_000)):
        file.append(META, chunk(range(first, first + 4), largest=largest))
    return file.path


def steps_in(path):
    return read_trace(path)["steps"].tolist()


def test_what_is_written_is_read(path):
    trace = read_trace(path)
    assert trace["steps"].tolist() == [*range(1, 13)]
    assert trace["counts"].dtype == np.int32
    assert (trace["counts"] == (trace["steps"] % 9 + 1)[:, None, None, None]).all()
    assert trace["rank_load"][:, 1, 1].tolist() == [9] * 4 + [300] * 4 + [70_000] * 4
    assert (trace["replicas"] == 2).all()
    assert json.loads(str(trace["meta"])) == META
    loads = load_trace(path)
    assert (loads.counts == trace["counts"]).all()
    assert loads.top_k == 2


def test_plain_numpy_reads_it(path):
    with gzip.open(path) as file:
        meta = json.loads(str(np.load(file)))
        chunks = []
        while file.peek(1):
            chunks.append([np.load(file) for _ in range(4)])
    trace = read_trace(path)
    assert meta == META
    for name, parts in zip(("steps", "counts", "replicas", "rank_load"), zip(*chunks, strict=True), strict=True):
        np.testing.assert_array_equal(np.concatenate(parts), trace[name])


def test_wherever_the_last_chunk_was_torn_the_others_count(path):
    whole = path.read_bytes()
    second = len(whole) - len(last_member(whole))
    for size in range(second, len(whole)):
        path.write_bytes(whole[:size])
        assert steps_in(path) == [*range(1, 9)]
    path.write_bytes(whole[:7])
    with pytest.raises(ValueError, match="holds no step yet"):
        read_trace(path)


def last_member(content):
    """By zlib alone: gzip members follow each other."""
    while True:
        unpacker = zlib.decompressobj(31)
        unpacker.decompress(content)
        if not unpacker.unused_data:
            return content
        content = unpacker.unused_data


def test_damage_in_the_middle_is_an_error(path):
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 0xFF
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="damaged") as error:
        read_trace(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("last_step", [0, 1, 3, 4, 6, 8, 11, 12, 40])
@pytest.mark.parametrize("torn", [False, True])
def test_resuming_cuts_behind_the_checkpoint(path, last_step, torn):
    if torn:
        path.write_bytes(path.read_bytes()[:-1])
    had = 8 if torn else 12
    file = TraceFile(path)
    file.resume(last_step)
    kept = [*range(1, min(last_step, had) + 1)]
    assert not kept or steps_in(path) == kept
    file.append(META, chunk(range(last_step + 1, last_step + 3)))
    file.append(META, chunk([last_step + 3]))
    assert steps_in(path) == [*kept, *range(last_step + 1, last_step + 4)]
    assert [other.name for other in path.parent.iterdir()] == ["trace.npy.gz"]


def test_other_ranks_begin_a_new_file_beside_the_old_one(path):
    file = TraceFile(path)
    file.resume(6)
    file.append({**META, "ranks": 4}, chunk([7, 8], num_ranks=4))
    file.append({**META, "ranks": 4, "tokens_per_rank": 1.0}, chunk([9], num_ranks=4))
    assert steps_in(path) == [7, 8, 9]
    assert read_trace(path)["counts"].shape == (3, 2, 4, 3)
    assert steps_in(path.with_name("trace.until-6.npy.gz")) == [*range(1, 7)]


def test_a_run_from_the_start_replaces_the_file(path):
    file = TraceFile(path)
    file.check()
    assert steps_in(path) == [*range(1, 13)]
    file.append(META, chunk([1, 2]))
    assert steps_in(path) == [1, 2]


def test_a_damaged_tail_does_not_keep_a_run_from_resuming(path):
    """What a machine that lost its power may leave."""
    path.write_bytes(path.read_bytes() + bytes(100))
    file = TraceFile(path)
    file.resume(12)
    file.append(META, chunk([13]))
    assert steps_in(path) == [*range(1, 14)]


def test_something_else_is_not_continued(path):
    path.write_bytes(b"a letter")
    with pytest.raises(ValueError, match="is no trace"):
        TraceFile(path).resume(4)
    assert path.read_bytes() == b"a letter"
