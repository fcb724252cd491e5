"""In-Context Brush (arXiv 2505.20271): a subject from one panel of a diptych inserted into the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from ...bindings import Control, HeadGain, Segments
from ..diffusers.protocol.layer import Layer, Step
from ..diffusers.protocol.plan import Plan

CHOICES = {"gain_norm": ("minmax", "mean", "max", "softmax"), "gain_rows": ("target", "*")}
LEAST = {"alpha_prompt": -1.0, "alpha_subject": -1.0, "gain_span": -math.inf, "gain_floor": -math.inf}


@dataclass(unsafe_hash=True)
class InContextBrush:
    """Latent feature shifting (Eq. 5) in double blocks and head reweighting (Eqs. 6-8) in all blocks, at
    every step.

    With the prompt p, the subject's panel c, the target's panel s, and A the softmax over all keys, in each
    head:

        h_s = (1 + alpha_prompt) A_sp v_p + (1 + alpha_subject) A_sc v_c + A_ss v_s        (not renormalised)
        h  <- (gain_floor + gain_span * norm over heads of sum(A_sp)) h

    The image tokens are one panel after the other, as in a vertical diptych. All defaults are the released
    code's, the only setting that is known exactly. A knob may be set at any time, between steps too;
    ValueError names a wrong one.

    Args:
        alpha_prompt, alpha_subject: >= -1. The code has 0.3; the paper finds 0.1 to 0.5 good.
        gain_span, gain_floor, gain_norm: the code has minmax to gains of 1 to 1.2; the paper says "Norm" and
            no more.
        gain_rows: the rows that the gain multiplies: "*", all (code), or "target" (paper, Eq. 8).
        count_padding: True: the prompt is all text tokens (code; the paper is silent). False: the first
            `prompt_tokens`, and padding is neither weighted nor counted.
        prompt_tokens, subject_tokens: an int, or one for each item (sequence or int tensor); of the image,
            None is half.
        subject_first: whether the subject's panel comes first (code), or last as FLUX Kontext's references
            do.
        hole: bool (image tokens,) or (batch, image tokens), the target's tokens that are painted: only they
            are shifted, and only they decide and, with gain_rows="target", have the gain. None: all of the
            target (paper and code).
    """

    alpha_prompt: float = 0.3
    alpha_subject: float = 0.3
    gain_span: float = 0.2
    gain_floor: float = 1.0
    gain_norm: Literal["minmax", "mean", "max", "softmax"] = "minmax"
    gain_rows: str = "*"
    count_padding: bool = True
    prompt_tokens: int | Sequence[int] | Tensor | None = None
    subject_tokens: int | Sequence[int] | Tensor | None = None
    subject_first: bool = True
    hole: Tensor | None = None

    def __setattr__(self, name: str, value) -> None:
        if name in CHOICES and value not in CHOICES[name]:
            raise ValueError(f"{name}: expected one of {', '.join(CHOICES[name])}, got {value!r}")
        if name in LEAST and not (
            isinstance(value, (int, float)) and LEAST[name] <= value and math.isfinite(value)
        ):
            raise ValueError(f"{name}: expected a finite number >= {LEAST[name]:g}, got {value!r}")
        if name == "hole" and value is not None:
            if not isinstance(value, Tensor) or value.dtype != torch.bool or value.dim() not in (1, 2):
                raise ValueError(
                    "hole: expected a bool tensor (image tokens,) or (batch, image tokens), or None"
                )
            value = value.clone()
        elif isinstance(value, (list, tuple, Tensor)):
            value = tuple(torch.as_tensor(value).reshape(-1).tolist())
        object.__setattr__(self, name, value)

    @property
    def segments(self) -> tuple[str, ...]:
        """The names of the segments that the tokens fall into, in their order in the control's tables and
        statistics.
        """
        text = ("prompt",) if self.count_padding else ("prompt", "padding")
        image = ("subject", "target") if self.subject_first else ("target", "subject")
        return (*text, *image) if self.hole is None else (*text, *image, "hole")

    def plan(self, layer: Layer, step: Step) -> Plan:
        return _plan(copy(self), layer.kind != "single", layer.text_len, layer.image_len)


@lru_cache(maxsize=64)
def _plan(knobs: InContextBrush, shift: bool, text_len: int, image_len: int) -> Plan:
    subject = image_len / 2 if knobs.subject_tokens is None else knobs.subject_tokens
    text = (
        {"prompt": text_len}
        if knobs.count_padding
        else _split("prompt", knobs.prompt_tokens, "padding", text_len)
    )
    image = _split("subject", subject, "target", image_len)
    segments = Segments(text | (image if knobs.subject_first else dict(reversed(image.items()))))
    rows, order = "target", None
    if knobs.hole is not None:
        rows, (segments, order) = "hole", _with_hole(segments, knobs.hole, text_len, image_len)
    weight = {(rows, "prompt"): 1 + knobs.alpha_prompt, (rows, "subject"): 1 + knobs.alpha_subject}
    gained = rows if knobs.gain_rows == "target" else "*"
    gain = HeadGain(rows, "prompt", knobs.gain_span, knobs.gain_floor, knobs.gain_norm, apply_to=gained)
    return Plan(Control(segments, weight=weight if shift else None, head_gain=gain), order=order)


def _with_hole(segments: Segments, hole: Tensor, text_len: int, image_len: int) -> tuple[Segments, Tensor]:
    """The segments with the target's hole as the last one, and the order of tokens that has it there."""
    if hole.shape[-1] != image_len:
        raise ValueError(f"hole: expected {image_len} image tokens, got {hole.shape[-1]}")
    lengths = torch.tensor(segments.lengths) if segments.items is None else segments.items.cpu()
    ends = lengths.cumsum(-1)[..., None]  # ([batch,] segments, 1)
    labels = (torch.arange(text_len + image_len) >= ends).sum(-2)
    target, painted = segments.index("target"), torch.nn.functional.pad(hole.cpu(), (text_len, 0))
    labels = torch.where(painted & (labels == target), len(segments), labels)
    sorted_segments, order, _ = Segments.from_labels(labels, [*segments.names, "hole"])
    return sorted_segments, order


def _split(name: str, tokens, rest: str, total: int) -> dict[str, int | Tensor]:
    counts = tokens if isinstance(tokens, tuple) else (tokens,)
    if any(not isinstance(n, (int, float)) or n % 1 or not 0 <= n <= total for n in counts):
        raise ValueError(f"{name}_tokens: expected whole numbers from 0 to {total}, got {tokens}")
    first = torch.tensor(counts).int() if counts[1:] else int(counts[0])
    return {name: first, rest: total - first}
