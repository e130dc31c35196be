"""Optimizers on sharded expert Parameters."""

from lightning_swiftmoe.optim.checks import check_optimizers, use_installed_parameters, use_original_parameters
from lightning_swiftmoe.optim.local_step import on_local_tensors

__all__ = ["check_optimizers", "on_local_tensors", "use_installed_parameters", "use_original_parameters"]
