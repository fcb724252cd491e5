"""Regional prompting, or localised attention: some words act only on a part of the image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ...bindings import Control, Segments
from ..diffusers.protocol.batch_call import Part
from ..diffusers.protocol.layer import Layer, Step
from ..diffusers.protocol.plan import Plan
from .shared.knobs import Choice, Flag, Items, Share, SoftMask, Spans, Window
from .shared.layers_and_steps import known_grid, within
from .shared.regions import image_segments, joined, on_grid, outside_pairs, text_first, text_segments


@dataclass(eq=False)
class RegionalPrompting:
    """Regions of the image, each with its own tokens of the text; all regions attend to the other tokens.

    form="bias": an image token outside of region k attends to the tokens of k with a bias, in one softmax:

        S_ij + log(outside)        (removed where outside is 0)       j in region k's span, i not in region k

    form="groups", for a UNet's cross-attention, where each region has a prompt of its own: each span has a
    softmax of its own, and they are mixed by the masks m_k, which may be soft; s(i) = sum_k m_k(i):

        o_i = sum_k g_k(i) softmax(q_i K_k^T) V_k + (1 - sum_k g_k(i)) softmax(q_i K_rest^T) V_rest
        g_k = (1 - shared) m_k / max(1, s)

    In joint attention (FLUX, SD 3) image tokens still attend to each other. The idea is a survey's, which
    gives no algorithm; the formulas are ours. A knob may be set at any time.

    Args:
        masks: (regions, rows, columns) within 0 and 1, resized to each layer's grid by area; regions may
            overlap. For form="bias" a token is in a region that covers half of it or more.
        spans: for each region its text tokens (first, one after the last), padding included.
        form: "bias" or "groups".
        outside: 0 to 1, for form="bias"; 1: plain.
        shared: 0 to 1, for form="groups": how much of the regions' prompts gives way to the rest of the
            text.
        closed: for form="bias" in joint attention: whether a span's text tokens, too, attend only to their
            region of the image and to no other span. False: they attend to all.
        items: the batch items, with classifier-free guidance the conditional ones; None: all.
        steps: (first, the one after the last or None).

    Raises:
        ValueError: a wrong knob, by name; other numbers of masks and spans. When the model is called: a
            knob of the other form, spans or items that do not fit, a grid that is not known (FLUX without
            ``handle.grid``).

    Examples:
        >>> import torch
        >>> from diffusers import StableDiffusionPipeline
        >>> from flashbrush.integrations import RegionalPrompting
        >>> from flashbrush.integrations.diffusers import apply
        >>> pipe = StableDiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
        >>> masks = torch.zeros(2, 16, 16)
        >>> masks[0, :, :8] = masks[1, :, 8:] = 1  # left and right
        >>> method = RegionalPrompting(masks, spans=[(1, 3), (4, 6)])  # "a cat" and "a dog"
        >>> with apply(pipe.unet, method):
        ...     images = pipe("a cat and a dog", num_inference_steps=2).images
    """

    masks: Tensor = SoftMask("regions, rows, columns")
    spans: Sequence[tuple[int, int]] = Spans()
    form: Literal["bias", "groups"] = Choice("bias", "groups")
    outside: float = Share(0.0)
    shared: float = Share(0.0)
    closed: bool = Flag(False)
    items: Sequence[int] | None = Items()
    steps: tuple[int, int | None] = Window()

    def _knob_changes(self, name: str, value: Any) -> None:
        other = {"masks": "spans", "spans": "masks"}.get(name, name)
        if other != name and len(value) != (count := len(getattr(self, other, value))):
            raise ValueError(f"{name}: expected {count} regions, as in {other}, got {len(value)}")
        self._plans: dict[tuple, Plan] = {}

    def plan(self, layer: Layer, step: Step) -> Plan | None:
        bias = self.form == "bias"
        idle = {"shared": self.shared} if bias else {"outside": self.outside, "closed": self.closed}
        if unused := [name for name, value in idle.items() if value]:
            raise ValueError(f"{unused[0]}: the form {self.form!r} does not use it, got {idle[unused[0]]!r}")
        if not within(self.steps, step.index) or layer.kind == "self":
            return None
        if layer.kind == "added" or not (bias or layer.kind == "cross"):
            expected = "cross-attention or joint attention" if bias else "cross-attention"
            raise ValueError(f"form: {self.form!r} is for {expected}; layer {layer.index} is {layer.kind!r}")
        if max(end for _, end in self.spans) > layer.text_len:
            raise ValueError(
                f"spans: expected tokens of the text, which has {layer.text_len}, got {self.spans}"
            )
        key = (layer.kind == "cross", layer.batch, layer.text_len, known_grid(layer))
        if key not in self._plans:
            with torch.inference_mode(False):  # cached: inference tensors cannot be used in a backward pass
                masks = on_grid(self.masks, known_grid(layer))
                self._plans[key] = self._biases(layer, masks) if bias else self._groups(layer, masks)
        return self._plans[key]

    def _biases(self, layer: Layer, masks: Tensor) -> Plan:
        text, regions = text_segments(self.spans, layer.text_len)
        image, order, members = image_segments(masks)
        outside = outside_pairs(image, members, regions)
        rows, keys = image, text
        if layer.kind != "cross":
            rows = keys = joined(text, image)
            order = text_first(order, layer.text_len)
            if self.closed:
                outside += [(span, row) for row, span in outside]
                outside += [(a, b) for a in regions for b in regions if a != b]
        bias: float | Tensor = math.log(self.outside) if self.outside else -math.inf
        if self.items is not None:
            if max(self.items) >= layer.batch:
                raise ValueError(f"items: expected items below the batch of {layer.batch}, got {self.items}")
            bias = torch.zeros(layer.batch, 1).index_fill(0, torch.tensor(self.items), bias)
        return Plan(Control(rows, keys, bias=dict.fromkeys(outside, bias)), order=order)

    def _groups(self, layer: Layer, masks: Tensor) -> Plan:
        text, regions = text_segments(self.spans, layer.text_len)
        share = (1 - self.shared) * masks / masks.sum(0).clamp(min=1)
        rest = [name for name in text if name not in regions]
        groups = {span: [span] for span in regions} | ({"rest": rest} if rest else {})
        gates: dict[str, Any] = {span: share[k][None] for span, k in regions.items()}
        if rest:
            gates["rest"] = (1 - share.sum(0))[None]
        control = Control(Segments(image=layer.image_len), text, groups=groups, gates=gates)
        return Plan(control) if self.items is None else Plan(parts=[Part(self.items, control=control)])
