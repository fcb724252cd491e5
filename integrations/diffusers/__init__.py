"""apply() and what it speaks: the method protocol, handles, and one processor per architecture.

Importing this does not import diffusers: a processor does, when apply() first needs it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .apply import Handle, Record, apply
from .compose import compose
from .layer import Layer, Step
from .part import Part
from .plan import Method, Plan, Seen

if TYPE_CHECKING:
    from .flux import FluxControlledAttnProcessor
    from .sd3 import SD3ControlledAttnProcessor
    from .unet import UNetControlledAttnProcessor

__all__ = [
    "FluxControlledAttnProcessor",
    "Handle",
    "Layer",
    "Method",
    "Part",
    "Plan",
    "Record",
    "SD3ControlledAttnProcessor",
    "Seen",
    "Step",
    "UNetControlledAttnProcessor",
    "apply",
    "compose",
]
_HOMES = {
    "FluxControlledAttnProcessor": ".flux",
    "SD3ControlledAttnProcessor": ".sd3",
    "UNetControlledAttnProcessor": ".unet",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
