"""Attention control inside diffusers: methods, processors and pipelines. Importing this does not import diffusers."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .methods import (
        CrossImageAttention,
        CustomShift,
        FastComposer,
        ImagePrompt,
        InContextBrush,
        InContextRoles,
        IPAdapter,
        PerturbedAttention,
        RegionalPrompting,
        SelfAttentionGuidance,
        SmoothedEnergy,
        TransferRoles,
        VisualInContext,
    )
    from .pipelines import AppearanceTransferPipeline, InContextBrushPipeline, VisualICLPipeline

__all__ = [
    "AppearanceTransferPipeline",
    "CrossImageAttention",
    "CustomShift",
    "FastComposer",
    "IPAdapter",
    "ImagePrompt",
    "InContextBrush",
    "InContextBrushPipeline",
    "InContextRoles",
    "PerturbedAttention",
    "RegionalPrompting",
    "SelfAttentionGuidance",
    "SmoothedEnergy",
    "TransferRoles",
    "VisualICLPipeline",
    "VisualInContext",
]
_HOMES = {
    "AppearanceTransferPipeline": ".pipelines",
    "CrossImageAttention": ".methods",
    "CustomShift": ".methods",
    "FastComposer": ".methods",
    "IPAdapter": ".methods",
    "ImagePrompt": ".methods",
    "InContextBrush": ".methods",
    "InContextBrushPipeline": ".pipelines",
    "InContextRoles": ".methods",
    "PerturbedAttention": ".methods",
    "RegionalPrompting": ".methods",
    "SelfAttentionGuidance": ".methods",
    "SmoothedEnergy": ".methods",
    "TransferRoles": ".methods",
    "VisualICLPipeline": ".pipelines",
    "VisualInContext": ".methods",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
