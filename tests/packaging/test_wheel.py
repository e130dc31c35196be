"""A wheel, installed away from the checkout, holds every file and trains."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHIPPED = ("lightning_swiftmoe", "hydra_plugins", "conf", "kernels", "recipes")
MAPPED = {"conf": "conf", "kernels": "kernels", "recipes": "conf/recipes"}

# Runs `python -m lightning_swiftmoe` and then names what was imported from anywhere but the installed wheel.
RUN = """
import runpy, sys
site = sys.argv.pop(1)
status = None
try:
    runpy.run_module("lightning_swiftmoe", run_name="__main__", alter_sys=True)
except SystemExit as end:
    status = end.code
ours = {n: m.__file__ for n, m in sys.modules.items() if n.startswith(("lightning_swiftmoe", "hydra_plugins.light"))}
strays = {n: f for n, f in ours.items() if f and not f.startswith(site)}
assert "lightning_swiftmoe.kernels.expert_mlp.ops" in ours, sorted(ours)
assert not strays, strays
assert status == 0, status
"""


def call(*command, cwd, **env):
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The wheel's files, installed into a folder of their own."""
    tmp = tmp_path_factory.mktemp("wheel")
    source = tmp / "source"  # built from a copy: a stale build/ of the checkout would end up in the wheel
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in SHIPPED:
        shutil.copytree(ROOT / name, source / name, ignore=skip)
    for name in ("pyproject.toml", "README.md", "LICENSE", "lightning_swiftmoe_callbacks.py"):
        shutil.copy(ROOT / name, source)
    pip = ("-m", "pip", "--disable-pip-version-check", "--quiet")
    call(*pip, "wheel", source, "--no-deps", "--no-build-isolation", "--wheel-dir", tmp / "dist", cwd=tmp)
    (wheel,) = (tmp / "dist").glob("*.whl")
    call(*pip, "install", "--no-deps", "--target", tmp / "site", wheel, cwd=tmp)
    return tmp / "site"


@pytest.mark.slow
def test_nothing_is_left_behind(site):
    for name in SHIPPED:
        installed = site / "lightning_swiftmoe" / MAPPED[name] if name in MAPPED else site / name
        for path in (ROOT / name).rglob("*"):
            if path.suffix in (".py", ".yaml", ".json", ".html", ".typed"):
                assert (installed / path.relative_to(ROOT / name)).is_file(), path
    assert (site / "lightning_swiftmoe_callbacks.py").is_file()


@pytest.mark.slow
@pytest.mark.distributed
def test_it_trains_outside_the_checkout(site, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(RUN)
    # Without a report: folders of the package are no groups, of which `report` would name one.
    overrides = ["recipes=quickstart", "trainer.max_steps=2", "data.limit_bytes=100000", "run_dir=here", "report=false"]
    call(script, site, "train", *overrides, "hydra.run.dir=here", cwd=tmp_path, PYTHONPATH=str(site))
    assert (tmp_path / "here" / "trace.npy.gz").is_file()
