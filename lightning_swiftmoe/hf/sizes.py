"""How large a model of transformers is, from its configuration alone: no weight is read, and none is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_swiftmoe.hf._transformers import AutoConfig, AutoModelForCausalLM
from lightning_swiftmoe.hf.checks import projections
from lightning_swiftmoe.hf.layer import ExpertsLayer, check_expert_layers, expert_layers
from lightning_swiftmoe.layers.experts import expert_parameters
from lightning_swiftmoe.layers.model_sizes import ModelSizes

# Of OLMoE, whose norms keep fp32 copies; an assumption for all others.
_BLOCK_BYTES = 49
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts")  # what configurations call it


def read_sizes(folder: str | Path) -> ModelSizes:
    """Of the model that the ``config.json`` in a folder describes, built on the meta device.

    Args:
        folder: as ``from_pretrained`` takes it, or the file itself. Nothing is downloaded.

    Raises:
        ValueError: no such file, a model without experts, with experts that ranks cannot share, or with layers of
            different experts.
    """
    path = Path(folder)
    file = path if path.suffix == ".json" else path / "config.json"
    if not file.is_file():
        raise ValueError(f"there is no {file}: give the folder of a model of transformers, where its config.json is")
    config = AutoConfig.from_pretrained(file, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sizes_of(model)


def sizes_of(model: nn.Module) -> ModelSizes:
    """Of a model of transformers, whatever device it is on.

    Raises:
        ValueError: as ``read_sizes``.
    """
    check_expert_layers(model)
    layers = list(expert_layers(model).values())
    text = model.config.get_text_config()  # type: ignore[operator, union-attr]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no experts, so there is nothing to place")
    different = {_of_layer(layer) for layer in layers}
    if len(different) > 1:
        kinds = ", ".join(f"{experts} of {width} x {hidden}" for experts, width, hidden, _ in sorted(different))
        raise ValueError(f"layers of {type(model).__name__} differ in their experts: got {kinds}, expected one kind")
    ((num_experts, width, expert_width, gated),) = different
    in_experts = {param for layer in layers for param in expert_parameters(layer.experts).values()}
    return ModelSizes(
        num_layers=text.num_hidden_layers,
        num_moe_layers=len(layers),
        num_experts=num_experts,
        top_k=_top_k(text),
        width=width,
        expert_width=expert_width,
        gated=gated,
        vocab_size=text.vocab_size,
        num_params=sum(param.numel() for param in model.parameters()),
        num_expert_params=sum(param.numel() for param in in_experts),
        max_seq_len=getattr(text, "max_position_embeddings", None),
        block_bytes=_BLOCK_BYTES,
    )


def _of_layer(layer: ExpertsLayer) -> tuple[int, int, int, bool]:
    weights = projections(layer.experts.module)
    return layer.num_experts, weights.width, weights.hidden, layer.experts.up_name == "gate_up_proj"


def _top_k(config: Any) -> int:
    for name in _TOP_K:
        found = getattr(config, name, None)
        if isinstance(found, int):
            return found
    raise ValueError(f"{type(config).__name__} does not say how many experts a token takes, by {', '.join(_TOP_K)}")
