"""Pipelines from photos to pictures. Importing this does not import diffusers."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .appearance_transfer import AppearanceTransferOutput, AppearanceTransferPipeline
    from .in_context_brush import InContextBrushOutput, InContextBrushPipeline
    from .kv_edit import KVEditOutput, KVEditPipeline
    from .personalize_anything import PersonalizeAnythingOutput, PersonalizeAnythingPipeline
    from .prompt_editing import PromptEditingOutput, PromptEditingPipeline
    from .subject import SubjectFinder
    from .visual_icl import VisualICLOutput, VisualICLPipeline

__all__ = [
    "AppearanceTransferOutput",
    "AppearanceTransferPipeline",
    "InContextBrushOutput",
    "InContextBrushPipeline",
    "KVEditOutput",
    "KVEditPipeline",
    "PersonalizeAnythingOutput",
    "PersonalizeAnythingPipeline",
    "PromptEditingOutput",
    "PromptEditingPipeline",
    "SubjectFinder",
    "VisualICLOutput",
    "VisualICLPipeline",
]
_HOMES = {
    "AppearanceTransferOutput": ".appearance_transfer",
    "AppearanceTransferPipeline": ".appearance_transfer",
    "InContextBrushOutput": ".in_context_brush",
    "InContextBrushPipeline": ".in_context_brush",
    "KVEditOutput": ".kv_edit",
    "KVEditPipeline": ".kv_edit",
    "PersonalizeAnythingOutput": ".personalize_anything",
    "PersonalizeAnythingPipeline": ".personalize_anything",
    "PromptEditingOutput": ".prompt_editing",
    "PromptEditingPipeline": ".prompt_editing",
    "SubjectFinder": ".subject",
    "VisualICLOutput": ".visual_icl",
    "VisualICLPipeline": ".visual_icl",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
