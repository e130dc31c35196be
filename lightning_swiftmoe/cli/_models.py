"""From a composed config to the configuration of its model."""

from __future__ import annotations

from typing import Any

from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from lightning_swiftmoe.layers.model_sizes import DescribedModel
from lightning_swiftmoe.models import GPTConfig


def model_of(config: DictConfig) -> DescribedModel:
    """As the module that trains it takes it: its ``config_class``."""
    module: Any = get_class(config.module._target_)
    fields: Any = OmegaConf.to_container(config.model, resolve=True, throw_on_missing=True)
    return module.config_class(**fields)


def gpt_of(config: DictConfig) -> GPTConfig:
    """For commands that know our GPT alone.

    Raises:
        ValueError: it is another model.
    """
    model = model_of(config)
    if not isinstance(model, GPTConfig):
        raise ValueError(
            "this runs our own GPT, of whatever sizes: choose a file as model=gpt_small; models of transformers are "
            "timed by swiftmoe bench step 'peers=[ours,fsdp2]'"
        )
    return model
