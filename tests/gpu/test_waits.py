"""In a steady step the host never waits for the device; with NCCL once a layer, for the sizes of its exchanges."""

import pytest

from tests.gpu.cases import HOPPER, TRANSPORTS, GpuJob, fit
from tests.gpu.waits import ErrorsOnWaits, Quiet, profiled, summary

pytestmark = pytest.mark.gpu

STEPS, LAYERS = 3, 2
ALLOWED = {"symmetric": 0, "nccl": STEPS * LAYERS, "gloo": 0}


def make(module, transport, **kwargs):
    # Batches are there already: bringing them is the loader's business.
    shape = {"width": 64, "moe": HOPPER, "precision": "bf16-mixed", "batch": 512, "steps": 18}
    return GpuJob(transport=transport, module=module, on_device=True, **shape, **kwargs)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_waits_of_three_whole_steps(several, transport):
    for waits, num_events in several.run(profiled, make(Quiet, transport, policy="proportional")):
        assert num_events > 100
        assert len(waits) <= ALLOWED[transport], summary(waits)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_torch_itself_sees_no_wait_in_forward_and_backward(several, transport):
    several.run(fit, make(ErrorsOnWaits, transport))
