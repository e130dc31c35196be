"""A causal language model from a folder, and into one: nothing is downloaded."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_swiftmoe.hf._transformers import AutoModelForCausalLM, PreTrainedModel, without_progress_bars
from lightning_swiftmoe.hf.checks import NAME
from lightning_swiftmoe.hf.saved_weights import meta_model, read_config
from lightning_swiftmoe.hf.tokenizer import VOCABULARIES

# What a folder has beside a configuration and weights.
_COMPANIONS = (
    *(*VOCABULARIES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt"),
    *("chat_template*", "generation_config.json"),
)


def has_weights(folder: str | Path) -> bool:
    """Whether there are safetensors files."""
    return any(Path(folder).glob("*.safetensors"))


def build_model(
    folder: str | Path,
    *,
    saved: bool,
    on_meta: bool,
    attention: str = "sdpa",
    checkpoint_activations: bool = False,
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """The model, in training mode, with its experts on our kernels; on the host, whatever device is the default.

    Args:
        folder: with a ``config.json`` and, where ``saved``, safetensors files.
        saved: its weights are those of the folder; else they are drawn, by torch's generator.
        on_meta: it has no weights until a strategy reads or draws them.
        attention: transformers' ``attn_implementation``.
        checkpoint_activations: compute activations again in the backward.
        dtype: of its weights; None: torch's default.

    Raises:
        ValueError: files are missing, weights are quantised or of another model, or there is no such attention.
    """
    options: dict[str, Any] = {
        "attn_implementation": attention,
        "experts_implementation": NAME,
        "dtype": dtype or torch.get_default_dtype(),
    }
    path = Path(folder)
    if saved and on_meta:
        model = meta_model(path, **options)
    elif saved:
        read_config(path)
        with without_progress_bars(), torch.device("cpu"):
            model = AutoModelForCausalLM.from_pretrained(path, local_files_only=True, use_safetensors=True, **options)
    else:
        with torch.device("meta" if on_meta else "cpu"):
            model = AutoModelForCausalLM.from_config(read_config(path), **options)
    if checkpoint_activations:
        # Its newer name, and its older one.
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    return model.train()


def switch_auxiliary_loss(model: PreTrainedModel, factor: float | None = None) -> float:
    """Let forwards return the auxiliary loss that balances experts, where there is one.

    Args:
        model: of any family.
        factor: on that loss; 0: none; None: as the model's configuration says.

    Returns:
        The factor; 0 where the model has no auxiliary loss.

    Raises:
        ValueError: a factor for a model without one.
    """
    config = model.config.get_text_config()
    own = getattr(config, "router_aux_loss_coef", None)
    if own is None or not hasattr(config, "output_router_logits"):
        if factor:
            raise ValueError(f"aux_loss_coef = {factor}, but {type(model).__name__} has none: leave it out")
        return 0.0
    chosen = float(own if factor is None else factor)
    config.router_aux_loss_coef, config.output_router_logits = chosen, chosen != 0
    return chosen


def save_model(state: Mapping[str, Tensor], source: str | Path, folder: str | Path) -> None:
    """A folder that ``from_pretrained`` takes, in the layout of the hub, with the source's tokenizer.

    Args:
        state: all weights, whole, by the model's names.
        source: the folder that the model came from.
        folder: to write to; made where it is missing.
    """
    source, folder = Path(source), Path(folder)
    dtype = next(tensor.dtype for tensor in state.values() if tensor.is_floating_point())
    with torch.device("meta"):  # for its names and configuration, as nobody has changed them
        model = AutoModelForCausalLM.from_config(read_config(source), dtype=dtype)
    with without_progress_bars():
        model.save_pretrained(folder, state_dict=dict(state))
    for pattern in _COMPANIONS:
        for path in sorted(source.glob(pattern)):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
