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
for _name, _start in _START_METHODS.items():
    _about = f"SwiftMoE expert parallelism, ranks started by {_start}"
    register_strategy(_name, SwiftMoEStrategy, _about, start_method=_start)
refuse_other_namespace(list(_START_METHODS))
