"""Published methods: one file each, from knobs to segments, controls and schedule."""

from .attention_maps import AttentionMap, AttentionMaps
from .cross_image_attention import CrossImageAttention, TransferRoles
from .edit_roles import EditRoles
from .ic_custom import ICCustom
from .ic_custom_parameters import ICCustomParameters
from .in_context_brush import InContextBrush
from .infedit import InfEdit, MutualBlend, MutualRoles
from .kv_edit import KVEdit
from .local_blend import LocalBlend
from .masa_ctrl import MasaCtrl
from .omini_control import OminiControl
from .personal_subject import PersonalSubject
from .personalize_anything import PersonalizeAnything
from .plug_and_play import PlugAndPlay
from .prompt_to_prompt import PromptEdit, PromptToPrompt
from .token_alignment import TokenAlignment
from .visual_in_context import InContextRoles, VisualInContext
from .word_maps import WordMaps

__all__ = [
    "AttentionMap",
    "AttentionMaps",
    "CrossImageAttention",
    "EditRoles",
    "ICCustom",
    "ICCustomParameters",
    "InContextBrush",
    "InContextRoles",
    "InfEdit",
    "KVEdit",
    "LocalBlend",
    "MasaCtrl",
    "MutualBlend",
    "MutualRoles",
    "OminiControl",
    "PersonalSubject",
    "PersonalizeAnything",
    "PlugAndPlay",
    "PromptEdit",
    "PromptToPrompt",
    "TokenAlignment",
    "TransferRoles",
    "VisualInContext",
    "WordMaps",
]
