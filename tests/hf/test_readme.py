"""The lines of the README that train a model of transformers run as printed."""

import re
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from tests.hf.folders import save_folder

README = (Path(__file__).parents[2] / "README.md").read_text()


@pytest.mark.filterwarnings("ignore:.*num_workers:UserWarning")
def test_the_lines_train(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```py\n(.*?)```", README, flags=re.DOTALL)
    (code,) = (block for block in blocks if "AutoModelForCausalLM" in block)
    ids = torch.arange(3, 19).expand(2, 16)
    names = {"pl": pl, "torch": torch, "folder": save_folder(tmp_path / "folder")}
    batch = {"input_ids": ids, "labels": ids}
    names["loader"] = torch.utils.data.DataLoader([batch] * 20, batch_size=None)
    exec(code, names)
    (checkpoint,) = tmp_path.glob("lightning_logs/*/checkpoints/*.ckpt")
    module = names["Tuned"](names["folder"])
    before = module.training_step(batch, 0).item()
    module.load_state_dict(torch.load(checkpoint)["state_dict"])
    assert module.training_step(batch, 0).item() < before
