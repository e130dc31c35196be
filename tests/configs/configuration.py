"""What a random training is made of, and how one is drawn."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import hypothesis
from hypothesis import strategies as st

from lightning_swiftmoe.cluster import min_slots
from lightning_swiftmoe.functional import activation_names
from lightning_swiftmoe.placement.flexmoe import FlexMoEPolicy
from tests.configs.optimizers import KEEP_ROUNDING, OPTIMIZERS, SCHEDULES


@dataclass(frozen=True)
class Configuration:
    """One training. Defaults are the simplest there is: a mismatch is shrunk towards them.

    Args:
        tokens: of each rank in a batch, one number a rank; zeros are allowed.
        rolls: every batch gives these numbers to other ranks than the one before.
        group_size: ``expert_parallel_size``.
        spare_slots: slots of a rank beyond those that every expert needs; ``"auto"`` leaves it to the strategy.
        transport: ``"auto"``; or ``"planned"``: rows planned as on a device, which adds them up in fp32.
        frozen: does not train: ``"router"``, ``"dense"`` (all but experts), ``"up"``, ``"down"`` or ``"experts"``.
        tied: ``"experts"``: all layers share one set; ``"layers"``: one layer is used again and again.
        thaws: what is frozen trains from the second batch on.
        optimization: ``"automatic"``; or by hand: ``"manual"`` with one optimizer, ``"two"`` that hold every other
            Parameter, two ``"apart"``, for experts and for the rest, or the same that take ``"turns"``.
        recomputed: activation checkpointing around each layer: ``"plain"`` or ``"reentrant"``.
        validate_every: batches; 0 for never.
        seed: of weights and data.
    """

    num_layers: int = 1
    num_experts: int = 2
    top_k: int = 1
    width: int = 4
    ffn_size: int = 4
    activation: str = "gelu"
    score: str = "softmax"
    normalize_topk: bool | None = None
    capacity_factor: float | None = None
    aux_loss_coef: float = 0.0
    z_loss_coef: float = 0.0
    bias_update_rate: float = 0.0
    shared_ffn_size: int = 0

    tokens: tuple[int, ...] = (4,)
    rolls: bool = False
    group_size: int | None = None
    spare_slots: int | str = 0
    capacity_scope: str = "cluster"
    split: str = "even"
    transient_copies: int = 0
    optimizer_state: str = "decoupled"
    offload: bool = False
    transport: str = "auto"
    policy: str = "static"
    every_n_steps: int = 1

    batches: int = 1
    epochs: int = 1
    accumulate: int = 1
    clip: str | None = None
    frozen: str | None = None
    thaws: bool = False
    tied: str | None = None
    optimizer: str = "sgd"
    schedule: str | None = None
    optimization: str = "automatic"
    recomputed: str | None = None
    validate_every: int = 0
    find_unused: bool = False
    seed: int = 0

    @property
    def num_ranks(self) -> int:
        """Ranks that train."""
        return len(self.tokens)

    @property
    def sharers(self) -> int:
        """Ranks that share one set of experts."""
        return self.group_size or self.num_ranks

    @property
    def slots(self) -> int | str:
        """``slots_per_rank``."""
        if isinstance(self.spare_slots, str):
            return self.spare_slots
        return min_slots(self.num_experts, self.sharers) + self.spare_slots

    @property
    def is_exact(self) -> bool:
        """Whether all of it is computed in fp64."""
        return self.transport != "planned"

    def parts(self, batch: int) -> tuple[int, ...]:
        """Tokens of each rank in that batch."""
        shift = batch % self.num_ranks if self.rolls else 0
        return self.tokens[shift:] + self.tokens[:shift]

    def make_policy(self) -> Any:
        """For an ``ExpertRebalancer``."""
        return FlexMoEPolicy() if self.policy == "flexmoe" else self.policy

    def __str__(self) -> str:
        """One line that makes it again."""
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        told = [f"{f.name}={given[f.name]!r}" for f in dataclasses.fields(self) if given[f.name] != f.default]
        return f"Configuration({', '.join(told)})"


PLAIN_POLICIES = ("auto", "static", "proportional", "balanced", "random")


def rarely(state: str) -> st.SearchStrategy[str]:
    """``"decoupled"`` but for a few."""
    return st.integers(0, 19).map(lambda n: state if n == 19 else "decoupled")


@st.composite
def configurations(draw: st.DrawFn) -> Configuration:
    """Any configuration that a user may mean; a few are such that the strategy refuses them."""

    def one_of(*values: Any) -> Any:
        return draw(st.sampled_from(values))

    seed = draw(st.integers(0, 10_000))  # first: where the second example must differ from the simplest
    num_ranks = one_of(1, 2, 2, 3, 3, 4, 4)
    spread = one_of("even", "uneven")
    if spread == "even":
        tokens = (draw(st.integers(1, 9)),) * num_ranks
    else:
        tokens = tuple(draw(st.integers(0, 9)) for _ in range(num_ranks))
    tokens = tokens if any(tokens) else (1, *tokens[1:])
    group_size = one_of(None, None, *(size for size in range(1, num_ranks + 1) if num_ranks % size == 0))
    num_experts = one_of(*range(1, 8))
    top_k = one_of(*range(1, min(num_experts, 4) + 1))
    num_layers = one_of(1, 2, 3)
    tied = one_of(None, None, "experts", "layers")
    # DDP takes a router that reentrant checkpoints reach twice for two gradients of one step.
    recomputed = one_of(None, None, "plain", *([] if tied == "layers" else ["reentrant"]))
    # A reentrant checkpoint has gradients only where its input has one.
    parts = ["router", "up", "down", "experts", *([] if recomputed == "reentrant" else ["dense"])]
    frozen = one_of(None, None, None, *parts)
    normalize_topk = one_of(None, True, False)
    split = one_of("even", "exact")
    # Where a router's gradient is zero on paper, its rounding errors have signs all the same, and Lion follows those.
    has_router_gradient = top_k < num_experts and (top_k > 1 or not normalize_topk)
    optimizers = [name for name in OPTIMIZERS if name != "lion" or has_router_gradient or frozen == "router"]
    transport = one_of("auto", "auto", "planned") if num_ranks > 1 else "auto"
    optimizers = [name for name in optimizers if transport != "planned" or name in KEEP_ROUNDING]
    # Whoever takes turns leaves the others' gradients out, which DDP must be told.
    kinds = ["automatic", "automatic", "manual", "two", "apart", *([] if recomputed == "reentrant" else ["turns"])]
    optimization = one_of(*kinds)
    # What DDP reduces is settled when it is made, so that nothing dense can thaw. An optimizer that has nothing to
    # train yet cannot be clipped, nor have a turn.
    thawing = ("up", "down") if optimization in ("apart", "turns") else ("up", "down", "experts")
    return Configuration(
        num_layers=num_layers,
        num_experts=num_experts,
        top_k=top_k,
        width=one_of(*range(1, 10)),
        ffn_size=one_of(*range(1, 10)),
        activation=one_of(*activation_names()),
        score=one_of("softmax", "sigmoid"),
        normalize_topk=normalize_topk,
        capacity_factor=one_of(None, None, 0.5, 1.0, 1.25, 2.0),
        aux_loss_coef=one_of(0.0, 0.01, 0.3),
        z_loss_coef=one_of(0.0, 0.05),
        bias_update_rate=one_of(0.0, 0.0, 0.05),
        shared_ffn_size=one_of(0, 3),
        tokens=tokens,
        rolls=draw(st.booleans()),
        group_size=group_size,
        spare_slots=one_of("auto", 0, 1, 2),
        capacity_scope=one_of("cluster", "rank", "pooled"),
        split=split,
        transient_copies=one_of(0, 1, 2) if split == "exact" else 0,
        # Refused with groups: asked for now and then.
        optimizer_state=one_of("decoupled", "decoupled", "bound") if group_size is None else draw(rarely("bound")),
        offload=draw(st.booleans()),
        transport=transport,
        policy=one_of(*PLAIN_POLICIES, "flexmoe"),
        every_n_steps=one_of(1, 1, 2),
        batches=one_of(1, 2, 3, 4, 5),
        epochs=one_of(1, 1, 2),
        accumulate=1 if optimization == "turns" else one_of(1, 1, 2, 3),
        clip=one_of(None, "norm", "value"),
        frozen=frozen,
        thaws=frozen in thawing and draw(st.booleans()),
        tied=tied,
        optimizer=one_of(*optimizers),
        schedule=one_of(None, *SCHEDULES),
        optimization=optimization,
        recomputed=recomputed,
        validate_every=one_of(0, 0, 1, 2),
        # Looking for unused parameters and reentrant checkpointing do not go together in DDP.
        find_unused=optimization == "turns" or (recomputed != "reentrant" and draw(st.booleans())),
        seed=seed,
    )


def drawn(count: int, seed: int) -> list[Configuration]:
    """The same ``count`` configurations for the same ``seed``."""
    return [_drawn(f"{seed}, {index}") for index in range(count)]


def _drawn(seed: str) -> Configuration:
    """One for each seed: after the simplest Hypothesis draws one at random, and later ones would be its variations."""
    found: list[Configuration] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=2,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(configurations())
    def draw(configuration: Configuration) -> None:
        found.append(configuration)

    draw()
    return found[-1]
