"""No number of rows compiles anything once training runs."""

import pytest

from tests.gpu.cases import HOPPER, TRANSPORTS, GpuJob
from tests.gpu.compilations import Wandering, compiled_by_step

pytestmark = pytest.mark.gpu

STEPS = 200


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_nothing_compiles_after_set_up(several, precision, transport):
    moe = {**HOPPER, "bias_update_rate": 1e-3}
    job = GpuJob(width=64, moe=moe, precision=precision, transport=transport, module=Wandering, steps=STEPS, batch=1200)
    for compiled in several.run(compiled_by_step, job):
        late = [(step, kernel) for step, kernel in compiled if step >= 0]
        assert not late
