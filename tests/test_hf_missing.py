"""Nothing but ``lightning_swiftmoe.hf`` asks for transformers, and that says what to do where there is none."""

import importlib
import subprocess
import sys
from types import ModuleType

import pytest

from tests.test_floors import MODULES, imports


@pytest.fixture
def fresh(monkeypatch):
    """As if neither ours nor theirs had been imported."""
    for name in list(sys.modules):
        if name.split(".")[0] == "transformers" or name.startswith("lightning_swiftmoe.hf"):
            monkeypatch.delitem(sys.modules, name)


@pytest.mark.usefixtures("fresh")
def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError) as refused:
        importlib.import_module("lightning_swiftmoe.hf")
    wanted = "lightning_swiftmoe.hf needs the transformers package: pip install 'lightning-swiftmoe[hf]'"
    assert str(refused.value) == wanted


@pytest.mark.parametrize("has_integrations", [False, True])
@pytest.mark.usefixtures("fresh")
def test_with_one_that_has_no_experts_interface(monkeypatch, has_integrations):
    for name in ("transformers", "transformers.activations", "transformers.integrations"):
        old = ModuleType(name)
        old.__path__ = []
        old.__version__, old.ACT2FN = "4.57.6", {}
        monkeypatch.setitem(sys.modules, name, old)
    if has_integrations:
        name = "transformers.integrations.moe"
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    with pytest.raises(ImportError) as refused:
        importlib.import_module("lightning_swiftmoe.hf")
    assert str(refused.value) == (
        "lightning_swiftmoe.hf needs transformers >= 5.17, got 4.57.6, which has no experts interface: "
        "pip install 'lightning-swiftmoe[hf]'"
    )


def test_the_package_does_without():
    """In a process of its own. That transformers is not imported cannot be asked: Lightning's metrics do it."""
    code = "import sys, lightning_swiftmoe; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert "lightning_swiftmoe.strategy" in done.stdout.split()
    assert "lightning_swiftmoe.hf" not in done.stdout.split()


def test_who_imports_transformers():
    """Besides it only what the kernels are measured against."""
    users = {name for name in MODULES for used in imports(name) if used.split(".")[0] == "transformers"}
    assert users == {"lightning_swiftmoe.hf._transformers", "lightning_swiftmoe.cli._kernel_peers"}
