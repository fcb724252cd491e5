"""The triton backend: the launchers of the Triton kernels in kernels/."""

from __future__ import annotations

from ..gpu.device import triton_reasons as available
from ..gpu.eligibility import attention_reasons, tensor_reasons
from ..interface import Operator
from . import adain, attention, backward, blend_latents, column_mass, qk_norm_rope, query_blur

__all__ = ["OPERATORS", "available", "name"]
name = "triton"

OPERATORS = {
    "attention": Operator(attention.forward, attention_reasons),
    "attention_backward": Operator(backward.backward, attention_reasons),
    "column_mass": Operator(column_mass.column_mass, attention_reasons),
    "qk_norm_rope": Operator(qk_norm_rope.forward, qk_norm_rope.why_not),
    "qk_norm_rope_backward": Operator(qk_norm_rope.backward, qk_norm_rope.why_not),
    "query_blur": Operator(query_blur.query_blur, tensor_reasons),
    "blend_latents": Operator(blend_latents.blend_latents, blend_latents.why_not),
    "adain": Operator(adain.adain, adain.why_not),
}
