"""``swiftmoe bench step model=hf``: systems start from the same weights and train alike."""

import json

import pytest

from tests.hf.folders import save_folder
from tests.hf.paths import PYTHONPATH
from tests.processes import swiftmoe

pytestmark = [pytest.mark.distributed, pytest.mark.exhaustive]


def test_systems_train_alike(tmp_path):
    save_folder(tmp_path / "folder", max_position_embeddings=64)
    small = ("data.seq_len=32", "data.batch_size=4", "warmup=1", "steps=3", "rounds=1", "optimizer.lr=0.01")
    model = ("model=hf", f"model.path={tmp_path}/folder", "model.weights=random")
    peers = "peers=[ours_ep+strategy.dense=fsdp2,fsdp2]"
    arguments = (*model, *small, peers, f"hydra.run.dir={tmp_path}/run")
    env = {"COLUMNS": "200", "PYTHONPATH": PYTHONPATH}
    status, text = swiftmoe("bench", "step", *arguments, cwd=tmp_path, env=env, timeout_s=200)
    assert status == 0, text
    ours, fsdp2 = json.loads((tmp_path / "run/step.json").read_text())["systems"].values()
    assert max(ours["losses"]) - min(ours["losses"]) > 0.05
    assert fsdp2["losses"] == pytest.approx(ours["losses"], rel=1e-4)
    assert ours["start_s"] > 0
    assert ours["start_host_gib"] > 0.1
