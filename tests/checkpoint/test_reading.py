"""What a file says about itself when it is loaded."""

import warnings
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from lightning_swiftmoe.checkpoint.io import WholeCheckpointIO
from lightning_swiftmoe.checkpoint.reading import CheckpointError, read_checkpoint
from lightning_swiftmoe.checkpoint.sums import KEY, named_tensors, with_sums
from tests.checkpoint.damage import Code, flip, tensor_bytes

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64, torch.bool]


def tensors():
    """Of every kind that checkpoints hold."""
    kinds = {str(dtype): torch.arange(40).to(dtype) for dtype in DTYPES}
    return {**kinds, "complex": torch.randn(4, dtype=torch.complex64), "scalar": torch.tensor(3.0)}


def test_the_flipped_tensor_is_named(tmp_path):
    path = tmp_path / "a.ckpt"
    weights = tensors()
    WholeCheckpointIO().save_checkpoint({"state_dict": weights}, path)
    assert len(tensor_bytes(path)) == len(weights)
    for name, (start, stop) in zip(weights, tensor_bytes(path), strict=True):
        for bit in (8 * start, 8 * stop - 1):
            flip(path, tmp_path / "bad.ckpt", bit)
            with pytest.raises(CheckpointError, match=f"damaged since it was written: 'state_dict.{name}'"):
                read_checkpoint(tmp_path / "bad.ckpt")


def test_saved_again_by_others(tmp_path):
    """The checksums go along, the one of the file does not."""
    content = with_sums({"state_dict": tensors()})
    torch.save(content, tmp_path / "same.ckpt")
    assert read_checkpoint(tmp_path / "same.ckpt")[KEY] == content[KEY]
    content["state_dict"]["scalar"] += 1
    torch.save(content, tmp_path / "edited.ckpt")
    with pytest.raises(CheckpointError, match=r"'state_dict\.scalar' is not what was saved.*remove its key"):
        read_checkpoint(tmp_path / "edited.ckpt")
    del content[KEY]
    torch.save(content, tmp_path / "edited.ckpt")
    assert read_checkpoint(tmp_path / "edited.ckpt")["state_dict"]["scalar"] == 4


def test_sums_are_of_values_types_and_shapes():
    def sums(tensor):
        return with_sums({"state_dict": {"a": tensor}})[KEY]["crc32"]["state_dict.a"]

    grid = torch.arange(6.0).view(2, 3)
    assert len({sums(grid), sums(grid.view(3, 2)), sums(grid.int()), sums(grid.view(torch.int32)), sums(-grid)}) == 5
    assert sums(grid) == sums(grid.t().contiguous().t())


class Special(torch.Tensor):
    """What only its owner may look into."""


def test_tensors_of_other_kinds(tmp_path):
    path = tmp_path / "a.ckpt"
    others = {"sparse": torch.eye(3).to_sparse(), "meta": torch.zeros(2, device="meta")}
    with_sums({"state_dict": {"special": torch.zeros(2).as_subclass(Special)}})
    WholeCheckpointIO().save_checkpoint({"state_dict": others}, path)
    loaded = WholeCheckpointIO().load_checkpoint(path)["state_dict"]
    assert torch.equal(loaded["sparse"].to_dense(), torch.eye(3))


def test_names_say_where_a_tensor_is():
    zero = torch.zeros(1)
    nested = {"optimizer_states": [{"state": {4: {"exp_avg": zero}, "4": zero}}], "a.b": (zero,), "c": {"n": 1}}
    assert [name for name, _ in named_tensors(nested)] == [
        "optimizer_states[0].state[4].exp_avg",
        "optimizer_states[0].state.4",
        "a.b[0]",
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.float8_e5m2])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers_are_named(tmp_path, dtype, value):
    weights = {name: torch.ones(5, dtype=dtype) for name in ("good", "bad")}
    weights["bad"][3] = value
    path = tmp_path / "a.ckpt"
    WholeCheckpointIO().save_checkpoint({"state_dict": weights}, path)
    with pytest.warns(UserWarning, match=r"'bad' is not finite"):
        loaded = WholeCheckpointIO().load_checkpoint(path)
    assert not loaded["state_dict"]["bad"].float().isfinite().all()


def test_no_warning_for_ordinary_ones(tmp_path):
    path = tmp_path / "a.ckpt"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        WholeCheckpointIO().save_checkpoint({"state_dict": {**tensors(), "empty": torch.zeros(0)}}, path)
        WholeCheckpointIO().load_checkpoint(path)


class Configured(pl.LightningModule):
    def __init__(self, config, folder=None):
        super().__init__()
        self.save_hyperparameters()


def test_what_users_keep_in_checkpoints(tmp_path):
    """OmegaConf, paths and arrays are data; nobody needs ``weights_only=False`` for them."""
    path = tmp_path / "a.ckpt"
    config = OmegaConf.create({"a": 1, "b": {"c": [1, 2.5, None, True, "x"], "d": "${a}"}, "e": b"x", "f": Path("y")})
    trainer = pl.Trainer(accelerator="cpu", logger=False, plugins=[WholeCheckpointIO()])
    trainer.strategy.connect(Configured(config, Path("z")))
    trainer.save_checkpoint(path)
    content = WholeCheckpointIO().load_checkpoint(path)
    assert content["hyper_parameters"]["config"] == config
    assert content["hyper_parameters"]["folder"] == Path("z")
    arrays = {"x": np.float64(3), "y": np.arange(3), "z": np.zeros(2, dtype=np.float32)}
    WholeCheckpointIO().save_checkpoint({"state_dict": {}, "callbacks": arrays}, path)
    assert all((WholeCheckpointIO().load_checkpoint(path)["callbacks"][key] == arrays[key]).all() for key in arrays)


def test_code_is_refused_and_said_when_it_is_saved(tmp_path):
    path, code = tmp_path / "a.ckpt", Code(tmp_path / "ran")
    with pytest.warns(UserWarning, match=r"holds builtins.getattr, .*and will not be loaded"):
        WholeCheckpointIO().save_checkpoint({"state_dict": {}, "hyper_parameters": {"x": code}}, path)
    for weights_only in (None, True, False):
        with pytest.raises(CheckpointError, match=r"holds builtins.getattr, .*only data is loaded .*add_safe_globals"):
            WholeCheckpointIO().load_checkpoint(path, weights_only=weights_only)
    assert not (tmp_path / "ran").exists()


class Setting:
    """A class of the user's own, without code of its own."""


def test_a_class_that_the_user_allows(tmp_path):
    path = tmp_path / "a.ckpt"
    with pytest.warns(UserWarning, match=r"Setting, and will not be loaded"):
        WholeCheckpointIO().save_checkpoint({"state_dict": {}, "x": Setting()}, path)
    with pytest.raises(CheckpointError, match=r"holds .*Setting"):
        read_checkpoint(path)
    with torch.serialization.safe_globals([Setting]):
        assert isinstance(read_checkpoint(path)["x"], Setting)


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04", b"PK\x05\x06" + 34 * b"\0"])
def test_no_checkpoint_at_all(tmp_path, content):
    (tmp_path / "a.ckpt").write_bytes(content)
    with pytest.raises(CheckpointError, match="no whole file"):
        read_checkpoint(tmp_path / "a.ckpt")


def test_something_else_of_torch(tmp_path):
    torch.save([1], tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match="holds a list, not a checkpoint"):
        read_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(FileNotFoundError, match="there is no checkpoint file"):
        read_checkpoint(tmp_path / "b.ckpt")
