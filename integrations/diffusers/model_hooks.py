"""A method's own attach(): what it puts into a model beside the attention, or learns of it."""

from __future__ import annotations

from typing import Any

from torch import nn

from .protocol.compose import Composition
from .protocol.plan import Method

_OWNER = "_flashbrush_attachment"


class Attachment:
    """A method attached to a model, until remove().

    One that has an attach() may know the model by its layers' names or modules, and would take another's for
    them. So it bears a mark of the attachment that came last. The mark is an object of the method's own, so
    that copies of both agree.

    Attributes:
        hooks: what the method's own attach() returned.
    """

    def __init__(self, method: Method | None, model: nn.Module) -> None:
        attach = getattr(method, "attach", None)
        self._methods, self._mark = _attachable(method), object()
        self.hooks: list[Any] = [] if attach is None else list(attach(model))
        for one in self._methods:
            object.__setattr__(one, _OWNER, self._mark)

    def check(self) -> None:
        """RuntimeError where a method has been attached to another model since."""
        for one in self._methods:
            if getattr(one, _OWNER, self._mark) is not self._mark:
                name = type(one).__name__
                raise RuntimeError(
                    f"method: this {name} has been given to another model since, whose layers it knows now; make a {name} for "
                    "each, or assign handle.method anew"
                )

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self._methods, self.hooks = [], []


def _attachable(method: Any) -> list[Any]:
    if isinstance(method, Composition):
        return [one for part in method.methods for one in _attachable(part)]
    return [method] if getattr(method, "attach", None) is not None else []
