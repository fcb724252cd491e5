"""Regional prompting, or localised attention: words of the prompt that are seen only from their part of the
image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...bindings import Control, Segments
from ..diffusers.protocol.batch_call import Part
from ..diffusers.protocol.layer import Layer, Step
from ..diffusers.protocol.plan import Plan
from .shared import cross_batch as borrowed
from .shared.cross_batch import Window

Span = tuple[int, int]


@dataclass(eq=False)
class RegionalPrompting:
    """Regions of the image, each with its own tokens of the text; tokens of no region are everybody's.

    form="bias": an image token outside of region k sees the tokens of k with a bias, the rest as ever, so
        that they share
    one softmax:

        S_ij + log(outside)        (removed where outside is 0)       j of region k's span, i not in region k

    form="groups", for a UNet's cross-attention, where each region has a prompt of its own: the spans are
    softmaxes of their own, mixed by the masks m_k, which may be soft; s(i) = sum_k m_k(i):

        o_i = sum_k g_k(i) softmax(q_i K_k^T) V_k + (1 - sum_k g_k(i)) softmax(q_i K_rest^T) V_rest
        g_k = (1 - shared) m_k / max(1, s)

    In joint attention (FLUX, SD 3) image tokens go on seeing each other. The idea is a survey's, which gives
    no algorithm; the formulas are ours. A knob may be set at any time; ValueError names a wrong one.

    Args:
        masks: (regions, rows, columns) within 0 and 1, resized to each layer's grid by area. A token is in a
            region, for form="bias", where its area is covered to a half or more. Regions may overlap.
        spans: for each region the tokens of the text (first, one after the last), padding included.
        form: see above.
        outside: 0 to 1; 1: plain. shared: 0 to 1, how much of the region's prompts gives way to the rest of
            the text.
        closed: with form="bias" in joint attention, whether a span's text tokens, too, see only their region
            of the image and no other span; else they see all.
        items: the batch items; None: all. With classifier-free guidance the conditional ones are meant.
        steps: (first, after the last or None).
    """

    masks: Tensor
    spans: Sequence[Span]
    form: str = "bias"
    outside: float = 0.0
    shared: float = 0.0
    closed: bool = False
    items: Sequence[int] | None = None
    steps: Window = (0, None)

    def __post_init__(self) -> None:
        self._plans: dict[tuple, Plan] = {}

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "masks" and (
            not isinstance(value, Tensor) or value.dim() != 3 or not ((value >= 0) & (value <= 1)).all()
        ):
            raise ValueError("masks: expected a tensor (regions, rows, columns) within 0 and 1")
        if name == "masks" and len(value) != len(self.__dict__.get("spans", value)):
            raise ValueError(
                f"masks: expected {len(self.spans)} regions, as there are spans, got {len(value)}"
            )
        if name == "masks":
            value = value.clone()
        if name == "spans":
            value = _spans(value, len(self.masks))
        if name == "form" and value not in ("bias", "groups"):
            raise ValueError(f"form: expected 'bias' or 'groups', got {value!r}")
        if name in ("outside", "shared") and not (isinstance(value, (int, float)) and 0 <= value <= 1):
            raise ValueError(f"{name}: expected a number from 0 to 1, got {value!r}")
        if name == "closed" and not isinstance(value, bool):
            raise ValueError(f"closed: expected True or False, got {value!r}")
        if name == "items":
            value = borrowed.check_items(name, value)
        if name == "steps":
            value = borrowed.check_window(name, value)
        object.__setattr__(self, name, value)
        self.__dict__["_plans"] = {}

    def plan(self, layer: Layer, step: Step) -> Plan | None:
        idle = {"bias": ("shared",), "groups": ("outside", "closed")}[self.form]
        if unused := [f.name for f in fields(self) if f.name in idle and getattr(self, f.name) != f.default]:
            raise ValueError(
                f"{unused[0]}: it has no part in the form {self.form!r}, got {getattr(self, unused[0])!r}"
            )
        if not borrowed.within(self.steps, step.index) or layer.kind == "self":
            return None
        if layer.kind == "added" or (self.form == "groups" and layer.kind != "cross"):
            expected = "cross-attention or joint attention" if self.form == "bias" else "cross-attention"
            raise ValueError(
                f"form: {self.form!r} is made for {expected}; layer {layer.index} is {layer.kind!r}"
            )
        if layer.grid is None:
            raise ValueError(
                "RegionalPrompting: the model's inputs do not tell the grid of image tokens; set handle.grid"
            )
        if max(end for _, end in self.spans) > layer.text_len:
            raise ValueError(
                f"spans: expected tokens of the text, which has {layer.text_len}, got {self.spans}"
            )
        key = (layer.kind == "cross", layer.batch, layer.text_len, layer.grid)
        if key not in self._plans:
            with torch.inference_mode(False):
                masks = F.interpolate(self.masks.detach().cpu().float()[None], layer.grid, mode="area")[
                    0
                ].flatten(1)
                self._plans[key] = (self._biases if self.form == "bias" else self._groups)(layer, masks)
        return self._plans[key]

    def _text(self, text_len: int) -> tuple[Segments, dict[str, int]]:
        """The text cut into spans and what is between them, and which of its segments is of which region."""
        lengths, start = {}, 0
        for first, end, k in sorted((*span, k) for k, span in enumerate(self.spans)):
            lengths |= {f"rest_{k}": first - start, f"span_{k}": end - first}
            start = end
        lengths["rest"] = text_len - start
        return Segments({n: length for n, length in lengths.items() if length}), {
            f"span_{k}": k for k in range(len(self.spans))
        }

    def _biases(self, layer: Layer, masks: Tensor) -> Plan:
        text, regions = self._text(layer.text_len)
        # Image tokens of the same regions are one segment.
        kinds, labels = (masks >= 0.5).unique(dim=1, return_inverse=True)
        image, order, _ = Segments.from_labels(labels, [f"image_{n}" for n in range(kinds.shape[1])])
        lengths = dict(zip(image.names, image.lengths, strict=True))
        rows = (
            image
            if layer.kind == "cross"
            else Segments(dict(zip(text.names, text.lengths, strict=True)) | lengths)
        )
        apart = [
            (f"image_{n}", span)
            for span, k in regions.items()
            for n in range(kinds.shape[1])
            if not kinds[k, n]
        ]
        if self.closed and layer.kind != "cross":
            apart += [(span, row) for row, span in apart] + [
                (a, b) for a in regions for b in regions if a != b
            ]
        bias: float | Tensor = math.log(self.outside) if self.outside else -math.inf
        if self.items is not None:
            if max(self.items) >= layer.batch:
                raise ValueError(f"items: expected items below the batch of {layer.batch}, got {self.items}")
            bias = torch.zeros(layer.batch, 1).index_fill(0, torch.tensor(self.items), bias)
        apart = [pair for pair in apart if pair[0] in rows and pair[1] in (*text, *rows)]
        if layer.kind != "cross":
            order = torch.cat([torch.arange(layer.text_len), layer.text_len + order])
        keys = text if layer.kind == "cross" else rows
        return Plan(Control(rows, keys, bias=dict.fromkeys(apart, bias)), order=order)

    def _groups(self, layer: Layer, masks: Tensor) -> Plan:
        text, regions = self._text(layer.text_len)
        regions = {span: k for span, k in regions.items() if span in text}
        share = (1 - self.shared) * masks / masks.sum(0).clamp(min=1)
        rest = [name for name in text if name not in regions]
        groups = {span: [span] for span in regions} | ({"rest": rest} if rest else {})
        gates: dict[str, Any] = {span: share[k][None] for span, k in regions.items()}
        if rest:
            gates["rest"] = (1 - share.sum(0))[None]
        control = Control(Segments(image=layer.image_len), text, groups=groups, gates=gates)
        return Plan(control) if self.items is None else Plan(parts=[Part(self.items, control=control)])


def _spans(value: Any, count: int) -> tuple:
    spans = [
        tuple(span) if isinstance(span, (tuple, list)) else ()
        for span in (value if isinstance(value, Sequence) else ())
    ]
    right = all(len(span) == 2 and all(map(borrowed.is_count, span)) and span[0] < span[1] for span in spans)
    ends = [n for span in sorted(spans) for n in span]
    if len(spans) != count or not right or ends != sorted(ends):
        raise ValueError(f"spans: expected {count} disjoint (first, one after the last), got {value!r}")
    return tuple(spans)
