"""apply(), the method protocol, and one processor per architecture.

Importing this does not import diffusers: a host is imported when apply() first needs it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .apply import apply
from .handle import Handle
from .protocol.batch_call import Part
from .protocol.compose import compose
from .protocol.layer import Layer, Step
from .protocol.plan import Method, Plan, Seen
from .statistics import Record

if TYPE_CHECKING:
    from .hosts.flux import FluxControlledAttnProcessor
    from .hosts.sd3 import SD3ControlledAttnProcessor
    from .hosts.unet import UNetControlledAttnProcessor

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
    "FluxControlledAttnProcessor": ".hosts.flux",
    "SD3ControlledAttnProcessor": ".hosts.sd3",
    "UNetControlledAttnProcessor": ".hosts.unet",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
