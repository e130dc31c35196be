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
        # The group `recipes` is installed among the others. In a checkout it is a folder beside theirs.
        spec = find_spec("lightning_swiftmoe.conf.recipes")
        assert spec is not None
        assert spec.origin is not None
        parent = Path(spec.origin).parent.parent
        if parent.name != "conf":
            search_path.append("lightning_swiftmoe", f"file://{parent}")
