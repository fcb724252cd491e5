"""MasaCtrl (arXiv 2304.08465): an edit with another layout or pose takes its contents from its source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ...bindings import Control, Segments
from ..diffusers.protocol.batch_call import Part
from ..diffusers.protocol.layer import Layer, Step
from ..diffusers.protocol.plan import LatePlan, Plan
from .shared.cross_batch import read_source
from .shared.knobs import Flag, Several, Share, Window
from .shared.layers_and_steps import block_index, is_self_attention, within
from .shared.roles import EditRoles, edit_roles
from .shared.word_maps import MaskPair, WordMaps


@dataclass(eq=False)
class MasaCtrl:
    """Mutual self-attention: the edit's queries attend to the source's keys and values.

        o_tgt = softmax(Q_tgt K_src^T / sqrt(d)) V_src

    With masks it does so in two softmaxes, over the source's keys inside and outside of the source's mask,
    and m the edit's mask of rows:

        o_tgt = (m softmax_fg(Q_tgt K_src^T / sqrt(d)) + (1 - m) softmax_bg(Q_tgt K_src^T / sqrt(d))) V_src

    in both halves of classifier-free guidance. The source is a photo's DDIM inversion with an empty prompt,
    or another sample; both start from the same latents. The defaults are the released code's for SD 1.5,
    with 50 steps and guidance of 7.5. A knob may be set at any time.

    Args:
        layers: (first, the one after the last or None) of the transformer blocks, in the order of the
            forward pass; for SDXL the code's first is 44, 54 or 64.
        steps: (first, the one after the last or None).
        masks: the source's and the edit's, bool (rows, columns) of any size, resized by nearest neighbour. Or
            WordMaps of two items, the source and the edit: in each forward call the masks are their mean over
            the layers that ran so far, min-max normalised, where it reaches `threshold`; before the first
            such layer there are no masks. The paper's and the code's maps have 16 x 16 tokens and are of the
            conditional half: {-2: [...], -1: [...]}. A source's mask that is empty or full also means no
            masks (in the code a row without a key becomes the mean of all values). Masks from words wait for
            the device, and apply() must select those cross-attention layers. None: no masks.
        threshold: 0 to 1, of the normalised maps.
        union: one softmax over [K_src; K_tgt] instead, without masks; the code's variant of that name.
        items: the roles of a call's items. None: the batch is [source, edit_1, ..., edit_n] twice.

    Raises:
        ValueError: a wrong knob, by name. When the model is called: another model, a batch that does not
            fit, masks beside `union`.

    Examples:
        >>> from diffusers import StableDiffusionPipeline
        >>> from flashbrush.integrations import MasaCtrl
        >>> from flashbrush.integrations.diffusers import apply
        >>> pipe = StableDiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
        >>> method = MasaCtrl(layers=(2, None), steps=(1, None))  # the defaults are for SD 1.5 and 50 steps
        >>> with apply(pipe.unet, method):
        ...     images = pipe(["a sitting cat", "a jumping cat"], num_inference_steps=3).images
    """

    layers: tuple[int, int | None] = Window(10)
    steps: tuple[int, int | None] = Window(4)
    masks: tuple[Tensor, Tensor] | WordMaps | None = MaskPair()
    threshold: float = Share(0.1)
    union: bool = Flag(False)
    items: Sequence[EditRoles] | None = Several(EditRoles, None)

    def plan(self, layer: Layer, step: Step) -> Plan | LatePlan | None:
        masks, now = self.masks, within(self.steps, step.index)
        if self.union and masks is not None:
            raise ValueError("union: expected no masks beside it")
        if isinstance(masks, WordMaps):
            if masks.begins(layer):
                masks.clear()
            if now and (gathering := masks.plan(layer)) is not None:
                return gathering
        if not is_self_attention(layer) or not now or not within(self.layers, block_index(layer)):
            return None
        roles, grid = edit_roles(self.items, layer.batch), layer.grid
        assert grid is not None
        if masks is None:
            return read_source(roles, self.union)
        if isinstance(masks, WordMaps):
            words = masks
            return lambda: (
                _by_words(roles, words.mean, self.threshold, grid) if words.seen else read_source(roles)
            )
        return _masked(roles, *masks, grid)


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # cached: inference tensors cannot be used in a backward pass
def _by_words(roles: tuple[EditRoles, ...], maps: Tensor, threshold: float, grid: tuple[int, int]) -> Plan:
    """maps: (2, rows, columns)"""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    source, target = (
        (maps - low) / (high - low).clamp_min(torch.finfo(maps.dtype).tiny) >= threshold
    ).unbind()
    return _masked(roles, source, target, grid)


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _masked(roles: tuple[EditRoles, ...], source: Tensor, target: Tensor, grid: tuple[int, int]) -> Plan:
    keys, rows = (F.interpolate(mask[None, None].float(), grid).flatten() for mask in (source, target))
    segments, order, _ = Segments.from_labels((keys == 0).int(), ["fg", "bg"])
    if not all(segments.lengths):
        return read_source(roles)
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
