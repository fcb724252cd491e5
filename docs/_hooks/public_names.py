"""Fails the build where a public name has no entry on the site.

Public are the names in `__all__` of the package, of flashbrush.integrations, of its pipelines and of
flashbrush.integrations.diffusers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority

PACKAGES = (
    "flashbrush",
    "flashbrush.integrations",
    "flashbrush.integrations.pipelines",
    "flashbrush.integrations.diffusers",
)
NOT_DOCUMENTED = {"flashbrush.__version__"}


def public_names(root: Path) -> dict[str, set[str]]:
    """Each public name, as flashbrush.attention, with the paths under which its entry may stand."""
    package = griffe.load("flashbrush", search_paths=[str(root / ".typing")])
    found: dict[str, set[str]] = {}
    for module in PACKAGES:
        members: Any = package if module == package.path else package[module.removeprefix("flashbrush.")]
        for name in members.exports or ():
            path = f"{module}.{name}"
            thing: Any = members.members[str(name)]
            target = thing.target_path if thing.is_alias else thing.path
            found[path] = {path, target, f"{target}.{name}"} | {
                p for p in (f"flashbrush.integrations.{name}",) if module.endswith(".pipelines")
            }
    return {name: paths for name, paths in found.items() if name not in NOT_DOCUMENTED}


def missing(names: dict[str, set[str]], documented: set[str]) -> list[str]:
    return sorted(name for name, paths in names.items() if not paths & documented)


@event_priority(-100)  # after mkdocstrings, which rendered the entries
def on_post_build(config: MkDocsConfig) -> None:
    plugin: Any = config.plugins["mkdocstrings"]
    entries = plugin.handlers.inventory
    names = public_names(Path(config.docs_dir).parent)
    # A module's entry is not that of the function whose name it bears.
    documented = {name for name, entry in entries.items() if entry.role != "module"}
    if absent := missing(names, documented):
        raise PluginError(f"public names without an entry on the site: {', '.join(absent)}")
