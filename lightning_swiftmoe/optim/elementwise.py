"""Which optimizers may step on parts of a parameter as if each were the whole.

Whoever is not known is tried: a copy of the optimizer, with its own options and hyper-parameters but small parameters,
must change parts of a parameter as it changes the whole, together and each by itself.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

_KNOWN = ("SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "Adagrad", "Adadelta", "RMSprop", "Rprop", "ASGD")

_HOLDS = "but a rank holds parts of each expert"
_REASONS = {
    "muon": f"it orthogonalises whole matrices, {_HOLDS}",
    "shampoo": f"it preconditions with statistics of whole matrices, {_HOLDS}",
    "soap": f"it preconditions with statistics of whole matrices, {_HOLDS}",
    "adafactor": f"it factors second moments over rows and columns, {_HOLDS}",
    "lamb": f"it scales each layer by the norm of all its weights, {_HOLDS}",
    "lars": f"it scales each layer by the norm of all its weights, {_HOLDS}",
    "lbfgs": f"it needs inner products over all parameters, {_HOLDS}",
    "sparseadam": "it needs sparse gradients, but those of experts are dense",
}
# The first steps of these may be element-wise, so that a trial shows nothing.
_NOT_AT_FIRST = ("shampoo", "soap")

_SHAPES = {3: (2, 4, 6), 2: (2, 24)}  # by dims: experts, rows, columns
_STEPS = 8  # rectified ones move nothing in the first few
_SOME_RATE = 1e-3
_TOLERANCE = 1e-6  # of the largest change of a weight; in fp64 a tiny learning rate leaves that many digits

Cut = Callable[[Tensor], Sequence[Tensor]]


def check_elementwise(optimizer: Optimizer, experts: Collection[Tensor] | None = None) -> None:
    """Refuse an optimizer that would give other results on shards than on whole parameters.

    torch's element-wise optimizers pass by name; any other is tried: steps on a small parameter must equal the same
    steps on parts of it. The optimizer itself, its parameters and its hooks are left alone.

    Args:
        optimizer: the user's.
        experts: only groups that hold some of these are looked at; None: all groups, as if of experts' matrices.

    Raises:
        ValueError: it cannot be sharded, or cannot be tried; says why and what to do.
    """
    if is_known_elementwise(optimizer):
        return
    known = _known_reason(optimizer)
    if known in _NOT_AT_FIRST:
        raise ValueError(_refusal(optimizer, _REASONS[known]))
    for group in optimizer.param_groups:
        params = [param for param in group["params"] if experts is None or param in experts]
        if not params:
            continue
        # Biases of experts, [E, rows], may be taken for matrices; dense vectors are tried as what nobody takes for one.
        dims = {3} if experts is None else {param.ndim if param.ndim in _SHAPES else 3 for param in params}
        try:
            reasons = (_why_not(optimizer, group, _SHAPES[n], params[0].device) for n in sorted(dims))
            found = next((reason for reason in reasons if reason is not None), None)
        except _Unusable as error:
            found = str(error)
        except Exception as error:
            if known is None:
                raise ValueError(_not_tried(optimizer, error)) from error
            found = _REASONS[known]
        if found is not None:
            raise ValueError(_refusal(optimizer, found if known is None else _REASONS[known]))


def is_known_elementwise(optimizer: Optimizer) -> bool:
    """Whether it is one of torch's, whose state is scalars and one number for each element."""
    return type(optimizer).__module__.startswith("torch.optim") and type(optimizer).__name__ in _KNOWN


def needs_whole_matrices(optimizer: Optimizer) -> bool:
    """Whether the optimizer is known by name as one that cannot train experts."""
    return _known_reason(optimizer) is not None


def way_out(optimizer: Optimizer) -> str:
    """What to do with an optimizer that cannot train experts."""
    name = type(optimizer).__name__
    return (
        f"give the experts to an element-wise optimizer ({', '.join(_KNOWN[:7])}, Lion, ...); to keep {name} for dense "
        f"weights, return [{name}(dense), AdamW(experts)] from configure_optimizers and set "
        "self.automatic_optimization = False"
    )


def _known_reason(optimizer: Optimizer) -> str | None:
    names = [cls.__name__.lower() for cls in type(optimizer).__mro__]
    return next((key for key in _REASONS if any(key in name for name in names)), None)


def _refusal(optimizer: Optimizer, reason: str) -> str:
    return f"{type(optimizer).__name__} cannot be sharded: {reason}; {way_out(optimizer)}"


def _not_tried(optimizer: Optimizer, error: Exception) -> str:
    first_line = next(iter(str(error).splitlines()), "")
    return (
        f"{type(optimizer).__name__} is not known, and a trial of it on a small parameter failed "
        f"({type(error).__name__}: {first_line}). If a weight's update needs its own gradient and state alone, say so: "
        f"SwiftMoEStrategy(trust_optimizer=True), in a config strategy.trust_optimizer=true; else {way_out(optimizer)}"
    )


# -- the trial ---------------------------------------------------------------------------------------------------------


class _Unusable(Exception):
    """What the trial itself finds wrong with a step."""


def _why_not(optimizer: Optimizer, group: dict[str, Any], shape: tuple[int, ...], device: torch.device) -> str | None:
    """What makes steps on parts differ from steps on the whole; None where nothing does."""
    generator = torch.Generator().manual_seed(0)
    start, *grads = torch.randn(1 + _STEPS, *shape, generator=generator, dtype=torch.float64).to(device)

    def changes(cut: Cut, *, replaced: bool = False) -> list[Tensor]:
        return _changes(_copy(optimizer, group, cut(start)), [cut(grad) for grad in grads], replaced)

    def apart(cut: Cut) -> list[Tensor]:
        found: list[Tensor] = []
        for part, *of_grads in zip(cut(start), *map(cut, grads), strict=True):
            found += _changes(_copy(optimizer, group, [part]), [[grad] for grad in of_grads], replaced=False)
        return found

    (whole,) = changes(lambda tensor: [tensor])
    if not whole.any():
        raise RuntimeError(f"{_STEPS} steps changed nothing")
    if not all(_close(changes(cut), cut(whole)) for cut in (_rows, _pieces)):
        return f"steps on a small expert and on its parts gave different weights, {_HOLDS}"
    # Another rank has the other parts, and an optimizer of its own.
    if not all(_close(apart(cut), cut(whole)) for cut in (_rows, _pieces)):
        return f"its steps depend on all its parameters together (by a norm of all gradients, say), {_HOLDS}"
    if not _close(changes(_rows, replaced=True), _rows(whole)):
        return "it remembers Parameters elsewhere than in param_groups and state, but a step's shards are new tensors"
    return None


def _rows(tensor: Tensor) -> Sequence[Tensor]:
    """As decoupled state is cut."""
    return tensor.split((3, tensor.shape[1] - 3), dim=1)


def _pieces(tensor: Tensor) -> Sequence[Tensor]:
    """As state is cut that is bound to hosts."""
    return [piece.view(1, -1, *[1] * (tensor.ndim - 2)) for piece in tensor.flatten().split(20)]


def _close(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    largest = max(change.abs().max() for change in expected)
    return all(bool(((a - b).abs() <= _TOLERANCE * largest).all()) for a, b in zip(found, expected, strict=True))


def _copy(optimizer: Optimizer, group: dict[str, Any], start: Sequence[Tensor]) -> Optimizer:
    """An optimizer with all attributes of another, and one group with the options of ``group`` that holds ``start``.

    Not by ``copy``: torch's optimizers leave attributes of their own behind. Not by the constructor: its arguments are
    not known.
    """
    ours = {**{key: deepcopy(value) for key, value in group.items() if key != "params"}, "params": _parameters(start)}
    if "lr" in ours and not ours["lr"]:
        ours["lr"] = ours.get("initial_lr") or _SOME_RATE  # a schedule may start at zero, where nothing would be seen
    copied = object.__new__(type(optimizer))
    everybody = [param for other in optimizer.param_groups for param in other["params"]]
    memo: dict[int, Any] = {
        id(param): nn.Parameter(torch.empty(0)) for param in everybody
    }  # copying those takes memory
    memo |= {id(optimizer): copied, id(optimizer.state): defaultdict(dict)}
    memo |= {id(optimizer.param_groups): [ours], id(group["params"]): ours["params"]}
    for name, value in vars(optimizer).items():
        if name.endswith("_hooks"):
            copied.__dict__[name] = OrderedDict()
        elif name != "step":  # a scheduler's, which would step the user's own
            copied.__dict__[name] = _copied(value, memo)
    return copied


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """A deep copy; what allows none (locks, loggers, process groups) is shared."""
    try:
        return deepcopy(value, memo)
    except Exception:
        return value


def _parameters(values: Sequence[Tensor]) -> list[nn.Parameter]:
    return [nn.Parameter(value.clone()) for value in values]


def _changes(optimizer: Optimizer, grads: Sequence[Sequence[Tensor]], replaced: bool) -> list[Tensor]:
    """How steps change the parameters; with ``replaced``, every step finds new ones in the same places."""
    (group,) = optimizer.param_groups
    before = [param.detach().clone() for param in group["params"]]
    train = getattr(optimizer, "train", None)
    if callable(train):
        train()  # schedule-free optimizers step in this mode only
    for grad in grads:
        for param, part in zip(group["params"], grad, strict=True):
            param.grad = part.clone()
        optimizer.step(closure=_closure(group["params"]))
        if replaced:
            _replace(optimizer, group)
    return [param.detach() - old for param, old in zip(group["params"], before, strict=True)]


def _closure(params: Sequence[nn.Parameter]) -> Callable[[], Any]:
    """Of a training step, which has run once and for all when the optimizer comes."""
    before = [param.detach().clone() for param in params]
    asked = []

    def closure() -> Tensor:
        asked.append(True)
        if len(asked) > 1:
            raise _Unusable("it evaluates the loss several times a step, but forward and backward run once")
        if not all(map(torch.equal, params, before)):
            raise _Unusable("it moves weights before it evaluates the loss, but forward and backward run first")
        return torch.zeros((), dtype=torch.float64)

    return closure


def _replace(optimizer: Optimizer, group: dict[str, Any]) -> None:
    """As in training, where shards come and go with every step."""
    for index, param in enumerate(group["params"]):
        group["params"][index] = nn.Parameter(param.detach())
        if param in optimizer.state:
            optimizer.state[group["params"][index]] = optimizer.state.pop(param)
