"""Published methods: one file each, from knobs to segments, controls and schedule."""

from .cross_image_attention import CrossImageAttention, TransferRoles
from .ic_custom import ICCustom
from .ic_custom_parameters import ICCustomParameters
from .in_context_brush import InContextBrush
from .kv_edit import KVEdit
from .omini_control import OminiControl
from .personal_subject import PersonalSubject
from .personalize_anything import PersonalizeAnything
from .visual_in_context import InContextRoles, VisualInContext

__all__ = [
    "CrossImageAttention",
    "ICCustom",
    "ICCustomParameters",
    "InContextBrush",
    "InContextRoles",
    "KVEdit",
    "OminiControl",
    "PersonalSubject",
    "PersonalizeAnything",
    "TransferRoles",
    "VisualInContext",
]
