"""Cost model and trace replay: what a placement policy would do on a cluster you do not have.

    from lightning_swiftmoe.simulate import Hardware, ModelShape, Scenario, Workload, generate, simulate

    trace = generate("drift", Workload(num_steps=100, num_experts=16, tokens=32768))
    result = simulate(trace, Scenario(model, hardware, slots_per_rank=4), ["static", "proportional"])
    result.write("outputs/simulation")

Numbers in, numbers out: no process group, no Lightning. Placements come from the very code that training runs.
"""

from lightning_swiftmoe.simulate.cost import PHASES, CostModel
from lightning_swiftmoe.simulate.generators import GENERATORS, Workload, generate
from lightning_swiftmoe.simulate.hardware import Coefficient, Efficiency, Hardware
from lightning_swiftmoe.simulate.load_trace import LoadTrace, load_trace
from lightning_swiftmoe.simulate.model import PAPER_MODELS, ModelShape
from lightning_swiftmoe.simulate.replay import BYTE_PHASES, Scenario, simulate
from lightning_swiftmoe.simulate.results import PolicyResult, Simulation, read_simulation
from lightning_swiftmoe.simulate.systems import ExactSplit, Oracle, System, resolve_system, surviving_replicas

__all__ = [
    "BYTE_PHASES",
    "GENERATORS",
    "PAPER_MODELS",
    "PHASES",
    "Coefficient",
    "CostModel",
    "Efficiency",
    "ExactSplit",
    "Hardware",
    "LoadTrace",
    "ModelShape",
    "Oracle",
    "PolicyResult",
    "Scenario",
    "Simulation",
    "System",
    "Workload",
    "generate",
    "load_trace",
    "read_simulation",
    "resolve_system",
    "simulate",
    "surviving_replicas",
]
