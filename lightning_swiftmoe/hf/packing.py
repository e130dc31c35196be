"""Whether conversations in one sequence would see each other, asked of the model itself.

transformers keeps them apart where positions begin again, if a model hands these to whoever makes its masks, and if
nothing but attention looks along a sequence. A few of its models do not, and say nothing.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch

from lightning_swiftmoe.hf._transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

_PROBE = "swiftmoe_mask_probe"
_RECURRENT = {"linear_attention", "mamba", "conv", "hybrid", "hybrid_sliding", "recurrent"}  # transformers' layer types
_seen: list[bool] = []  # by mask that a model asked for: may the third of four tokens look at the second?


def _mask_probe(*_: Any, mask_function: Any, **__: Any) -> None:
    first = torch.tensor(0)
    _seen.append(True)  # where the mask needs values that are not there, as of chunks
    _seen[-1] = bool(mask_function(first, first, torch.tensor(2), torch.tensor(1)))


def _no_attention(*_: Any, **__: Any) -> None:
    raise NotImplementedError("it is asked for its masks only")


AttentionMaskInterface.register(_PROBE, _mask_probe)
AttentionInterface.register(_PROBE, _no_attention)


def why_no_packing(model: PreTrainedModel) -> str | None:
    """The reason why conversations in one sequence would see each other; None: they do not.

    Asked are the masks of eager attention, SDPA and flex attention. Flash attention reads positions by itself.

    Args:
        model: on the meta device. It is of no use afterwards.
    """
    name = type(model).__name__
    types = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    if getattr(model, "_is_stateful", False) or types & _RECURRENT:
        return (
            f"{name} has layers with a state that runs along the sequence (linear attention, Mamba, convolutions), and "
            "one conversation would read what another has left there"
        )
    _seen.clear()
    model.set_attn_implementation(_PROBE)
    ids = torch.zeros(1, 4, dtype=torch.int64, device="meta")
    with suppress(Exception):  # of whatever comes behind the masks: positions have values, and nothing else has
        model(input_ids=ids, position_ids=torch.tensor([[0, 1, 0, 1]]), use_cache=False)
    if not _seen or any(_seen):
        return (
            f"{name} does not show, by the attention masks that it makes of positions which begin again, that one "
            "conversation would not see another"
        )
    return None
