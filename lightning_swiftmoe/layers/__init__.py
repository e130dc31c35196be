"""The MoE layer and its parts."""

from lightning_swiftmoe.layers.moe import MoE

__all__ = ["MoE"]
