"""For mkdocstrings: `flashbrush.attention` is the function, not the module of the same name that defines it.

A function lives in a module of its own name, bindings/attention.py, and the package imports it from there.
Griffe, which reads the package without running it, takes the module. Here the imports themselves are followed.
"""

from __future__ import annotations

import ast
from typing import Any

from griffe import Alias, Extension, GriffeLoader, Module, Object


def defined_by(module: Module, name: str) -> Object:
    """The object that `from module import name` gives."""
    for node in ast.walk(ast.parse(module.source)):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        imported = next((a.name for a in node.names if (a.asname or a.name) == name), None)
        if imported is None:
            continue
        home = module if module.is_init_module else module.parent
        for _ in range(node.level - 1):
            home = home.parent
        for part in (node.module or "").split("."):
            home = home.members[part]
        return defined_by(home, imported)
    return module.members[name]


class ShadowedNames(Extension):
    """Points the public names of a package at the member that bears the module's name."""

    def on_package(self, *, pkg: Module, loader: GriffeLoader, **kwargs: Any) -> None:
        if pkg.name != "flashbrush":
            return
        for module in (pkg, pkg["integrations.diffusers"]):
            for name in [str(n) for n in module.exports or ()]:
                thing = module.members[name]
                if (thing.final_target if isinstance(thing, Alias) else thing).is_module:
                    module.members[name] = Alias(name, defined_by(module, name), parent=module)
