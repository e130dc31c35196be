"""Traces: what is refused and why, and generators that add up."""

import json

import numpy as np
import pytest

from lightning_swiftmoe.simulate import GENERATORS, LoadTrace, Workload, generate, load_trace


def arrays(**changes):
    good = {"counts": np.ones((2, 1, 2, 3), dtype=np.int64), "steps": np.arange(2), "meta": np.array('{"top_k": 1}')}
    return {**good, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"counts": np.ones((2, 3), dtype=int)}, r"must be \[steps, layers, ranks, experts\], got shape \(2, 3\)"),
        ({"counts": np.ones((0, 1, 2, 3), dtype=int), "steps": np.arange(0)}, "got shape"),
        ({"counts": np.ones((2, 1, 2, 3))}, "must be integers, got float64"),
        ({"counts": np.full((2, 1, 2, 3), -4)}, r"must not be negative, got -4 at .* \(0, 0, 0, 0\)"),
        (
            {"counts": np.zeros((2, 1, 2, 3), dtype=int)},
            "all zero in 2 of 2 steps and layers, first at step 0, layer 0",
        ),
        ({"steps": np.array([4, 4])}, "ascending"),
        ({"steps": np.arange(3)}, "2 ascending numbers"),
        ({"meta": np.array("{")}, "meta must be a JSON string"),
        ({"meta": np.array("[1]")}, "meta must be a JSON object"),
        ({"meta": np.array('{"top_k": 0}')}, "top_k must be a positive integer, got 0"),
    ],
)
def test_bad_traces_are_refused_in_one_line(tmp_path, changes, message):
    np.savez(tmp_path / "trace.npz", **arrays(**changes))
    with pytest.raises(ValueError, match=message) as error:
        load_trace(tmp_path / "trace.npz")
    assert "\n" not in str(error.value)


def test_files_that_are_no_traces(tmp_path):
    with pytest.raises(ValueError, match="no trace at"):
        load_trace(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(ValueError, match=r"is no \.npz trace"):
        load_trace(tmp_path / "text.npz")
    np.savez(tmp_path / "short.npz", counts=np.ones((1, 1, 1, 1), dtype=int))
    with pytest.raises(ValueError, match="lacks steps, meta"):
        load_trace(tmp_path / "short.npz")


def test_round_trip(tmp_path):
    trace = generate("zipf", Workload(3, 2, 4, tokens=80, top_k=2, num_ranks=4))
    trace.save(tmp_path / "t.npz")
    again = load_trace(tmp_path / "t.npz")
    assert (again.counts == trace.counts).all()
    assert again.top_k == 2
    with np.load(tmp_path / "t.npz") as file:
        assert json.loads(str(file["meta"]))["tokens_per_rank"] == 20


@pytest.mark.parametrize("name", sorted(GENERATORS))
@pytest.mark.parametrize(("top_k", "num_ranks"), [(1, 1), (2, 1), (2, 4)])
def test_generators_add_up_and_repeat(name, top_k, num_ranks):
    work = Workload(20, 2, 8, tokens=400, top_k=top_k, num_ranks=num_ranks, seed=3)
    trace = generate(name, work)
    assert (trace.counts == generate(name, work).counts).all()
    assert (trace.counts.sum(axis=(2, 3)) == 400 * top_k).all()
    if num_ranks == 1:  # no noise: a token cannot choose an expert twice
        assert trace.counts.max() <= 400 + 1


def test_shapes_of_the_generators():
    work = Workload(40, 1, 8, tokens=8000, skew=1.0)
    assert (generate("balanced", work).counts == 1000).all()
    assert generate("one_hot", work).counts.max(axis=3).min() == 8000
    zipf = np.sort(generate("zipf", work).counts[0, 0, 0])[::-1]
    assert zipf[0] / zipf[3] == pytest.approx(4, rel=0.01)
    hottest = generate("hotspot", work).counts[:, 0, 0].argmax(axis=1)
    assert np.count_nonzero(np.diff(hottest)) == 3
    switched = generate("switch", Workload(40, 1, 8, tokens=8000, pace=3.0)).counts[:, 0, 0]
    assert (np.abs(np.diff(switched, axis=0)).sum(axis=1) > 0).sum() == 3
    with pytest.raises(ValueError, match="unknown generator 'nope'; there are balanced"):
        generate("nope", work)
    with pytest.raises(ValueError, match="do not divide evenly"):
        Workload(tokens=10, num_ranks=3)


def test_trace_needs_integers_that_count():
    with pytest.raises(ValueError, match="top_k"):
        LoadTrace(np.ones((1, 1, 1, 2), dtype=int), np.arange(1), 0)
