"""A method's own attach(): what it puts into a model beside the attention, or learns of it."""

from __future__ import annotations

import gc
from typing import Any
from weakref import WeakValueDictionary

from torch import nn

from .compose import Composition
from .plan import Method

# id(method with an attach()): the model it is attached to
_models: WeakValueDictionary[int, nn.Module] = WeakValueDictionary()


class Attachment:
    """Methods attached to a model, until remove().

    One that has an attach() may know the model by its layers' names or modules, and would take another's for them: it is
    attached to one model at a time.

    Attributes:
        hooks: what the methods' own attach() returned.

    Raises:
        RuntimeError: a method is attached to another model.
    """

    def __init__(self, method: Method | None, model: nn.Module) -> None:
        self.methods, self.hooks, self._model = _attachable(method), [], model
        for one in self.methods:
            _check_free(one, model)
        try:
            for one in self.methods:
                self.hooks += one.attach(model)
        except Exception:  # one refuses the model: the others leave it as it was
            self.remove()
            raise
        for one in self.methods:
            _models[id(one)] = model

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()
        for one in self.methods:
            if _models.get(id(one)) is self._model:
                del _models[id(one)]
        self.methods, self.hooks = [], []


def _attachable(method: Any) -> list[Any]:
    if isinstance(method, Composition):
        return [one for part in method.methods for one in _attachable(part)]
    return [method] if hasattr(method, "attach") else []


def _check_free(method: object, model: nn.Module) -> None:
    if _models.get(id(method), model) is model:
        return
    gc.collect()  # a model that nobody has any more, but its own control
    if _models.get(id(method), model) is not model:
        name = type(method).__name__
        raise RuntimeError(
            f"method: this {name} controls another model, whose layers it knows; remove that handle, or make another {name}"
        )
