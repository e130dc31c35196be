"""Optimizers on sharded expert Parameters."""

from lightning_swiftmoe.optim.checks import (
    check_optimizers,
    check_steps_on_shards,
    use_installed_parameters,
    use_original_parameters,
)
from lightning_swiftmoe.optim.local_step import on_local_tensors
from lightning_swiftmoe.optim.scaler import holds_scaled, shared_scaler, unscale

__all__ = [
    "check_optimizers",
    "check_steps_on_shards",
    "holds_scaled",
    "on_local_tensors",
    "shared_scaler",
    "unscale",
    "use_installed_parameters",
    "use_original_parameters",
]
