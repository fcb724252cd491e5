"""The composed backend: vendor attention with LSE, one call per key segment, merged; else torch's own
operators.

It runs on every device, and is the bar that a fused kernel has to beat.
"""

from __future__ import annotations

from ..interface import Operator, never
from . import adain, attention, backward, blend_latents, column_mass, qk_norm_rope, query_blur

name = "composed"


def available() -> list[str]:
    return []


OPERATORS = {
    "attention": Operator(attention.forward, attention.why_not),
    "attention_backward": Operator(backward.backward, never),
    "column_mass": Operator(column_mass.column_mass, never),
    "qk_norm_rope": Operator(qk_norm_rope.forward, never),
    "qk_norm_rope_backward": Operator(qk_norm_rope.backward, never),
    "query_blur": Operator(query_blur.query_blur, never),
    "blend_latents": Operator(blend_latents.blend_latents, never),
    "adain": Operator(adain.adain, never),
}
