"""Published methods: one file each, from knobs to segments, controls and schedule."""

from .attention_maps import AttentionMap, AttentionMaps
from .cross_image_attention import CrossImageAttention
from .custom_shift import CustomShift
from .fast_composer import FastComposer
from .ic_custom import ICCustom
from .in_context_brush import InContextBrush
from .infedit import InfEdit
from .ip_adapter import IPAdapter
from .kv_edit import KVEdit
from .masa_ctrl import MasaCtrl
from .omini_control import OminiControl
from .personalize_anything import PersonalizeAnything
from .perturbed_attention import PerturbedAttention
from .plug_and_play import PlugAndPlay
from .prompt_to_prompt import PromptToPrompt
from .regional_prompting import RegionalPrompting
from .self_attention_guidance import SelfAttentionGuidance
from .shared.ic_custom_parameters import ICCustomParameters
from .shared.image_prompt import ImagePrompt
from .shared.local_blend import LocalBlend, MutualBlend
from .shared.personal_subject import PersonalSubject
from .shared.prompt_edit import PromptEdit
from .shared.roles import EditRoles, InContextRoles, MutualRoles, TransferRoles
from .shared.token_alignment import TokenAlignment
from .shared.word_maps import WordMaps
from .smoothed_energy import SmoothedEnergy
from .visual_in_context import VisualInContext

__all__ = [
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
    "PerturbedAttention",
    "PlugAndPlay",
    "PromptEdit",
    "PromptToPrompt",
    "RegionalPrompting",
    "SelfAttentionGuidance",
    "SmoothedEnergy",
    "TokenAlignment",
    "TransferRoles",
    "VisualInContext",
    "WordMaps",
]
