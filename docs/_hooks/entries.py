"""For mkdocstrings: what reading the package without running it gets wrong.

* A function lives in a module of its own name, bindings/attention.py, and the package imports it from there.
  Read, `flashbrush.attention` would be that module. Here the imports are followed.
* The default of a method's knob is written in its descriptor, `alpha: float = Number(0.3, low=-1)`. The entry
  shows the default, 0.3.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
from pathlib import Path
from typing import Any

from griffe import Alias, Attribute, Class, Extension, GriffeLoader, Module


class Entries(Extension):
    """Mends the public names of flashbrush."""

    def on_package(self, *, pkg: Module, loader: GriffeLoader, **kwargs: Any) -> None:
        if pkg.name != "flashbrush":
            return
        for module in (pkg, pkg["integrations.diffusers"]):
            point_at_functions(module)
        sys.path.insert(0, str(Path(str(pkg.filepath)).parents[1]))
        try:
            show_defaults(pkg["integrations.methods"])
        finally:
            sys.path.pop(0)


def point_at_functions(module: Any) -> None:
    for name in [str(n) for n in module.exports or ()]:
        thing: Any = module.members[name]
        if (thing.final_target if isinstance(thing, Alias) else thing).is_module:
            module.members[name] = Alias(name, defined_by(module, name), parent=module)


def defined_by(module: Any, name: str) -> Any:
    """The object that `from module import name` gives."""
    for node in ast.walk(ast.parse(module.source)):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        imported = next((a.name for a in node.names if (a.asname or a.name) == name), None)
        if imported is None:
            continue
        home: Any = module if module.is_init_module else module.parent
        for _ in range(node.level - 1):
            home = home.parent
        for part in (node.module or "").split("."):
            home = home.members[part]
        return defined_by(home, imported)
    return module.members[name]


def show_defaults(module: Any) -> None:
    """Write the real defaults into the fields of the module's public dataclasses."""
    real = importlib.import_module(module.path)
    for name in map(str, module.exports or ()):
        entry: Any = module.members[name]
        entry = entry.final_target if isinstance(entry, Alias) else entry
        cls: Any = getattr(real, name)
        if not isinstance(entry, Class) or "__dataclass_fields__" not in vars(cls):
            continue
        for parameter in inspect.signature(cls).parameters.values():
            field: Any = entry.members.get(parameter.name)
            knob = isinstance(field, Attribute) and "(" in str(field.value or "")
            if knob and parameter.default is not inspect.Parameter.empty:
                field.value = repr(parameter.default)
            elif knob:
                field.value = None
