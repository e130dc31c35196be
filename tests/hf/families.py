"""Tiny causal language models of the families that differ in their experts or routers."""

import torch
import transformers
from torch import Tensor

_COMMON = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_QWEN = {"head_dim": 8, "moe_intermediate_size": 12, "num_experts": 6, "num_experts_per_tok": 2}
_LOCAL = {"intermediate_size": 12, "num_local_experts": 6, "num_experts_per_tok": 2}

# Name of the configuration and what is special, beside the common sizes.
FAMILIES = {
    "mixtral": ("MixtralConfig", {**_LOCAL, "output_router_logits": True}),  # with its auxiliary loss
    "olmoe": ("OlmoeConfig", {"intermediate_size": 12, "num_experts": 6, "num_experts_per_tok": 3}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {**_QWEN, "intermediate_size": 24, "norm_topk_prob": True, "output_router_logits": True},
    ),
    "qwen3_5_moe": (
        "Qwen3_5MoeTextConfig",
        {
            **_QWEN,
            "shared_expert_intermediate_size": 12,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "deepseek_v3": (  # shared experts, groups of experts, a bias for the choice, a dense first layer
        "DeepseekV3Config",
        {
            "intermediate_size": 24,
            "moe_intermediate_size": 12,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 1,
            "num_hidden_layers": 3,
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
            "num_mtp_layers": 0,
        },
    ),
    "gpt_oss": (
        "GptOssConfig",
        # A limit that many values reach.
        {**_LOCAL, "head_dim": 8, "swiglu_limit": 0.5, "layer_types": ["full_attention", "sliding_attention"]},
    ),
    "granitemoe": ("GraniteMoeConfig", {**_LOCAL, "residual_multiplier": 0.5, "hidden_act": "gelu_pytorch_tanh"}),
    "nemotron_h": (  # no gate; a latent width of the experts
        "NemotronHConfig",
        {
            "num_hidden_layers": None,  # as many as there are types
            "layers_block_type": ["moe", "attention", "moe"],
            "head_dim": 8,
            "intermediate_size": 24,
            "moe_intermediate_size": 12,
            "moe_shared_expert_intermediate_size": 12,
            "moe_latent_size": 8,
            "n_routed_experts": 6,
            "num_experts_per_tok": 2,
            "use_mamba_kernels": False,
        },
    ),
}

# Of models and of experts, as the kernels for GPUs want them.
_WIDE = {"hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 128}


def config_of(family: str, wide: bool = False):
    """Its configuration; of one that this version of transformers lacks, None."""
    name, special = FAMILIES[family]
    settings = {name: value for name, value in {**_COMMON, **special}.items() if value is not None}
    if wide:
        settings |= {name: value for name, value in _WIDE.items() if name in settings}
    return getattr(transformers, name)(**settings) if hasattr(transformers, name) else None


def model_of(family: str, implementation: str, dtype: torch.dtype, seed: int = 0, config=None):
    """Weights large enough for experts to matter, biases of routers included; the same for every implementation."""
    config = config or config_of(family)
    options = {"experts_implementation": implementation, "attn_implementation": "eager"}
    model = transformers.AutoModelForCausalLM.from_config(config, **options)
    rng = torch.Generator().manual_seed(seed)
    scale = 0.3 * (_COMMON["hidden_size"] / config.hidden_size) ** 0.5
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point() and (tensor.requires_grad or "bias" in name):
                noise = torch.randn(tensor.shape, generator=rng)
                tensor.copy_(1 + 0.1 * noise if "norm" in name and "weight" in name else scale * noise)
    return model.to(dtype).train()


def tokens_of(model, shape: tuple[int, int] = (3, 13)) -> Tensor:
    """Random ids, no special ones."""
    return torch.randint(3, model.config.vocab_size, shape, generator=torch.Generator().manual_seed(5))


def loss_and_gradients(model, ids: Tensor) -> dict[str, Tensor]:
    """By name; a Parameter without a gradient has none here."""
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}
