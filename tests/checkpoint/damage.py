"""Damaged checkpoints of every kind, from a good one."""

from __future__ import annotations

import pickle
import random
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from lightning_swiftmoe.checkpoint.sums import KEY


class Code:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def damaged(good: Path, folder: Path) -> list[Path]:
    """200 files, the same ones for a file; their names say what is wrong. Code in them would make ``folder/ran``."""
    draw = random.Random(7)
    makers: list[tuple[int, Callable[[random.Random, Path, Path], None]]] = [
        (40, cut_short),
        (40, flip_in_tensor),
        (40, flip_elsewhere),
        (12, lack_weights),
        (8, lack_parts),
        (10, know_more),
        (20, reshape_weight),
        (20, spoil_optimizer),
    ]
    files = []
    for count, make in makers:
        for number in range(count):
            files.append(folder / f"{make.__name__}-{number}.ckpt")
            make(draw, good, files[-1])
    return [*files, *with_code(good, folder)]


def cut_short(draw: random.Random, good: Path, path: Path) -> None:
    whole = good.read_bytes()
    path.write_bytes(whole[: draw.randrange(len(whole))])


def flip_in_tensor(draw: random.Random, good: Path, path: Path) -> None:
    start, stop = draw.choice(tensor_bytes(good))
    flip(good, path, draw.randrange(8 * start, 8 * stop))


def flip_elsewhere(draw: random.Random, good: Path, path: Path) -> None:
    inside = {byte for start, stop in tensor_bytes(good) for byte in range(start, stop)}
    byte = draw.choice([byte for byte in range(good.stat().st_size) if byte not in inside])
    flip(good, path, 8 * byte + draw.randrange(8))


def lack_weights(draw: random.Random, good: Path, path: Path) -> None:
    content = of_others(good)
    for name in draw.sample(sorted(content["state_dict"]), draw.randrange(1, 4)):
        del content["state_dict"][name]
    torch.save(content, path)


def lack_parts(draw: random.Random, good: Path, path: Path) -> None:
    content = of_others(good)
    for key in draw.sample(["state_dict", "optimizer_states", "lr_schedulers", "loops"], draw.randrange(1, 5)):
        del content[key]
    torch.save(content, path)


def know_more(draw: random.Random, good: Path, path: Path) -> None:
    content = of_others(good)
    content["state_dict"][f"other.{draw.random()}"] = torch.zeros(3)
    torch.save(content, path)


def reshape_weight(draw: random.Random, good: Path, path: Path) -> None:
    content = of_others(good)
    weights = content["state_dict"]
    name = draw.choice(sorted(weights))
    dim = draw.randrange(weights[name].dim())
    weights[name] = weights[name].repeat_interleave(2, dim)
    torch.save(content, path)


def spoil_optimizer(draw: random.Random, good: Path, path: Path) -> None:
    content = of_others(good)
    state = content["optimizer_states"][0]
    index = draw.choice(sorted(state["state"]))
    some = state["state"][index]

    def reshape() -> None:
        some["exp_avg"] = some["exp_avg"].repeat_interleave(2, 0)

    def swap_expert_and_dense() -> None:
        experts = [i for i, values in state["state"].items() if values["exp_avg"].dim() == 3]
        state["state"][0], state["state"][experts[0]] = state["state"][experts[0]], state["state"][0]

    def other_kind() -> None:
        for group in state["param_groups"]:
            del group["betas"]
            group["momentum"] = 0.9

    spoils: list[Callable[[], Any]] = [
        reshape,
        swap_expert_and_dense,
        other_kind,
        lambda: state["param_groups"].pop(),
        lambda: state["param_groups"][0]["params"].pop(),
        lambda: state.pop("param_groups"),
        lambda: state["state"].update({1000: some}),
        lambda: content["optimizer_states"].append(state),
        content["optimizer_states"].clear,
        lambda: content.update(optimizer_states=[3]),
    ]
    spoils[int(path.stem.rpartition("-")[2]) % len(spoils)]()
    torch.save(content, path)


def with_code(good: Path, folder: Path) -> Iterator[Path]:
    """Code in the file, as a whole and where users keep things."""
    code = Code(folder / "ran")
    for place in ("callbacks", "hyper_parameters", "state_dict", "optimizer_states", "loops", "anything"):
        yield folder / f"with_code-in-{place}.ckpt"
        torch.save({**of_others(good), place: {"x": code}}, folder / f"with_code-in-{place}.ckpt")
    for protocol in (0, 2, 4, 5):
        yield folder / f"with_code-alone-{protocol}.ckpt"
        (folder / f"with_code-alone-{protocol}.ckpt").write_bytes(pickle.dumps(code, protocol))


def of_others(good: Path) -> dict[str, Any]:
    """The content without our checksums: nothing but what is wrong tells that something is."""
    content = torch.load(good, weights_only=True)
    del content[KEY]
    return content


def flip(good: Path, path: Path, bit: int) -> None:
    whole = bytearray(good.read_bytes())
    whole[bit // 8] ^= 1 << bit % 8
    path.write_bytes(whole)


def tensor_bytes(path: Path) -> list[tuple[int, int]]:
    """Where the file holds tensors' elements."""
    with zipfile.ZipFile(path) as file, path.open("rb") as raw:
        found = []
        for record in file.infolist():
            if "/data/" in record.filename and record.file_size:
                raw.seek(record.header_offset + 26)  # lengths of its name and of what pads it
                lengths = raw.read(4)
                start = record.header_offset + 30 + sum(int.from_bytes(lengths[i : i + 2], "little") for i in (0, 2))
                found.append((start, start + record.file_size))
        return found
