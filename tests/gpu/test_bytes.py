"""Bytes counted on GPUs equal the closed formulas; as tests/strategy/test_bytes.py on the host."""

import pytest

from lightning_swiftmoe.placement import EvenShards
from tests.gpu.cases import HOPPER, TRANSPORTS, GpuJob, fit
from tests.gpu.rank_pool import NUM_RANKS

pytestmark = pytest.mark.gpu

FLOAT, COUNT = 4, 8  # bytes
MATRICES = {(64, 128): [(256, 64), (64, 128)], (6, 5): [(5, 6), (6, 5)]}


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(("width", "ffn"), MATRICES)
def test_closed_formulas(several, width, ffn, transport):
    moe = HOPPER if ffn == 128 else {"ffn_size": ffn}
    cuts = [EvenShards(*matrix, NUM_RANKS) for matrix in MATRICES[width, ffn]]
    results = several.run(fit, GpuJob(width=width, moe=moe, transport=transport))
    for rank, outcome in enumerate(results):
        others = sum(cut.num_elements - cut.size(rank) for cut in cuts)
        mine = sum(cut.size(rank) for cut in cuts)
        for step in outcome.steps[1:-1]:
            residents = [[layer.placement.residents(j).size for j in range(NUM_RANKS)] for layer in step.layers]
            sent = {phase: traffic.sent_bytes for phase, traffic in step.traffic.items()}
            assert sent["gradient"] == sum(counts[rank] * others * FLOAT for counts in residents)
            # Sent when the step began, to where the one before it put the experts.
            assert sent["weight"] == sum((sum(counts) - counts[rank]) * mine * FLOAT for counts in residents)
            assert sent["load"] == len(step.layers) * 5 * COUNT * (NUM_RANKS - 1)
            # Optimizer state never moves: nothing else is sent between two steps.
            assert sent["migration"] == sent["setup"] == sent["checkpoint"] == 0
