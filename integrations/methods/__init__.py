"""Published methods: one file each, from knobs to segments, controls and schedule."""

from .cross_image_attention import CrossImageAttention, TransferRoles
from .custom_shift import CustomShift
from .fast_composer import FastComposer
from .image_prompt import ImagePrompt
from .in_context_brush import InContextBrush
from .ip_adapter import IPAdapter
from .perturbed_attention import PerturbedAttention
from .regional_prompting import RegionalPrompting
from .self_attention_guidance import SelfAttentionGuidance
from .smoothed_energy import SmoothedEnergy
from .visual_in_context import InContextRoles, VisualInContext

__all__ = [
    "CrossImageAttention",
    "CustomShift",
    "FastComposer",
    "IPAdapter",
    "ImagePrompt",
    "InContextBrush",
    "InContextRoles",
    "PerturbedAttention",
    "RegionalPrompting",
    "SelfAttentionGuidance",
    "SmoothedEnergy",
    "TransferRoles",
    "VisualInContext",
]
