"""pyproject.toml names its packages one by one, since two of them lie outside the package folder."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def test_every_package_on_disk_is_listed():
    folders = {name: folder for folder, name in SETUPTOOLS["package-dir"].items()}
    assert all(folder.startswith("lightning_swiftmoe.") for folder in folders.values())
    found = set()
    for top in ("lightning_swiftmoe", "hydra_plugins", *folders):
        for path in (ROOT / top).rglob("__init__.py"):
            parts = path.parent.relative_to(ROOT).parts
            found.add(".".join([folders.get(parts[0], parts[0]), *parts[1:]]))
    assert found == set(SETUPTOOLS["packages"])
    assert len(SETUPTOOLS["packages"]) == len(found)


def test_plugins_stay_a_namespace():
    """An ``__init__.py`` there would hide every other Hydra plugin."""
    assert not (ROOT / "hydra_plugins" / "__init__.py").exists()
