"""The MoE layer and its parts."""

from lightning_swiftmoe.layers.moe import MoE, moe_layers

__all__ = ["MoE", "moe_layers"]
