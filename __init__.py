"""flashbrush: segment-controlled attention for in-context image editing."""

from . import _moved_paths
from .bindings import (
    Branch,
    Contrast,
    Control,
    HeadGain,
    Segments,
    Stats,
    adain,
    attention,
    attention_sum,
    backends,
    blend_latents,
    column_mass,
    key_probabilities,
    merge,
    qk_norm_rope,
    query_blur,
)
from .checkpoints import tiny_fill

_moved_paths.install()

__version__ = "0.1.0"
__all__ = [
    "Branch",
    "Contrast",
    "Control",
    "HeadGain",
    "Segments",
    "Stats",
    "__version__",
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
    "tiny_fill",
]
