"""Published methods: one file each, from knobs to segments, controls and schedule."""

from .in_context_brush import InContextBrush

__all__ = ["InContextBrush"]
