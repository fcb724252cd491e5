"""flashbrush: segment-controlled attention for in-context image editing."""

from .bindings import (
    Contrast,
    Control,
    HeadGain,
    Segments,
    Stats,
    attention,
    backends,
)

__version__ = "0.1.0"
__all__ = ["Contrast", "Control", "HeadGain", "Segments", "Stats", "__version__", "attention", "backends"]
