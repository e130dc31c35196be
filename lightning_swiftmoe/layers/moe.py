"""The Mixture-of-Experts layer: a plain torch module outside a strategy, a set of slots inside one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_swiftmoe.arguments import (
    check,
    check_choice,
    check_count,
    check_flag,
    check_not_negative,
    check_number,
    is_integer,
    knows_its_names,
)
from lightning_swiftmoe.functional import activation_names, auxiliary_losses
from lightning_swiftmoe.layers.dispatchers import AllGroups, Dispatcher, LocalDispatcher
from lightning_swiftmoe.layers.experts import Experts
from lightning_swiftmoe.layers.load import LayerLoad, counts_as_training, in_backward
from lightning_swiftmoe.layers.losses import attach_loss
from lightning_swiftmoe.layers.router import SCORES, Router, Routing, no_tokens


class MoE(nn.Module):
    """Sends each token to ``top_k`` of ``num_experts`` MLPs and adds their outputs up, weighted by the router.

    Auxiliary losses reach the gradient by themselves; nothing needs to be added to the loss. In training they are
    computed once per layer over the global batch; ``aux_loss`` (1.0 = balanced) and ``z_loss`` hold the last values.

    Args:
        hidden_size: last dim ``d`` of the input and output.
        ffn_size: hidden units ``h`` of one expert.
        num_experts: experts ``E``.
        top_k: experts per token.
        activation: ``"gelu"``, ``"swiglu"``, ...; see ``lightning_swiftmoe.functional.activation_names``.
        capacity_factor: None processes every token (dropless). A number gives every slot room for that multiple of its
            fair share, which the slots of a rank pool unless ``SwiftMoEStrategy(capacity_scope=...)`` says otherwise;
            what finds no room is dropped, later tokens of a batch first (they keep only what skips this layer).
        score: ``"softmax"`` or ``"sigmoid"``.
        normalize_topk: whether a token's gate weights add up to one. None: yes where ``top_k > 1``.
        aux_loss_coef: factor of the load-balance loss.
        z_loss_coef: factor of the router z-loss.
        bias_update_rate: above zero, loss-free balancing: after every step the bias of an expert moves by this much. A
            strategy does it; in your own loop ``update_bias`` happens before the next training forward.
        shared_ffn_size: hidden units of an expert that sees every token; 0 for none.

    Attributes:
        aux_loss_scale: multiplies the gradient of the auxiliary losses. Set it to ``1/n`` where you divide your loss by
            ``n`` to accumulate gradients; where Lightning divides the loss, it is set for you (``AuxLossScale``).

    Raises:
        ValueError: an argument out of range or of a wrong type; says what was expected.
    """

    experts_path = "experts"
    knows_aux_loss = True

    @knows_its_names
    def __init__(
        self,
        hidden_size: int,
        ffn_size: int,
        num_experts: int,
        *,
        top_k: int = 1,
        activation: str = "gelu",
        capacity_factor: float | None = None,
        score: str = "softmax",
        normalize_topk: bool | None = None,
        aux_loss_coef: float = 0.01,
        z_loss_coef: float = 0.0,
        bias_update_rate: float = 0.0,
        shared_ffn_size: int = 0,
    ) -> None:
        super().__init__()
        for name, size in {"hidden_size": hidden_size, "ffn_size": ffn_size, "num_experts": num_experts}.items():
            check_count(name, size)
        check_count("shared_ffn_size", shared_ffn_size, "an integer, zero or more", least=0)
        check(is_integer(top_k) and 1 <= top_k <= num_experts, "top_k", top_k, f"1 .. num_experts = {num_experts}")
        check_choice("activation", activation, activation_names())
        check_choice("score", score, SCORES)
        if capacity_factor is not None:
            check_number("capacity_factor", capacity_factor, "None (dropless) or a number above zero", above=0)
        if normalize_topk is not None:
            check_flag("normalize_topk", normalize_topk)
        factors = {"aux_loss_coef": aux_loss_coef, "z_loss_coef": z_loss_coef, "bias_update_rate": bias_update_rate}
        for name, factor in factors.items():
            check_not_negative(name, factor)
        self.hidden_size, self.ffn_size, self.num_experts, self.top_k = hidden_size, ffn_size, num_experts, top_k
        self.capacity_factor, self.aux_loss_coef, self.z_loss_coef = capacity_factor, aux_loss_coef, z_loss_coef
        self.router = Router(
            hidden_size,
            num_experts,
            top_k=top_k,
            score=score,
            normalize_topk=top_k > 1 if normalize_topk is None else normalize_topk,
            bias_update_rate=bias_update_rate,
        )
        self.experts = Experts(hidden_size, ffn_size, num_experts, activation)
        self.shared_expert = Experts(hidden_size, shared_ffn_size, 1, activation) if shared_ffn_size else None
        self.dispatcher: Dispatcher = LocalDispatcher(num_experts)
        self.aux_loss_scale: float | Tensor = 1.0
        self._attached = False
        self._all_groups: AllGroups | None = None
        self.aux_loss: Tensor | None = None
        self.z_loss: Tensor | None = None
        self._load: LayerLoad | None = None

    def forward(self, x: Tensor) -> Tensor:
        """``[..., d] -> [..., d]``, same dtype."""
        check(x.shape[-1] == self.hidden_size, "the last dim of x", x.shape[-1], f"hidden_size = {self.hidden_size}")
        x_TD = x.reshape(-1, self.hidden_size)
        if self.training and not in_backward():
            self._update_bias_alone()
        routing = self.router(x_TD)
        y_TD, counts, rank_load = self.dispatcher(x_TD, routing, self.experts, self.capacity_factor)
        if self.training:
            y_TD = self._with_losses(y_TD, routing, counts, rank_load)
        elif self._attached and counts_as_training(self.training):
            self._add_load(LayerLoad.without_losses(counts, rank_load))
        if self.shared_expert is not None:
            y_TD = y_TD + self._shared(x_TD)
        return y_TD.to(x.dtype).view(x.shape)

    def serve(self, x_0D: Tensor) -> None:
        """Run this rank's experts on the tokens of other ranks, with none of its own; nobody's hooks are called.

        Args:
            x_0D: ``[0, hidden_size]``, of the dtype and on the device of theirs.
        """
        routing = no_tokens(self.num_experts, self.top_k, x_0D)
        self.dispatcher(x_0D, routing, self.experts, self.capacity_factor)

    def attach(self, dispatcher: Dispatcher, all_groups: AllGroups | None = None) -> None:
        """Bring tokens to experts by ``dispatcher``; whoever attaches also takes the loads and ends the steps.

        Args:
            dispatcher: of this rank's expert group.
            all_groups: where there are several, adds up their counts: losses and biases are those of all tokens.
        """
        self.dispatcher = dispatcher
        self._all_groups = all_groups
        self._attached = True

    def detach(self) -> None:
        """Compute with the layer's own experts again."""
        self.dispatcher = LocalDispatcher(self.num_experts)
        self._all_groups = None
        self._attached = False
        self.aux_loss_scale = 1.0

    @property
    def is_attached(self) -> bool:
        """Whether a strategy or a virtual cluster drives the layer."""
        return self._attached

    @property
    def balances_itself(self) -> bool:
        """Whether balancing is loss-free."""
        return self.router.expert_bias is not None

    def update_bias(self, loads: Tensor) -> None:
        """As ``Router.update_bias``."""
        self.router.update_bias(loads)

    def pop_load(self) -> LayerLoad | None:
        """Loads of the training forwards since the last call; None where there was no forward."""
        load, self._load = self._load, None
        return load

    def _with_losses(self, y_TD: Tensor, routing: Routing, counts: Tensor, rank_load: Tensor) -> Tensor:
        num_processes, routed, everywhere = self.dispatcher.num_processes, counts, None
        if self._all_groups is not None:
            everywhere = self._all_groups.add_up(counts)
            num_processes, routed = self._all_groups.num_processes, everywhere[None]
        aux, z = auxiliary_losses(routing.prob_sum, routing.z_sum, routed, self.top_k, num_processes)
        if not in_backward():
            self.aux_loss, self.z_loss = aux.detach(), z.detach()
            self._add_load(LayerLoad.of_one_forward(counts, rank_load, self.aux_loss, everywhere))
        if self.aux_loss_coef == 0 and self.z_loss_coef == 0:
            return y_TD
        return attach_loss(y_TD, self.aux_loss_coef * aux + self.z_loss_coef * z, self.aux_loss_scale)

    def _add_load(self, load: LayerLoad) -> None:
        self._load = load if self._load is None else self._load + load

    def _update_bias_alone(self) -> None:
        """Without a strategy nobody reports the end of a step: the loads so far are the last step's."""
        if self.router.bias_update_rate > 0 and self._load is not None and not self._attached:
            self.router.update_bias(self._load.counts.sum(dim=0))
            self._load = None

    def _shared(self, x_TD: Tensor) -> Tensor:
        assert self.shared_expert is not None
        idx = torch.zeros(x_TD.shape[0], 1, dtype=torch.int64, device=x_TD.device)
        return self.shared_expert(x_TD, idx, torch.ones_like(idx, dtype=torch.float32))

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        capacity = "dropless" if self.capacity_factor is None else f"capacity_factor={self.capacity_factor}"
        return f"d={self.hidden_size}, h={self.ffn_size}, experts={self.num_experts}, top_k={self.top_k}, {capacity}"


def moe_layers(module: nn.Module) -> dict[str, MoE]:
    """All ``MoE`` layers of ``module`` by name, in registration order, which is the same on every rank.

    Experts of transformers models are not among them: ``lightning_swiftmoe.parallel.find_layers`` knows both.
    """
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, MoE)}
