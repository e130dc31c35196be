"""Hydra, told about our schemas and folders."""

from __future__ import annotations

from hydra.core.plugins import Plugins

from hydra_plugins.lightning_swiftmoe.searchpath import SwiftMoESearchPath
from lightning_swiftmoe.cli import schema


def prepare_hydra() -> None:
    """Register schemas and the search path; call before Hydra composes.

    Hydra finds plugins of installed packages by itself, but not those of editable installs.
    """
    schema.register()
    if SwiftMoESearchPath not in Plugins.instance().discover():
        Plugins.instance().register(SwiftMoESearchPath)
