"""Attention control inside diffusers: methods and pipelines.

Names are imported when they are first used, so importing this does not import diffusers.
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


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = ".pipelines" if name.endswith("Pipeline") else ".methods"
    return getattr(import_module(home, __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
