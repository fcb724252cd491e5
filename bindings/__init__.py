"""What a torch user calls; the names are re-exported by `flashbrush`."""

from .attention import Stats, attention
from .control import Contrast, Control, HeadGain
from .plan import backends
from .segments import Segments

__all__ = ["Contrast", "Control", "HeadGain", "Segments", "Stats", "attention", "backends"]
