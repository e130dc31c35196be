"""Weights in a folder of safetensors files, read expert by expert, under the names and through the conversions of the
model that will have them.

A folder of the hub often has a tensor for every expert and projection; the model has one for all experts. transformers
knows the way from one to the other as a list of operations on lists of tensors. They are the same for a list of one
expert, so that nobody needs the others.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_swiftmoe.hf._transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    WeightConverter,
    WeightRenaming,
    get_model_conversion_mapping,
    rename_source_key,
    safe_open,
)

_INDEX = "model.safetensors.index.json"
_FILE = "model.safetensors"


def meta_model(folder: str | Path, **options: Any) -> PreTrainedModel:
    """The causal language model in a folder, without any of its weights: a strategy reads them once it has decided
    which rank holds what. For ``configure_model``.

    Args:
        folder: with a ``config.json`` and safetensors files, as ``from_pretrained`` takes it. Nothing is downloaded.
        **options: of ``AutoModelForCausalLM.from_config``, such as ``dtype`` and ``attn_implementation``.

    Raises:
        ValueError: no such folder, weights that are quantised, or not those of the model.
    """
    path = Path(folder)
    config = read_config(path)
    if options.get("dtype") == "auto":  # which is what from_config does without
        del options["dtype"]
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, **options)
    model.swiftmoe_weights = SavedWeights(path, model)
    return model


def read_config(folder: Path) -> Any:
    """The configuration in a folder.

    Raises:
        ValueError: there is none that transformers can read, or one of quantised weights.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"there is no {file}: give the folder of a model of transformers")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except OSError as error:
        raise ValueError(f"{file} is no configuration: {error}") from error
    quantised = getattr(config, "quantization_config", None)
    if quantised is not None:
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else type(quantised).__name__
        raise ValueError(
            f"the weights in {folder} are quantised ({method}, by quantization_config in its config.json), expected "
            "fp32, bf16 or fp16, as experts train: load them dequantised with from_pretrained, and save that"
        )
    return config


class SavedWeights:
    """Those of one model.

    Args:
        folder: with safetensors files.
        model: on any device; names and conversions are its own.

    Raises:
        ValueError: no such files, or they lack weights of the model.
    """

    def __init__(self, folder: Path, model: PreTrainedModel) -> None:
        self.folder = folder
        self._config = model.config
        self._files = _files_of(folder)
        self._opened: dict[Path, Any] = {}
        self._sources: dict[str, dict[str, list[str]]] = {}
        self._converters: dict[str, WeightConverter] = {}
        self._find_sources(model)

    def whole(self, name: str) -> Tensor | None:
        """The tensor that the model has under this name, as it was saved; None: it is tied to another."""
        if name not in self._sources:
            return None
        sources = self._sources[name].items()
        return self._converted(name, {pattern: [self._slice(key)[:] for key in keys] for pattern, keys in sources})

    def chunks(self, name: str, rows: slice) -> Iterator[Tensor]:
        """``[1, n, ...]`` of every expert in turn: ``rows`` of what the model has as ``[E, rows, ...]``.

        No other rows are read, but where the model's operations do more than put rows one after the other.

        Raises:
            ValueError: some experts have more tensors than others.
        """
        sources = self._sources[name]
        if name not in self._converters:
            ((key,),) = sources.values()
            saved = self._slice(key)
            for expert in range(saved.get_shape()[0]):
                yield saved[expert : expert + 1, rows]
            return
        numbers = {len(keys) for keys in sources.values()}
        if numbers == {1}:
            num_experts = self._slice(next(iter(sources.values()))[0]).get_shape()[0]
            for expert in range(num_experts):
                chunk = {pattern: [self._slice(key)[expert : expert + 1]] for pattern, (key,) in sources.items()}
                yield self._converted(name, chunk)[:, rows]
            return
        if len(numbers) > 1:
            raise ValueError(
                f"{self.folder} has {sorted(numbers)} tensors for the parts of {name}, expected one number"
            )
        origin = self._origin_of_rows(name)
        for expert in range(numbers.pop()):
            keys = [keys[expert] for keys in sources.values()]
            if origin is None:
                whole = {pattern: [self._slice(key)[:]] for pattern, key in zip(sources, keys, strict=True)}
                yield self._converted(name, whole)[:, rows]
            else:
                runs = _runs(origin[rows].tolist()) or [(0, 0, 0)]
                yield torch.cat([self._slice(keys[source])[first:end] for source, first, end in runs])[None]

    def _origin_of_rows(self, name: str) -> Tensor | None:
        """``[rows, 2]`` which tensor of an expert each of its rows comes from, and which row of that it is.

        Found by converting such numbers in place of rows; None: they do not come out one by one.
        """
        numbers = {}
        for source, (pattern, keys) in enumerate(self._sources[name].items()):
            shape = self._slice(keys[0]).get_shape()
            if len(shape) != 2:
                return None
            row = torch.arange(shape[0])
            numbers[pattern] = [torch.stack([torch.full_like(row, source), row], dim=1)]
        num_rows = sum(len(tensors[0]) for tensors in numbers.values())
        origin = self._converted(name, numbers)
        return origin[0] if origin.shape == (1, num_rows, 2) else None

    def _find_sources(self, model: PreTrainedModel) -> None:
        mapping = get_model_conversion_mapping(model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        converter_of = {pattern: entry for entry in converters for pattern in entry.source_patterns}
        known = model.state_dict()
        for key in sorted(self._files, key=_natural):
            name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, known)
            if name not in known and key in known:
                name, pattern = key, None
            if name not in known:
                continue
            self._sources.setdefault(name, {}).setdefault(pattern or key, []).append(key)
            if pattern is not None:
                self._converters[name] = converter_of[pattern]
        tied = getattr(model, "all_tied_weights_keys", {})
        lacking = [name for name in known if name not in self._sources and name not in tied]
        if lacking:
            raise ValueError(
                f"{self.folder} lacks {', '.join(lacking[:3])} and {max(len(lacking) - 3, 0)} more of the "
                f"{len(known)} tensors of {type(model).__name__}, expected all of them"
            )
        for name, sources in self._sources.items():
            shapes = [self._slice(key).get_shape() for keys in sources.values() for key in keys]
            if sum(map(math.prod, shapes)) != known[name].numel():
                raise ValueError(
                    f"{self.folder} has {name} in tensors of {shapes[:3]}, and {type(model).__name__} wants "
                    f"{list(known[name].shape)}: its config.json is of another model"
                )

    def _converted(self, name: str, found: dict[str, list[Tensor]]) -> Tensor:
        """By the model's operations, from tensors by pattern of their names."""
        converter = self._converters.get(name)
        if converter is None:
            ((tensor,),) = found.values()
            return tensor
        own = copy.deepcopy(converter)
        for pattern, tensors in found.items():
            own.collected_tensors[pattern] = tensors
        result = own.convert(name, model=None, config=self._config)
        if name not in result:
            raise ValueError(f"{name} came out of the conversion of its saved tensors as {', '.join(result)}")
        tensor = result[name]
        return tensor[0] if isinstance(tensor, list) else tensor

    def _slice(self, key: str) -> Any:
        """A tensor of which nothing is read but what is asked for by an index."""
        path = self._files[key]
        if path not in self._opened:
            self._opened[path] = open_file(path)
        return self._opened[path].get_slice(key)


def open_file(path: Path) -> Any:
    """A file of tensors, mapped: nothing is read yet."""
    return safe_open(path, framework="pt")


def _runs(origin: list[list[int]]) -> list[tuple[int, int, int]]:
    """Source, first row and one past the last of rows that stand in one piece.

    Example: ``[[0, 1], [0, 2], [1, 0]]`` gives ``[(0, 1, 3), (1, 0, 1)]``.
    """
    runs: list[tuple[int, int, int]] = []
    for source, row in origin:
        if runs and runs[-1][0] == source and runs[-1][2] == row:
            runs[-1] = source, runs[-1][1], row + 1
        else:
            runs.append((source, row, row + 1))
    return runs


def _files_of(folder: Path) -> dict[str, Path]:
    """By name of the tensor."""
    index = folder / _INDEX
    if index.is_file():
        names = json.loads(index.read_text())["weight_map"]
        lacking = sorted({file for file in names.values() if not (folder / file).is_file()})
        if lacking:
            raise ValueError(f"{folder} lacks {', '.join(lacking)}, of which {_INDEX} says that weights are in them")
        return {key: folder / file for key, file in names.items()}
    whole = folder / _FILE
    if not whole.is_file():
        raise ValueError(f"{folder} has neither {_INDEX} nor {_FILE}, expected weights in safetensors files")
    return dict.fromkeys(open_file(whole).keys(), whole)


def _natural(key: str) -> list[tuple[int, int, str]]:
    """Experts in the order of their numbers: 2 comes before 10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in key.split(".")]
