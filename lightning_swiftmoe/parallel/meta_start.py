"""Modules that users built on the meta device: weights come into being where they are held, and nowhere else.

What is dense is made on every rank. Of experts a rank makes its own part. A model may know where its weights are saved
(``SavedWeights``): then a rank reads its rows of every expert, and no others. Else each matrix is drawn by a generator
of its own, seeded by the run's seed and the names of layer, parameter and expert, so that initial weights depend on
nothing else, whatever the number of ranks. After ``fit`` the user's Parameters are on the meta device again, and whole
experts exist where somebody asks for them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_swiftmoe.layers.experts import ExpertMLPs, expert_parameters
from lightning_swiftmoe.layers.layer import experts_name
from lightning_swiftmoe.parallel.communicator import Communicator
from lightning_swiftmoe.parallel.find_layers import find_layers
from lightning_swiftmoe.parallel.hosted_experts import HostedExperts

# Attribute of a Parameter that is on the meta device again after ``fit``: a table of ours would keep it alive.
_TRAINED = "_swiftmoe_trained_by"
_GUARDED = "_swiftmoe_guarded"  # of a module of experts: its state dicts are looked at
_IN_PARTS = (
    "since fit each rank has a part of them, as they were built on the meta device. Call "
    "trainer.strategy.gather_experts() on all ranks, or save by trainer.save_checkpoint"
)
_reading: ContextVar[bool] = ContextVar("reading", default=False)


def has_meta(module: nn.Module) -> bool:
    """Whether a Parameter or buffer of ``module`` has no memory."""
    return any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))


def experts_without_memory(module: nn.Module) -> set[str]:
    """Names of the Parameters of experts that are on the meta device."""
    return {
        f"{experts_name(name, moe)}.{key}"
        for name, moe in find_layers(module).items()
        for key, param in expert_parameters(moe.experts).items()
        if param.is_meta
    }


class SavedWeights(Protocol):
    """Attribute ``swiftmoe_weights`` of a module whose weights are somewhere, by their names in it."""

    def whole(self, name: str) -> Tensor | None:
        """A tensor; None: it is tied to another."""
        ...

    def chunks(self, name: str, rows: slice) -> Iterable[Tensor]:
        """``[n, rows, ...]`` of some experts after the other, of a tensor ``[E, rows, ...]``."""
        ...


class FirstWeights:
    """``WeightSource`` of one module of experts: what an earlier fit trained, what was saved, or what is drawn.

    Args:
        module: the user's.
        experts: whose.
        name: of theirs in ``module``.
        seed: of the run.
        communicator: of the ranks that have what was trained, on the device to draw on.
    """

    def __init__(
        self, module: nn.Module, experts: ExpertMLPs, name: str, seed: int, communicator: Communicator
    ) -> None:
        self._module = module
        self._experts = experts
        self._name = name
        self._seed = seed
        self._communicator = communicator

    def __call__(self, key: str, rows: slice) -> Iterator[Tensor]:
        """Rows of a Parameter on the meta device. Collective where it was trained."""
        param = self._experts.module.get_parameter(key)
        trained = trained_by(param)
        if trained is not None:
            if trained.group_size != self._communicator.num_ranks:
                raise ValueError(
                    f"{self._name} was trained in expert groups of {trained.group_size} ranks, and is in parts: call "
                    f"strategy.gather_experts() before a fit in groups of {self._communicator.num_ranks}"
                )
            trained.communicator = self._communicator
            whole = trained.gather(key, trained.local(key), "setup")
            assert whole is not None
            yield whole[:, rows]
            return
        saved, inner = saved_around(self._module, self._name)
        if saved is not None:
            yield from (chunk.to(param.dtype) for chunk in saved.chunks(f"{inner}.{key}", rows))
            return
        for expert in range(param.shape[0]):
            matrix = draw_expert(self._experts, self._name, key, expert, self._seed, self._communicator.device)
            # As a module with memory has it: rounded.
            yield matrix.to(param.dtype)[None, rows]


def saved_around(module: nn.Module, name: str) -> tuple[SavedWeights | None, str]:
    """The saved weights of what the part of that name is in, and its name there."""
    inner = name.split(".")
    part = module
    while True:
        saved = getattr(part, "swiftmoe_weights", None)
        if saved is not None or not inner:
            return saved, ".".join(inner)
        part = part.get_submodule(inner.pop(0))


def draw_expert(experts: ExpertMLPs, name: str, key: str, expert: int, seed: int, device: torch.device) -> Tensor:
    """``[rows, ...]`` initial weights of one expert, in at least fp32.

    Args:
        experts: whose.
        name: of the experts in the user's module.
        key: of the Parameter.
        expert: which.
        seed: of the run.
        device: to draw on; numbers of a GPU are others than those of the host.
    """
    param = experts.module.get_parameter(key)
    text = f"{seed}/{name}.{key}/{expert}"
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)
    matrix = torch.empty(param.shape[1:], dtype=torch.promote_types(param.dtype, torch.float32), device=device)
    with torch.no_grad():
        experts.draw(key, matrix, generator)
    return matrix


def materialize_dense(module: nn.Module, seed: int) -> None:
    """Everything but the Parameters of experts, on the host, as it was saved or as the modules initialise it; the same
    on every rank.

    Modules do so by ``reset_parameters``, those of transformers by their model.

    Args:
        module: the user's; other Parameters take the place of those on the meta device.
        seed: of the run.

    Raises:
        ValueError: a module does not say how it is initialised.
    """
    left = {param for layer in find_layers(module).values() for param in expert_parameters(layer.experts).values()}
    made: dict[Tensor, Tensor] = {}  # tied Parameters stay tied
    fresh = [part for part in module.modules() if _make(part, made, left)]
    untouched = {tensor: tensor._version for tensor in made.values()}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        _initialize(module, set(fresh), set(untouched))
    for name, part in module.named_modules():
        if part in fresh:
            _load_saved(module, name, part)
            _check_initialized(name, part, untouched)


def materialize_experts(module: nn.Module, seed: int, communicator: Communicator) -> None:
    """All experts that are on the meta device, whole, on the host: for a process that holds them all. Collective if
    they are trained.

    Args:
        module: the user's; other Parameters take the place of those on the meta device.
        seed: of the run.
        communicator: of the ranks that have what was trained, on the device to draw on.
    """
    for name, moe in find_layers(module).items():
        experts = moe.experts
        source = FirstWeights(module, experts, experts_name(name, moe), seed, communicator)
        for key, param in expert_parameters(experts).items():
            if param.is_meta:
                whole = torch.cat([chunk.to("cpu", param.dtype) for chunk in source(key, slice(None))])
                experts.module.register_parameter(key, nn.Parameter(whole, param.requires_grad))


@contextmanager
def without_meta(module: nn.Module) -> Iterator[None]:
    """Parameters on the meta device are out of ``module`` meanwhile: it could not be moved to another device."""
    taken = [
        (part, key, param)
        for part in module.modules()
        for key, param in part.named_parameters(recurse=False)
        if param.is_meta
    ]
    for part, key, _ in taken:
        part.register_parameter(key, None)
    try:
        yield
    finally:
        for part, key, param in taken:
            part.register_parameter(key, param)


def make_room(module: nn.Module) -> None:
    """Memory for everything on the meta device, for weights that others have made."""
    made: dict[Tensor, Tensor] = {}
    for part in module.modules():
        _make(part, made)


def keep_trained(hosted: HostedExperts) -> None:
    """``fit`` is over: trained weights of Parameters on the meta device stay in shards, and Parameters know where.

    So do copies of them. What would take them for weights is refused.
    """
    for param in hosted.originals.values():
        if param.is_meta:
            _mark(param, hosted)
    module = hosted.experts.module
    if _GUARDED not in vars(module):
        setattr(module, _GUARDED, True)
        module.register_state_dict_post_hook(_refuse_state_dict)
        module.register_load_state_dict_pre_hook(_refuse_load)


def _mark(param: nn.Parameter, hosted: HostedExperts) -> None:
    setattr(param, _TRAINED, hosted)
    # As methods of this very Parameter: a class of its own would be no plain Parameter to torch.
    vars(param)["__deepcopy__"] = partial(_copy, param)
    vars(param)["__reduce_ex__"] = _refuse_pickle


def _copy(param: nn.Parameter, memo: dict[int, Any]) -> nn.Parameter:
    """For ``copy.deepcopy``: the weights are where those of the original are."""
    copied = nn.Parameter(torch.empty_like(param, device="meta"), param.requires_grad)
    hosted = trained_by(param)
    if hosted is not None:
        _mark(copied, hosted)
    memo[id(param)] = copied
    return copied


def _refuse_pickle(protocol: Any) -> Any:
    raise RuntimeError(f"experts cannot be pickled: {_IN_PARTS}")


def _refuse_state_dict(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    if not _reading.get() and is_trained(module):
        raise RuntimeError(f"{prefix.rstrip('.')} has no weights for a state_dict: {_IN_PARTS}")


def _refuse_load(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    if not _reading.get() and is_trained(module):
        raise RuntimeError(f"{prefix.rstrip('.')} has no memory for a state_dict: {_IN_PARTS}")


@contextmanager
def knowing_of_parts() -> Iterator[None]:
    """Whoever reads or writes state dicts in here knows that experts may have no memory."""
    token = _reading.set(True)
    try:
        yield
    finally:
        _reading.reset(token)


def trained_by(param: nn.Parameter) -> HostedExperts | None:
    """Who has the trained weights of a Parameter on the meta device; None: nobody has trained it."""
    return getattr(param, _TRAINED, None)


def forget_trained(params: Iterable[nn.Parameter]) -> None:
    """Others have their weights now."""
    for param in params:
        for name in (_TRAINED, "__deepcopy__", "__reduce_ex__"):
            vars(param).pop(name, None)


def all_trained(module: nn.Module) -> list[HostedExperts]:
    """Who has trained weights of ``module`` that are on the meta device, in the same order on every rank."""
    found = map(trained_by, module.parameters())
    return list(dict.fromkeys(hosted for hosted in found if hosted is not None))


def is_trained(module: nn.Module) -> bool:
    """Whether anybody has."""
    return bool(all_trained(module))


def _make(part: nn.Module, made: dict[Tensor, Tensor], left: Collection[Tensor] = ()) -> bool:
    """Memory for what is the module's own, but for what is ``left``; says whether it had none."""
    before = len(made)
    tied = False
    for key, param in part.named_parameters(recurse=False):
        if param.is_meta and param not in left:
            tied = tied or param in made
            if param not in made:
                made[param] = nn.Parameter(_unset(param), param.requires_grad)
            part.register_parameter(key, made[param])  # type: ignore[arg-type]
    for key, buffer in part.named_buffers(recurse=False):
        if buffer.is_meta:
            made.setdefault(buffer, _unset(buffer))
            setattr(part, key, made[buffer])
    return len(made) > before or tied


def _unset(like: Tensor) -> Tensor:
    """Memory in which one sees what nobody wrote to."""
    return torch.full_like(like, math.nan if like.is_floating_point() else 0, device="cpu", requires_grad=False)


def _initialize(part: nn.Module, fresh: set[nn.Module], unset: set[Tensor]) -> None:
    """``unset``: tensors that nobody has written to yet. All others keep their values."""
    if not any(inner in fresh for inner in part.modules()):
        return
    initialize = getattr(part, "initialize_weights", None)  # of a model of transformers: all that is in it
    if callable(initialize):
        _run_on(initialize, [*part.parameters(), *part.buffers()], unset)
        return
    for child in part.children():
        _initialize(child, fresh, unset)
    reset = getattr(part, "reset_parameters", None)
    if part in fresh and callable(reset):
        _run_on(reset, [tensor for _, tensor in _own_tensors(part)], unset)


def _run_on(initialize: Callable[[], Any], tensors: Iterable[Tensor], unset: set[Tensor]) -> None:
    """Of tied Parameters the first module's values stay, as where the others let go of their own."""
    kept = [(tensor, tensor.clone()) for tensor in tensors if tensor not in unset and not tensor.is_meta]
    initialize()
    for tensor, value in kept:
        tensor.copy_(value)
    unset.difference_update(tensors)


def _load_saved(module: nn.Module, name: str, part: nn.Module) -> None:
    saved, inner = saved_around(module, name)
    if saved is None:
        return
    for key, tensor in _own_tensors(part):
        value = saved.whole(f"{inner}.{key}" if inner else key)
        if value is not None:
            tensor.data.copy_(value)


def _own_tensors(part: nn.Module) -> list[tuple[str, Tensor]]:
    """Without Parameters of experts, which have no memory yet."""
    own = [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]
    return [(key, tensor) for key, tensor in own if not tensor.is_meta]


def _check_initialized(name: str, part: nn.Module, untouched: Mapping[Tensor, int]) -> None:
    """``untouched``: version counters of tensors before anybody could write to them."""
    for key, tensor in _own_tensors(part):
        is_unset = tensor in untouched and tensor._version == untouched[tensor]
        if is_unset or (tensor.is_floating_point() and tensor.isnan().any()):
            raise ValueError(
                f"{name}.{key} was built on the meta device and nobody initialises it: give {type(part).__name__} a "
                "method reset_parameters() that does, or build it outside of torch.device('meta')"
            )
