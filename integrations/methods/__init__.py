"""Published methods: one file each, from knobs to segments, controls and schedule."""

from .cross_image_attention import CrossImageAttention, TransferRoles
from .edit_roles import EditRoles
from .in_context_brush import InContextBrush
from .infedit import InfEdit, MutualBlend, MutualRoles
from .local_blend import LocalBlend
from .masa_ctrl import MasaCtrl
from .plug_and_play import PlugAndPlay
from .prompt_to_prompt import PromptEdit, PromptToPrompt
from .token_alignment import TokenAlignment
from .visual_in_context import InContextRoles, VisualInContext
from .word_maps import WordMaps

__all__ = [
    "CrossImageAttention",
    "EditRoles",
    "InContextBrush",
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
    "VisualInContext",
    "WordMaps",
]
