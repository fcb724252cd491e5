"""KV-Edit (arXiv 2502.17363): new content in a region, before a background whose keys and values are kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from ...bindings import Control, Segments
from ..diffusers.protocol.layer import Layer, Step
from ..diffusers.protocol.plan import Plan, Seen

PHASES = ("invert", "edit")


@dataclass(eq=False)
class KVEdit:
    """An inversion that keeps every layer's image keys and values, and edits whose only rows are text and
    masked tokens.

    With the text T, the masked tokens M and the background B, whose keys and values are those of the
    inversion:

        o = softmax(Q_[T;M] [K_T; K_M; K_B]^T / sqrt(d) + attn_scale [0; 0; 1]) [V_T; V_M; V_B]

    in all layers of FLUX. The inversion goes through `times` upwards, by Euler, one call a step, with all
    image tokens.
    An edit comes down again: set phase="edit", let the steps count anew (Handle.reset), and call the model
        with the
    tokens `tokens` of the latents and of img_ids alone. Before each step `reblend` them; after the last
    `paste` them into the photo's latents. Another edit needs no other inversion, also with another mask
    unless the inversion was masked. The released code runs 28 steps without the 4 noisiest, at guidance 1.5
    (inversion) and 5.5 (edit). A knob may be set between calls; ValueError names a wrong one.

    Args:
        mask: bool (image tokens,), the tokens that are edited, at least one; token_masks.py makes it of one
            of the latents.
        times: noise levels of the edit, falling, one more than it has steps; those below the first that is
            skipped.
        phase: "invert" or "edit".
        attn_scale: added to the background's logits, natural units. The code has 1; 0 is plain attention.
        masked_inversion: in the inversion masked rows read text and masked tokens, background rows text and
            background, text all. The code has False.
        keep_device, keep_dtype: where and as what keys and values are kept; None: as they are. On the model's
            device and in its dtype they are read in place.
    """

    mask: Tensor
    times: Sequence[float]
    phase: Literal["invert", "edit"] = "invert"
    attn_scale: float = 1.0
    masked_inversion: bool = False
    keep_device: torch.device | str | None = None
    keep_dtype: torch.dtype | None = None
    # {(time, layer): (k, v, the model's dtype)}, k and v (batch, image tokens, heads, head_dim), the
    # background first
    kept: dict[tuple[float, int], tuple[Tensor, Tensor, torch.dtype]] = field(
        default_factory=dict, init=False, repr=False
    )

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "mask":
            if (
                not isinstance(value, Tensor)
                or value.dtype != torch.bool
                or value.dim() != 1
                or not value.any()
            ):
                raise ValueError(
                    "mask: expected a bool tensor (image tokens,) with at least one token that is edited"
                )
            value = value.clone()
            self._sort(value)
        if name == "times":
            value = tuple(value) if isinstance(value, (Sequence, Tensor)) else ()
            value = tuple(float(t) for t in value)
            if len(value) < 2 or not all(a > b for a, b in pairwise(value)):
                raise ValueError(
                    f"times: expected at least two noise levels, each below the one before, got {value}"
                )
        if name == "phase" and value not in PHASES:
            raise ValueError(f"phase: expected one of {', '.join(PHASES)}, got {value!r}")
        if name == "attn_scale" and not (isinstance(value, (int, float)) and math.isfinite(value)):
            raise ValueError(f"attn_scale: expected a finite number, got {value!r}")
        object.__setattr__(self, name, value)

    @property
    def tokens(self) -> Tensor:
        """int64 (masked tokens,): the image tokens that an edit's call consists of, in their order."""
        return self._order[self._background :]

    def plan(self, layer: Layer, step: Step) -> Plan:
        key, text = (cache_time(self.times, step.index, self.phase), layer.index), layer.text_len
        masked = len(self.mask) - self._background
        expected = len(self.mask) if self.phase == "invert" else masked
        if layer.image_len != expected:
            raise ValueError(
                f"mask: {expected} image tokens for phase={self.phase!r}, but the call has {layer.image_len}"
            )
        if self.phase == "edit":
            if key not in self.kept:
                raise ValueError(
                    f"phase: nothing is kept for time {key[0]:g} and layer {layer.index}; invert first"
                )
            k, v, dtype = self.kept[key]
            background = k[:, : self._background].to(dtype), v[:, : self._background].to(dtype)
            control = _edit(text, masked, self._background, self.attn_scale)
            return Plan(control, extra={"background": background})
        see = partial(self._keep, key, text)
        if not self.masked_inversion:
            return Plan(see=see)
        order = torch.cat([torch.arange(text, device=self._order.device), text + self._order])
        return Plan(_inversion(text, self._background, masked), order=order, see=see)

    def _keep(self, key: tuple[float, int], text: int, seen: Seen) -> None:
        order = self._order.to(seen.k.device)
        k, v = (
            t[:, text:].detach().index_select(1, order).to(device=self.keep_device, dtype=self.keep_dtype)
            for t in (seen.k, seen.v)
        )
        self.kept[key] = k, v, seen.k.dtype

    def _sort(self, mask: Tensor) -> None:
        """Bring what is kept into the order of a new mask, so that its background can be read as a view."""
        order, kept = torch.argsort(mask.to(torch.uint8), stable=True), getattr(self, "kept", {})
        if kept and (self.masked_inversion or len(mask) != len(self.mask)):
            why = "inverted with another mask" if self.masked_inversion else f"of {len(self.mask)} tokens"
            raise ValueError(f"mask: what is kept was {why}; kept.clear() and invert anew")
        for key, (k, v, dtype) in kept.items():
            moved = self._order.argsort()[order.to(self._order.device)].to(k.device)
            self.kept[key] = k.index_select(1, moved), v.index_select(1, moved), dtype
        self._order, self._background = order, int((~mask).sum())


@lru_cache(maxsize=64)
def _edit(text: int, masked: int, background: int, attn_scale: float) -> Control:
    rows = {"text": text, "masked": masked}
    bias = {("*", "background"): attn_scale}
    return Control(Segments(rows), Segments(rows | {"background": background}), bias=bias)


@lru_cache(maxsize=64)
def _inversion(text: int, background: int, masked: int) -> Control:
    bias = {("masked", "background"): -math.inf, ("background", "masked"): -math.inf}
    return Control(Segments(text=text, background=background, masked=masked), bias=bias)


def cache_time(times: Sequence[float], step: int, phase: str) -> float:
    """The time under which a step's keys are kept: the upper one of the interval that it crosses.

    The inversion meets an interval at its lower time, the edit at its upper; so both name it alike.

    Args:
        times: falling. step: from 0, of the inversion (from below) or of the edit (from above).

    Raises:
        ValueError: `times` has fewer steps.
    """
    steps = len(times) - 1
    if step >= steps:
        raise ValueError(f"times: they are of {steps} steps, got step {step}; Handle.reset() counts anew")
    return times[steps - 1 - step] if phase == "invert" else times[step]


def reblend(latents: Tensor, source: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
    """source (1 - mask) + latents mask: within masked tokens, latents that are not masked are the
    inversion's.

    Args:
        latents: (batch, masked tokens, channels), at some time. source: (batch, image tokens, channels), of
            the inversion at the same time. mask: packed, (image tokens, channels). tokens: KVEdit.tokens.
    """
    m = mask[tokens].to(latents)
    return source[:, tokens] * (1 - m) + latents * m


def paste(source: Tensor, latents: Tensor, tokens: Tensor) -> Tensor:
    """source (batch, image tokens, channels) with `latents` (batch, masked tokens, channels) at `tokens`."""
    return source.index_copy(1, tokens, latents.to(source))
