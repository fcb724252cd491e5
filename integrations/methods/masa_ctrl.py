"""MasaCtrl (arXiv 2304.08465): an edit of another layout or pose, whose contents are read from its source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...bindings import Control, Segments
from ..diffusers.protocol.batch_call import Part
from ..diffusers.protocol.layer import Layer, Step
from ..diffusers.protocol.plan import Plan
from .shared import cross_batch as borrowed, edit_roles
from .shared.cross_batch import Window
from .shared.edit_roles import EditRoles
from .shared.word_maps import WordMaps

Grid = tuple[int, int]


@dataclass(eq=False)
class MasaCtrl:
    """Mutual self-attention: the edit's queries attend to the source's keys and values.

        o_tgt = softmax(Q_tgt K_src^T / sqrt(d)) V_src

    or, with masks, in two softmaxes over the source's keys in and outside of its mask, with m the edit's mask
    of rows:

        o_tgt = m softmax_fg(Q_tgt K_src^T / sqrt(d)) V_src + (1 - m) softmax_bg(Q_tgt K_src^T / sqrt(d))
        V_src

    in both halves of a classifier-free guidance. The source is a photo's DDIM inversion with an empty prompt,
    or another sample; both start from the same latents. All defaults are the released code's for SD 1.5, with
    50 steps and guidance of 7.5. A knob may be set at any time; ValueError names a wrong one.

    Args:
        layers: (first, after the last or None) of the transformer blocks, in the order of the forward pass;
            for SDXL the code has first ones of 44, 54 and 64.
        steps: (first, after the last or None).
        masks: None; the source's and the edit's, bool tensors (rows, columns) of any size, resized to the
            nearest; or WordMaps of two items, the source and then the edit, from which they are made in each
            forward call: the mean over the layers seen in it so far, min-max normalised, from `threshold` on.
            Until one has been seen there is no mask. The paper's and code's maps are of 16 x 16 tokens and of
            the conditional half: {-2: [...], -1: [...]}. Where the source's mask has no key or all of them,
            there is none either: the code's rows without a key become the mean of all values. Masks made of
            words wait for the device, and need apply() to leave those cross-attention layers to the method.
        threshold: in [0, 1].
        union: softmax over [K_src; K_tgt] instead, without masks; the code's variant of that name.
        items: which items of a call are what; None: the batch is [source, edit_1, ..., edit_n] twice.
    """

    layers: Window = (10, None)
    steps: Window = (4, None)
    masks: tuple[Tensor, Tensor] | WordMaps | None = None
    threshold: float = 0.1
    union: bool = False
    items: Sequence[EditRoles] | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "masks" and isinstance(value, WordMaps):
            if len(value.words) != 2:
                raise ValueError(
                    f"masks: expected words of the source and of the edit, got those of {len(value.words)}"
                )
        elif name == "masks" and value is not None:
            value = tuple(value) if isinstance(value, (tuple, list)) else ()
            if len(value) != 2 or not all(
                isinstance(m, Tensor) and m.dtype == torch.bool and m.dim() == 2 for m in value
            ):
                raise ValueError("masks: expected two bool tensors (rows, columns), WordMaps or None")
            value = tuple(mask.clone() for mask in value)
        if name == "threshold":
            value = borrowed.check_share(name, value)
        if name == "union" and not isinstance(value, bool):
            raise ValueError(f"union: expected True or False, got {value!r}")
        object.__setattr__(self, name, edit_roles.checked_edit(name, value))

    def plan(self, layer: Layer, step: Step) -> Plan | None:
        masks, within = self.masks, borrowed.within(self.steps, step.index)
        if self.union and masks is not None:
            raise ValueError("union: expected no masks beside it")
        if isinstance(masks, WordMaps):
            if masks.begins(layer):
                masks.clear()
            if within and (gathering := masks.plan(layer)) is not None:
                return gathering
        if not borrowed.is_self(layer, borrowed.PLACES) or not within:
            return None
        if not borrowed.within(self.layers, edit_roles.block_index(layer)):
            return None
        roles, grid = edit_roles.pairs(self.items, layer.batch), layer.grid
        assert grid is not None
        if masks is None:
            return _mutual(roles, self.union)
        if isinstance(masks, WordMaps):
            words = masks
            return Plan(
                late=lambda: (
                    _by_words(roles, words.mean, self.threshold, grid) if words.seen else _mutual(roles)
                )
            )
        return _masked(roles, *masks, grid)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _mutual(roles: tuple[EditRoles, ...], union: bool = False) -> Plan:
    source, target = (torch.tensor([getattr(pair, name) for pair in roles]) for name in ("source", "target"))
    read = [source, target] if union else source
    return Plan(parts=[Part([pair.target for pair in roles], {"k": read, "v": read})])


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _by_words(roles: tuple[EditRoles, ...], maps: Tensor, threshold: float, grid: Grid) -> Plan:
    """maps: (2, rows, columns)"""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    source, target = (
        (maps - low) / (high - low).clamp_min(torch.finfo(maps.dtype).tiny) >= threshold
    ).unbind()
    return _masked(roles, source, target, grid)


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _masked(roles: tuple[EditRoles, ...], source: Tensor, target: Tensor, grid: Grid) -> Plan:
    keys, rows = (F.interpolate(mask[None, None].float(), grid).flatten() for mask in (source, target))
    segments, order, _ = Segments.from_labels((keys == 0).int(), ["fg", "bg"])
    if not all(segments.lengths):
        return _mutual(roles)
    control = Control(
        Segments(tokens=len(rows)),
        segments,
        groups={"fg": ["fg"], "bg": ["bg"]},
        gates={"fg": rows[None], "bg": 1 - rows[None]},
    )
    read = torch.tensor([pair.source for pair in roles])
    return Plan(
        parts=[Part([pair.target for pair in roles], {"k": read, "v": read}, control, key_order=order)]
    )
