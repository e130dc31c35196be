"""Language models with experts and their LightningModules: our GPT-MoE, and models of transformers in a folder."""

from lightning_swiftmoe.models.folder_model import FolderModel
from lightning_swiftmoe.models.gpt import GPT, GPTConfig, ParameterCount, count_parameters
from lightning_swiftmoe.models.module import GPTModule

__all__ = ["GPT", "FolderModel", "GPTConfig", "GPTModule", "ParameterCount", "count_parameters"]
