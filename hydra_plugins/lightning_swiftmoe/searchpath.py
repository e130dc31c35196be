"""Offers our config groups and recipes to every Hydra application."""

from importlib.util import find_spec
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class SwiftMoESearchPath(SearchPathPlugin):
    """Appends this package's configs behind the application's own."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Called by Hydra at start-up."""
        search_path.append("lightning_swiftmoe", "pkg://lightning_swiftmoe.conf")
        # The group `recipes` is a folder beside others: its parent differs between a checkout and an installed package.
        spec = find_spec("lightning_swiftmoe.recipes")
        assert spec is not None
        assert spec.origin is not None
        search_path.append("lightning_swiftmoe", f"file://{Path(spec.origin).parent.parent}")
