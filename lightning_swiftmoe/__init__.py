"""Mixture-of-Experts training on PyTorch Lightning: replicas follow the load, optimizer state never moves.

Importing this package makes ``Trainer(strategy="swiftmoe")`` known to Lightning.
"""

from lightning_swiftmoe._compat import refuse_other_namespace, register_strategy
from lightning_swiftmoe.callback import ExpertRebalancer
from lightning_swiftmoe.layers import MoE
from lightning_swiftmoe.placement import Placement, PlacementPolicy, register_policy
from lightning_swiftmoe.strategy import SwiftMoEStrategy
from lightning_swiftmoe.weight_ema import WeightEMA

__version__ = "0.1.0"

__all__ = [
    "ExpertRebalancer",
    "MoE",
    "Placement",
    "PlacementPolicy",
    "SwiftMoEStrategy",
    "WeightEMA",
    "register_policy",
]

_START_METHODS = {
    "swiftmoe": "popen",
    "swiftmoe_spawn": "spawn",
    "swiftmoe_fork": "fork",
    "swiftmoe_notebook": "fork",
}
_UNUSED = "_find_unused_parameters_true"  # as Lightning's names of DDP have it
for _name, _start in _START_METHODS.items():
    _about = f"SwiftMoE expert parallelism, ranks started by {_start}"
    register_strategy(_name, SwiftMoEStrategy, _about, start_method=_start)
    _about += "; parameters outside of experts may have no gradient"
    register_strategy(_name + _UNUSED, SwiftMoEStrategy, _about, start_method=_start, find_unused_parameters=True)
refuse_other_namespace([name + ending for name in _START_METHODS for ending in ("", _UNUSED)])
