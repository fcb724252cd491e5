"""Attention control inside diffusers: methods, processors and pipelines. Importing this does not import diffusers."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .methods import (
        CrossImageAttention,
        EditRoles,
        InContextBrush,
        InContextRoles,
        InfEdit,
        LocalBlend,
        MasaCtrl,
        MutualBlend,
        MutualRoles,
        PlugAndPlay,
        PromptEdit,
        PromptToPrompt,
        TokenAlignment,
        TransferRoles,
        VisualInContext,
        WordMaps,
    )
    from .pipelines import AppearanceTransferPipeline, InContextBrushPipeline, VisualICLPipeline

__all__ = [
    "AppearanceTransferPipeline",
    "CrossImageAttention",
    "EditRoles",
    "InContextBrush",
    "InContextBrushPipeline",
    "InContextRoles",
    "InfEdit",
    "LocalBlend",
    "MasaCtrl",
    "MutualBlend",
    "MutualRoles",
    "PlugAndPlay",
    "PromptEdit",
    "PromptToPrompt",
    "TokenAlignment",
    "TransferRoles",
    "VisualICLPipeline",
    "VisualInContext",
    "WordMaps",
]
_HOMES = {
    "AppearanceTransferPipeline": ".pipelines",
    "CrossImageAttention": ".methods",
    "EditRoles": ".methods",
    "InContextBrush": ".methods",
    "InContextBrushPipeline": ".pipelines",
    "InContextRoles": ".methods",
    "InfEdit": ".methods",
    "LocalBlend": ".methods",
    "MasaCtrl": ".methods",
    "MutualBlend": ".methods",
    "MutualRoles": ".methods",
    "PlugAndPlay": ".methods",
    "PromptEdit": ".methods",
    "PromptToPrompt": ".methods",
    "TokenAlignment": ".methods",
    "TransferRoles": ".methods",
    "VisualICLPipeline": ".pipelines",
    "VisualInContext": ".methods",
    "WordMaps": ".methods",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
