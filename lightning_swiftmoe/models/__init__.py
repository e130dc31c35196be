"""GPT-MoE: the decoder, its sizes and its LightningModule."""

from lightning_swiftmoe.models.gpt import GPT, GPTConfig, ParameterCount, count_parameters
from lightning_swiftmoe.models.module import GPTModule

__all__ = ["GPT", "GPTConfig", "GPTModule", "ParameterCount", "count_parameters"]
