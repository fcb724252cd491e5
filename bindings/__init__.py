"""What a torch user calls; the names are re-exported by `flashbrush`."""

from .adain import adain
from .attention import Stats, attention
from .attention_sum import Branch, attention_sum
from .backends.planner import backends
from .blend_latents import blend_latents
from .column_mass import column_mass
from .core.control import Contrast, Control, HeadGain
from .core.segments import Segments
from .key_probabilities import key_probabilities
from .merge import merge
from .qk_norm_rope import qk_norm_rope
from .query_blur import query_blur

__all__ = [
    "Branch",
    "Contrast",
    "Control",
    "HeadGain",
    "Segments",
    "Stats",
    "adain",
    "attention",
    "attention_sum",
    "backends",
    "blend_latents",
    "column_mass",
    "key_probabilities",
    "merge",
    "qk_norm_rope",
    "query_blur",
]
