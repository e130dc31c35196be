"""What we take of transformers, all of it public; imported here and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_HINT = "pip install 'lightning-swiftmoe[hf]'"
_INTERFACE = "transformers.integrations.moe"

try:
    import transformers
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise ImportError(f"lightning_swiftmoe.hf needs the transformers package: {_HINT}") from error

try:
    from transformers.activations import ACT2FN
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation
    from transformers.modeling_utils import PreTrainedModel
except ImportError as error:
    if error.name != _INTERFACE:
        raise
    raise ImportError(
        f"lightning_swiftmoe.hf needs transformers >= 5.17, got {transformers.__version__}, which has no experts "
        f"interface: {_HINT}"
    ) from error

from safetensors import safe_open  # noqa: E402
from transformers import (  # noqa: E402
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
)
from transformers.conversion_mapping import get_model_conversion_mapping  # noqa: E402
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key  # noqa: E402
from transformers.utils.logging import (  # noqa: E402
    disable_progress_bar,
    enable_progress_bar,
    is_progress_bar_enabled,
)

__all__ = [
    "ACT2FN",
    "ALL_EXPERTS_FUNCTIONS",
    "AttentionInterface",
    "AttentionMaskInterface",
    "AutoConfig",
    "AutoModelForCausalLM",
    "AutoTokenizer",
    "PreTrainedModel",
    "WeightConverter",
    "WeightRenaming",
    "get_model_conversion_mapping",
    "rename_source_key",
    "safe_open",
    "use_experts_implementation",
    "without_progress_bars",
]


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Lightning has one of its own; several ranks would write into each other's."""
    enabled = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            enable_progress_bar()
