"""Attention control inside diffusers: methods, processors and pipelines. Importing this does not import
diffusers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .methods import (
        AttentionMap,
        AttentionMaps,
        CrossImageAttention,
        CustomShift,
        EditRoles,
        FastComposer,
        ICCustom,
        ICCustomParameters,
        ImagePrompt,
        InContextBrush,
        InContextRoles,
        InfEdit,
        IPAdapter,
        KVEdit,
        LocalBlend,
        MasaCtrl,
        MutualBlend,
        MutualRoles,
        OminiControl,
        PersonalizeAnything,
        PersonalSubject,
        PerturbedAttention,
        PlugAndPlay,
        PromptEdit,
        PromptToPrompt,
        RegionalPrompting,
        SelfAttentionGuidance,
        SmoothedEnergy,
        TokenAlignment,
        TransferRoles,
        VisualInContext,
        WordMaps,
    )
    from .pipelines import (
        AppearanceTransferPipeline,
        InContextBrushPipeline,
        KVEditPipeline,
        PersonalizeAnythingPipeline,
        PromptEditingPipeline,
        VisualICLPipeline,
    )

__all__ = [
    "AppearanceTransferPipeline",
    "AttentionMap",
    "AttentionMaps",
    "CrossImageAttention",
    "CustomShift",
    "EditRoles",
    "FastComposer",
    "ICCustom",
    "ICCustomParameters",
    "IPAdapter",
    "ImagePrompt",
    "InContextBrush",
    "InContextBrushPipeline",
    "InContextRoles",
    "InfEdit",
    "KVEdit",
    "KVEditPipeline",
    "LocalBlend",
    "MasaCtrl",
    "MutualBlend",
    "MutualRoles",
    "OminiControl",
    "PersonalSubject",
    "PersonalizeAnything",
    "PersonalizeAnythingPipeline",
    "PerturbedAttention",
    "PlugAndPlay",
    "PromptEdit",
    "PromptEditingPipeline",
    "PromptToPrompt",
    "RegionalPrompting",
    "SelfAttentionGuidance",
    "SmoothedEnergy",
    "TokenAlignment",
    "TransferRoles",
    "VisualICLPipeline",
    "VisualInContext",
    "WordMaps",
]
_HOMES = {
    "AppearanceTransferPipeline": ".pipelines",
    "AttentionMap": ".methods",
    "AttentionMaps": ".methods",
    "CrossImageAttention": ".methods",
    "CustomShift": ".methods",
    "EditRoles": ".methods",
    "FastComposer": ".methods",
    "ICCustom": ".methods",
    "ICCustomParameters": ".methods",
    "IPAdapter": ".methods",
    "ImagePrompt": ".methods",
    "InContextBrush": ".methods",
    "InContextBrushPipeline": ".pipelines",
    "InContextRoles": ".methods",
    "InfEdit": ".methods",
    "KVEdit": ".methods",
    "KVEditPipeline": ".pipelines",
    "LocalBlend": ".methods",
    "MasaCtrl": ".methods",
    "MutualBlend": ".methods",
    "MutualRoles": ".methods",
    "OminiControl": ".methods",
    "PersonalSubject": ".methods",
    "PersonalizeAnything": ".methods",
    "PersonalizeAnythingPipeline": ".pipelines",
    "PerturbedAttention": ".methods",
    "PlugAndPlay": ".methods",
    "PromptEdit": ".methods",
    "PromptEditingPipeline": ".pipelines",
    "PromptToPrompt": ".methods",
    "RegionalPrompting": ".methods",
    "SelfAttentionGuidance": ".methods",
    "SmoothedEnergy": ".methods",
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
