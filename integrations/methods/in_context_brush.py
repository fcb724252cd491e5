"""In-Context Brush (arXiv 2505.20271): insert a subject from one panel of a diptych into the other."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from torch import Tensor

from ...bindings import Control, HeadGain, Segments
from ..diffusers.protocol.layer import Layer, Step
from ..diffusers.protocol.plan import Plan
from .shared.diptych import cut_hole, split
from .shared.knobs import Choice, Counts, Flag, Mask, Number


@dataclass(unsafe_hash=True)
class InContextBrush:
    """Weigh prompt and subject more in the target's rows, and amplify heads that attend to the prompt.

    With the prompt p, the subject's panel c, the target's panel s and A the softmax over all keys, in each
    head:

        h_s = (1 + alpha_prompt) A_sp v_p + (1 + alpha_subject) A_sc v_c + A_ss v_s   Eq. 5, in double blocks
        h  <- (gain_floor + gain_span * norm over heads of sum(A_sp)) h               Eqs. 6-8, in all blocks

    at every step; nothing is renormalised. FLUX's image tokens are one panel after the other, as in a
    vertical diptych. The defaults are the released code's. A knob may be set at any time, between steps
    too.

    Args:
        alpha_prompt: at least -1; 0.3 in the code, 0.1 to 0.5 in the paper.
        alpha_subject: at least -1; 0.3 in the code, 0.1 to 0.5 in the paper.
        gain_span: how far gains rise above the floor.
        gain_floor: the gain of a head without mass. The code's gains are 1 to 1.2.
        gain_norm: "minmax" (code), "mean", "max" or "softmax"; the paper says "Norm" only. See HeadGain.
        gain_rows: the rows that the gain multiplies: "*", all (code), or "target" (Eq. 8).
        count_padding: True: all text tokens are the prompt (code; the paper does not say). False: the first
            `prompt_tokens` are, and padding is neither weighed nor counted.
        prompt_tokens: a number, or one for each item.
        subject_tokens: of the image tokens, a number or one for each item; None: half.
        subject_first: whether the subject's panel comes first (code), or last as FLUX Kontext's references.
        hole: the target's painted tokens, bool (image tokens,) or (batch, image tokens): only their rows
            weigh prompt and subject, add mass to the gain and, with gain_rows="target", are multiplied by it.
            None: the whole target (paper and code).

    Raises:
        ValueError: a wrong knob, by name; when the model is called, token numbers that do not fit.

    Examples:
        >>> import flashbrush as fb
        >>> from diffusers import FluxFillPipeline
        >>> from flashbrush.integrations import InContextBrush
        >>> from flashbrush.integrations.diffusers import apply
        >>> pipe = FluxFillPipeline.from_pretrained(fb.tiny_fill())  # or black-forest-labs/FLUX.1-Fill-dev
        >>> size = {"height": 128, "width": 64, "max_sequence_length": 16}
        >>> with apply(pipe.transformer, InContextBrush(alpha_subject=0.5)):
        ...     images = pipe(prompt, image=diptych, mask_image=mask, num_inference_steps=2, **size).images
    """

    alpha_prompt: float = Number(0.3, low=-1)
    alpha_subject: float = Number(0.3, low=-1)
    gain_span: float = Number(0.2)
    gain_floor: float = Number(1.0)
    gain_norm: Literal["minmax", "mean", "max", "softmax"] = Choice("minmax", "mean", "max", "softmax")
    gain_rows: Literal["*", "target"] = Choice("*", "target")
    count_padding: bool = Flag(True)
    prompt_tokens: int | Sequence[int] | Tensor | None = Counts("item", None)
    subject_tokens: int | Sequence[int] | Tensor | None = Counts("item", None)
    subject_first: bool = Flag(True)
    hole: Tensor | None = Mask("image tokens", "batch, image tokens", default=None)

    @property
    def segments(self) -> tuple[str, ...]:
        """The segments' names, in the order of the control's tables and statistics."""
        text = ("prompt",) if self.count_padding else ("prompt", "padding")
        image = ("subject", "target") if self.subject_first else ("target", "subject")
        return (*text, *image) if self.hole is None else (*text, *image, "hole")

    def plan(self, layer: Layer, step: Step) -> Plan:
        return _plan(copy(self), layer.kind != "single", layer.text_len, layer.image_len)


@lru_cache(maxsize=64)
def _plan(knobs: InContextBrush, shift: bool, text_len: int, image_len: int) -> Plan:
    prompt = (text_len,) if knobs.count_padding else knobs.prompt_tokens
    subject = image_len / 2 if knobs.subject_tokens is None else knobs.subject_tokens
    lengths = split("prompt", prompt, "padding", text_len) | split("subject", subject, "target", image_len)
    segments = Segments({name: lengths[name] for name in knobs.segments if name in lengths})
    rows, order = "target", None
    if knobs.hole is not None:
        rows, (segments, order) = "hole", cut_hole(segments, knobs.hole, text_len)
    weight = {(rows, "prompt"): 1 + knobs.alpha_prompt, (rows, "subject"): 1 + knobs.alpha_subject}
    gained = rows if knobs.gain_rows == "target" else "*"
    gain = HeadGain(rows, "prompt", knobs.gain_span, knobs.gain_floor, knobs.gain_norm, apply_to=gained)
    return Plan(Control(segments, weight=weight if shift else None, head_gain=gain), order=order)
