"""A method's own hooks on a model: what its attach() registered beside the attention."""

from __future__ import annotations

from typing import Any

from torch import nn

from .plan import Method

_OWNER = "_flashbrush_attachment"


class Attachment:
    """A method attached to a model, until remove(); nothing where the method has no attach().

    A method with an attach() may keep facts about its model, such as the names of its layers, which are wrong
    for another model. So it controls only the model that it was attached to last: attaching marks the method,
    and check() compares the marks. A Composition returns its methods' Attachments as its hooks and has no
    mark of its own.
    """

    def __init__(self, method: Method | None, model: nn.Module) -> None:
        attach = getattr(method, "attach", None)
        self._hooks: list[Any] = [] if attach is None else list(attach(model))
        self._inner = [hook for hook in self._hooks if isinstance(hook, Attachment)]
        self._marked: Any = None if attach is None or self._inner else method
        self._mark = object()  # a deep copy of the model copies this and the method's mark alike
        if self._marked is not None:
            object.__setattr__(self._marked, _OWNER, self._mark)

    @property
    def has_hooks(self) -> bool:
        """Whether the method registered a hook of its own."""
        return any(hook.has_hooks if isinstance(hook, Attachment) else True for hook in self._hooks)

    def check(self) -> None:
        """RuntimeError where the method was attached to another model since."""
        for attachment in self._inner:
            attachment.check()
        if getattr(self._marked, _OWNER, self._mark) is not self._mark:
            name = type(self._marked).__name__
            raise RuntimeError(
                f"method: this {name} was applied to another model since and has that model's layers; make "
                f"one {name} per model, or assign handle.method again"
            )

    def remove(self) -> None:
        """Remove the method's hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._inner, self._marked = [], [], None
