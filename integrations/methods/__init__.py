"""Published methods: one file each, from knobs to segments, controls and schedule."""

from .attention_maps import AttentionMap, AttentionMaps
from .cross_image_attention import CrossImageAttention, TransferRoles
from .in_context_brush import InContextBrush
from .visual_in_context import InContextRoles, VisualInContext

__all__ = [
    "AttentionMap",
    "AttentionMaps",
    "CrossImageAttention",
    "InContextBrush",
    "InContextRoles",
    "TransferRoles",
    "VisualInContext",
]
