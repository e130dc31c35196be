"""Experts modules alone: those of the installed transformers, and small ones of every variant of its interface."""

import ast
import importlib
from collections.abc import Iterable
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.moe import use_experts_implementation

EXPERTS, WIDTH, HIDDEN = 5, 8, 12
FALSE = dict.fromkeys(("is_transposed", "has_bias", "has_post_expert_norm"), False)
DEFAULTS = {"is_concatenated": True, "has_gate": True, **FALSE}
Results = dict[str, Tensor]


class Anything:
    """Stands for the configuration of any model: small sizes by what a name says."""

    def __init__(self, activation: str) -> None:
        self.activation = activation
        self._experts_implementation = "eager"

    def __getattr__(self, name: str) -> Any:
        sizes = {"experts": EXPERTS, "intermediate": HIDDEN, "hidden_act": self.activation, "latent": None}
        sizes |= {"hidden": WIDTH, "size": WIDTH, "eps": 1e-6}
        for part, value in sizes.items():
            if part in name and not name.startswith("__"):
                return value
        if any(part in name for part in ("limit", "alpha", "softcap")):
            return 1.1
        raise AttributeError(name)


def decorated_classes() -> dict[str, type[nn.Module]]:
    """All classes of transformers that have the experts interface, by module and name."""
    found = {}
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        source = path.read_text()
        if "@use_experts_implementation" not in source:
            continue
        for node in ast.parse(source).body:
            if isinstance(node, ast.ClassDef) and any("use_experts" in ast.unparse(d) for d in node.decorator_list):
                module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
                found[f"{path.parent.name}.{node.name}"] = getattr(module, node.name)
    return found


def filled(experts: nn.Module, dtype: torch.dtype) -> nn.Module:
    """With weights large enough for a clamp to bite."""
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=rng))
    return experts.to(dtype)


def inputs(dtype: torch.dtype, tokens: int = 33, top_k: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, distinct experts of each, weights and a gradient of the output."""
    rng = torch.Generator().manual_seed(1)
    x, grad = (torch.randn(tokens, WIDTH, generator=rng).to(dtype) for _ in range(2))
    scores = torch.rand(tokens, EXPERTS, generator=rng)
    return x, scores.topk(top_k).indices, torch.rand(tokens, top_k, generator=rng).to(dtype), grad


def run(experts: nn.Module, implementation: str, x: Tensor, index: Tensor, weights: Tensor, grad: Tensor) -> Results:
    """The output and all gradients, by name."""
    experts.config._experts_implementation = implementation
    experts.zero_grad()
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    y = experts(x, index, weights)
    y.backward(grad.to(y.dtype))
    parameters = {name: parameter.grad.clone() for name, parameter in experts.named_parameters()}
    return {"y": y.detach(), "hidden_states": x.grad, "top_k_weights": weights.grad, **parameters}


def errors(got: Results, want: Results) -> dict[str, float]:
    """Relative, by name."""
    assert got.keys() == want.keys()
    return {
        name: float((got[name].double() - want[name].double()).norm() / want[name].double().norm().clamp_min(1e-30))
        for name in want
    }


def make(act: Any = F.silu, gate: Any = None, config: Any = None, **flags: bool) -> nn.Module:
    """A module of the variant that ``flags`` name (the arguments of the decorator).

    Its eager forward goes through dense products of every token with every expert.

    Args:
        act: ``act_fn``.
        gate: ``_apply_gate``, where it is not the default.
        config: of the model it is for; None: for none.
        flags: arguments of the decorator.
    """
    flags = {name: flag for name, flag in flags.items() if flag is not DEFAULTS.get(name)}
    new = flags.keys() - signature(use_experts_implementation).parameters.keys()
    if new:
        pytest.skip(f"this transformers has no {', '.join(new)}")
    gated, transposed = flags.get("has_gate", True), flags.get("is_transposed", False)
    up_name, columns = ("gate_up_proj", 2 * HIDDEN) if gated else ("up_proj", HIDDEN)

    class Experts(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.num_experts = EXPERTS
            self.act_fn = act
            shapes = {up_name: (columns, WIDTH), "down_proj": (WIDTH, HIDDEN)}
            for name, (out, into) in shapes.items():
                shape = (into, out) if transposed else (out, into)
                self.register_parameter(name, nn.Parameter(torch.empty(EXPERTS, *shape)))
                if flags.get("has_bias"):
                    self.register_parameter(f"{name}_bias", nn.Parameter(torch.empty(EXPERTS, out)))
            if flags.get("has_post_expert_norm"):
                self.post_expert_norm = nn.LayerNorm(WIDTH)

        def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            def linear(rows: Tensor, name: str) -> Tensor:
                weight = getattr(self, name)
                out = rows @ (weight if transposed else weight.mT)
                return out + getattr(self, f"{name}_bias").unsqueeze(1) if flags.get("has_bias") else out

            pre = linear(x.expand(EXPERTS, *x.shape), up_name)
            hidden = self._apply_gate(pre) if gated else self.act_fn(pre)
            out = linear(hidden, "down_proj")
            if flags.get("has_post_expert_norm"):
                out = self.post_expert_norm(out)
            chosen = F.one_hot(torch.where(index < 0, EXPERTS, index), EXPERTS + 1)[..., :EXPERTS].to(x.dtype)
            return torch.einsum("tke,tk,etd->td", chosen, weights.to(x.dtype), out)

    if gate is not None:
        Experts._apply_gate = gate
    config = config or SimpleNamespace(_experts_implementation="eager")
    return use_experts_implementation(**flags)(Experts)(config)


class Block(nn.Module):
    """A router that takes the two best, and experts; every third token has one choice less."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.experts = experts

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        weights, index = self.router(rows).softmax(dim=-1).topk(2)
        index = index.clone()
        index[::3, 1] = EXPERTS
        return x + self.experts(rows, index, weights).view_as(x)


class ModelOfVariants(transformers.PreTrainedModel):
    """Blocks with experts of one variant each, between an embedding and a head."""

    config_class = transformers.PretrainedConfig

    def __init__(self, variants: Iterable[dict[str, Any]]) -> None:
        super().__init__(transformers.PretrainedConfig(vocab_size=40, initializer_range=0.02))
        self.embed = nn.Embedding(40, WIDTH)
        self.blocks = nn.ModuleList(Block(make(config=self.config, **variant)) for variant in variants)
        self.head = nn.Linear(WIDTH, 40)
        self.post_init()

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return SimpleNamespace(logits=self.head(x))
