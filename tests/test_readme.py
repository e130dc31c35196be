"""What the README shows runs as printed."""

import re
from pathlib import Path

import pytest

from tests.processes import python

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_two_commands_to_remember():
    assert re.findall(r"make (\w+)", README.split("##")[0]) == ["quickstart", "test"]


def test_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert len(links) > 3
    missing = [link for link in links if not (Path(__file__).parents[1] / link).exists()]
    assert not missing


@pytest.mark.slow
@pytest.mark.distributed
def test_the_ten_lines_train(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(code.splitlines()) == 10
    (tmp_path / "example.py").write_text(code)
    status, text = python("example.py", cwd=tmp_path, env={"OMP_NUM_THREADS": "1"})
    assert status == 0, text
    assert list(tmp_path.glob("lightning_logs/*/checkpoints/*.ckpt"))
