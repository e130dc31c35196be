"""What is hidden behind computing, against a clock that walks through the layers."""

import numpy as np
import pytest

from lightning_swiftmoe.simulate import Hardware, ModelShape, Scenario, Workload, generate, simulate
from lightning_swiftmoe.simulate.overlap import hidden_s, two_stages_s
from lightning_swiftmoe.simulate.results import overlapped_ms

# A fast device with a slow network: 4 ranks in nodes of their own.
SLOW_NETWORK = Hardware("slow", 300, 2000, 80, 32, 10, 5, gpus_per_node=1, num_nodes=4)
MODEL = ModelShape(dim=64, ffn_dim=256, num_layers=3, num_moe_layers=3, num_experts=6, top_k=2)


def a_step(forward_s, backward_s, weight_s, gradient_s):
    """Seconds of a forward and a backward by a clock for the network and one for computing."""
    sent = done = 0.0
    for compute, exchange in zip(forward_s, weight_s, strict=True):
        sent += exchange
        done = max(done, sent) + compute
    forward, sent, done = done, 0.0, 0.0
    for compute, exchange in reversed(list(zip(backward_s, gradient_s, strict=True))):
        done += compute
        sent = max(done, sent) + exchange
    return forward + sent


@pytest.mark.parametrize("slow", [0.1, 1.0, 10.0])
def test_a_clock_says_the_same(slow):
    rng = np.random.default_rng(0)
    forward_s, backward_s = rng.random((2, 50, 7))
    weight_s, gradient_s = slow * rng.random((2, 50, 7))
    hidden = hidden_s(forward_s, backward_s, weight_s, gradient_s)
    parts = (forward_s, backward_s, weight_s, gradient_s)
    for step in range(50):
        one_by_one = sum(float(part[step].sum()) for part in parts)
        assert one_by_one - hidden[step] == pytest.approx(a_step(*(part[step] for part in parts)))


def test_by_hand():
    """Three layers of 2 s behind exchanges of 1 s wait for the first; behind exchanges of 5 s for all."""
    compute = np.full((1, 3), 2.0)
    assert two_stages_s(np.full((1, 3), 1.0), compute).tolist() == [7.0]
    assert two_stages_s(np.full((1, 3), 5.0), compute).tolist() == [17.0]


def result_of(system, hardware=SLOW_NETWORK, **scenario):
    work = Workload(5, scenario.pop("num_layers", 3), 6, tokens=4800, top_k=2, num_ranks=4, skew=1.0)
    found = simulate(generate("zipf", work), Scenario(MODEL, hardware, 2, **scenario), [system])
    return found.results[system]


def test_steps_of_ours():
    """Most of what a slow network takes cannot be hidden, and something always can: behind computing alone."""
    result = result_of("balanced")
    exchanges = result.phase_s["weight"] + result.phase_s["gradient"]
    # The dense phase has its optimizer and its all-reduce too.
    computing = 3 * result.phase_s["experts"] + result.phase_s["dense"]
    assert (result.hidden_s > 0).all()
    assert (result.hidden_s <= np.minimum(exchanges, computing)).all()
    assert result.summary()["mean_overlapped_step_s"] == pytest.approx((result.step_s - result.hidden_s).mean())


def test_a_device_that_computes_in_no_time_hides_nothing():
    """Every exchange of a step takes its time on the same network."""
    instant = Hardware("instant", 1e12, 1e12, 80, 32, 10, 5, gpus_per_node=1, num_nodes=4)
    result = result_of("balanced", hardware=instant)
    exchanges = sum(result.phase_s[phase] for phase in ("dispatch", "combine", "weight", "gradient"))
    assert (result.overlapped_step_s >= exchanges).all()
    assert (result.hidden_s < 1e-6 * exchanges).all()


@pytest.mark.parametrize("system", ["static", "swiftmoe_published"])
def test_others_are_not_said_to_hide_anything(system):
    assert not result_of(system).hidden_s.any()


def test_one_layer_hides_nothing():
    """What it computes needs its own weights, and makes its own gradients."""
    result = result_of("balanced", num_layers=1)
    assert not result.hidden_s.any()
    assert overlapped_ms(result, ".2f") == "-"


def test_shards_behind_pcie_are_not_said_to_be_hidden():
    assert not result_of("balanced", offload=True).hidden_s.any()
