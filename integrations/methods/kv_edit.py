"""KV-Edit (arXiv 2502.17363): new content in a region, with the background's keys and values kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, Literal

import torch
from torch import Tensor

from ...bindings import Control, Segments
from ..diffusers.protocol.layer import Layer, Step
from ..diffusers.protocol.plan import Plan, Seen
from .shared.knobs import Choice, Falling, Flag, Mask, Number
from .shared.masked_edit import cache_time, paste, reblend

__all__ = ["KVEdit", "cache_time", "paste", "reblend"]


@dataclass(eq=False)
class KVEdit:
    """An inversion keeps each layer's image keys and values; an edit computes text and masked tokens only.

    With the text T, the masked tokens M, and the background B with the inversion's keys and values:

        o = softmax(Q_[T;M] [K_T; K_M; K_B]^T / sqrt(d) + attn_scale [0; 0; 1]) [V_T; V_M; V_B]

    in all layers of FLUX. The inversion goes up through `times` in Euler steps, one call a step, with all
    image tokens. An edit goes down through them: set phase="edit", call Handle.reset(), and call the model
    with the masked tokens only, the `tokens` of the latents and of img_ids. Before each step `reblend` the
    latents; after the last `paste` them into the photo's. Other edits, and other masks unless
    `masked_inversion`, need no new inversion. The released code has 28 steps without the 4 noisiest, and
    guidance of 1.5 (inversion) and 5.5 (edit). KVEditPipeline does all this. A knob may be set between calls.

    Args:
        mask: bool (image tokens,), the tokens that are edited, at least one; token_masks.token_mask() makes
            it from a mask of the latents.
        times: decreasing noise levels of the edit, one more than it has steps; levels of skipped steps are
            left out.
        phase: "invert" or "edit".
        attn_scale: added to the background's logits, natural units; 1 in the code, 0: plain attention.
        masked_inversion: in the inversion masked rows read text and masked tokens, background rows text and
            background, text rows all. False in the code.
        keep_device: where keys and values are kept; None: where they are made.
        keep_dtype: the dtype they are kept in; None: the model's. Where device and dtype are the model's,
            they are read in place.

    Raises:
        ValueError: a wrong knob, by name; a mask that does not fit the kept keys. When the model is called:
            other tokens, an edit without kept keys.

    Examples:
        >>> import torch
        >>> from diffusers import FluxTransformer2DModel
        >>> from flashbrush.integrations import KVEdit
        >>> from flashbrush.integrations.diffusers import apply
        >>> transformer = FluxTransformer2DModel(num_layers=1, num_single_layers=1, attention_head_dim=16,
        ...     num_attention_heads=2, in_channels=4, joint_attention_dim=8, pooled_projection_dim=8,
        ...     axes_dims_rope=(4, 6, 6))
        >>> call = {"encoder_hidden_states": torch.randn(1, 3, 8), "pooled_projections": torch.randn(1, 8),
        ...     "txt_ids": torch.zeros(3, 3), "timestep": torch.ones(1)}
        >>> ids = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
        >>> latents, mask = torch.randn(1, 16, 4), torch.arange(16) < 6
        >>> method = KVEdit(mask, times=(0.5, 0.0))
        >>> with apply(transformer, method) as handle:
        ...     velocity = transformer(latents, img_ids=ids, **call).sample  # the inversion's only step
        ...     method.phase = "edit"
        ...     handle.reset()
        ...     tokens = method.tokens
        ...     velocity = transformer(latents[:, tokens], img_ids=ids[tokens], **call).sample
        >>> velocity.shape
        torch.Size([1, 6, 4])
    """

    mask: Tensor = Mask("image tokens", some=True)
    times: Sequence[float] = Falling()
    phase: Literal["invert", "edit"] = Choice("invert", "edit")
    attn_scale: float = Number(1.0)
    masked_inversion: bool = Flag(False)
    keep_device: torch.device | str | None = None
    keep_dtype: torch.dtype | None = None
    # {(time, layer): (k, v, the model's dtype)}; k, v (batch, image tokens, heads, dim), background first
    kept: dict[tuple[float, int], tuple[Tensor, Tensor, torch.dtype]] = field(
        default_factory=dict, init=False, repr=False
    )

    def _knob_changes(self, name: str, value: Any) -> None:
        if name == "mask":
            self._sort(value)

    @property
    def tokens(self) -> Tensor:
        """Indices of the masked image tokens, which an edit's call takes; int64 (masked tokens,), sorted."""
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
        """Sort what is kept by a new mask, so that its background is a view."""
        order, kept = torch.argsort(mask.to(torch.uint8), stable=True), getattr(self, "kept", {})
        if kept and (self.masked_inversion or len(mask) != len(self.mask)):
            why = "of another mask" if self.masked_inversion else f"of {len(self.mask)} tokens"
            raise ValueError(f"mask: the kept keys are {why}; call kept.clear() and invert again")
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
