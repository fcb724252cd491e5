"""Plug-and-Play (arXiv 2211.12572): an edit takes its layout from a source, by its features and attention
maps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..diffusers.apply import Handle
from ..diffusers.protocol.layer import Layer, Step
from ..diffusers.protocol.plan import Plan
from .shared import cross_batch as borrowed, edit_roles
from .shared.cross_batch import Window
from .shared.edit_roles import EditRoles


@dataclass
class PlugAndPlay:
    """The edit keeps the source's self-attention maps, and one residual block's features, for the first
    steps.

        o_tgt = softmax(Q_src K_src^T / sqrt(d)) V_tgt        f_tgt = f_src

    in both halves of a classifier-free guidance, each from its own source. f is what the block's convolutions
    add to its shortcut. The source is a photo's DDIM inversion, or another sample; both start from the same
    latents. Defaults are
    the released code's, for 50 steps: scale 10, and a negative prompt that negative_prompt_share() fades in.
        A knob may
    be set at any time; ValueError names a wrong one.

    Args:
        layers: (first, after the last or None) of the transformer blocks, in the order of the forward pass.
            The code has ldm's output blocks 4 to 11: SD 1.5's last two of up_blocks[1], and all of
            up_blocks[2] and up_blocks[3].
        steps: (first, after the last or None) of the maps: the code's are all up to half of the steps, itself
            included.
        feature: (up block, resnet) of the features, or None; the code's is ldm's output block 4.
        feature_steps: as `steps`, for the features; the code's threshold of 40 is included.
        items: which items of a call are what; None: the batch is [source, edit_1, ..., edit_n] twice.
    """

    layers: Window = (8, None)
    steps: Window = (0, 26)
    feature: tuple[int, int] | None = (1, 1)
    feature_steps: Window = (0, 41)
    items: Sequence[EditRoles] | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "feature" and value is not None:
            value = tuple(value) if isinstance(value, (tuple, list)) else ()
            if len(value) != 2 or not all(borrowed.is_count(n) for n in value):
                raise ValueError("feature: expected (up block, resnet) or None")
        object.__setattr__(self, name, edit_roles.checked_edit(name, value))

    def plan(self, layer: Layer, step: Step) -> Plan | None:
        if not borrowed.is_self(layer, borrowed.PLACES) or not borrowed.within(
            self.layers, edit_roles.block_index(layer)
        ):
            return None
        if not borrowed.within(self.steps, step.index):
            return None
        return edit_roles.inject(edit_roles.pairs(self.items, layer.batch))

    def attach(self, model: nn.Module) -> list[Any]:
        """Hooks on the residual blocks on the way up; ValueError where the model has no such block."""
        resnets = {
            (i, j): resnet
            for i, block in enumerate(getattr(model, "up_blocks", ()))
            for j, resnet in enumerate(block.resnets)
        }
        if self.feature is not None and self.feature not in resnets:
            raise ValueError(f"feature: expected (up block, resnet) of the model or None, got {self.feature}")
        return [r.conv2.register_forward_hook(_Features(self, model, place)) for place, r in resnets.items()]


@dataclass(eq=False)
class _Features:
    """A forward hook; an object, so that a copy of the model has its own."""

    method: PlugAndPlay
    model: nn.Module
    place: tuple[int, int]

    @torch.compiler.disable()  # what it reads differs from step to step, and would be compiled anew for each
    def _wanted(self) -> bool:
        handle = Handle.of(self.model)
        if handle is None or not handle.controls_step or self.method.feature != self.place:
            return False
        return borrowed.within(self.method.feature_steps, handle.step.index)

    def __call__(self, module: nn.Module, inputs: tuple, output: Tensor) -> Tensor | None:
        if not self._wanted():
            return None
        read = list(range(output.shape[0]))
        for roles in edit_roles.pairs(self.method.items, output.shape[0]):
            read[roles.target] = roles.source
        return output[torch.tensor(read, device=output.device)]


def negative_prompt_share(
    step: int, count: int, start: float = 1.0, schedule: Literal["linear", "constant", "exp"] = "linear"
) -> float:
    """alpha of a step: alpha * unconditional + (1 - alpha) * negative is what guidance starts from.

    The negative prompt describes the source, so that it comes to weigh as its structure settles. The released
    code's: alpha falls from `start` at the first step to 0 at the last ("linear"), to start / e^6 ("exp"), or
    stays.

    Args:
        step: from 0. count: steps of the run. start: in [0, 1]; 1 and "constant" leave the negative prompt
            out.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    if not borrowed.is_count(step) or not borrowed.is_count(count) or step >= count:
        raise ValueError(f"step: expected one of 0 to count - 1, got {step!r} of {count!r}")
    if not borrowed.is_number(start) or not 0 <= start <= 1:
        raise ValueError(f"start: expected a number in [0, 1], got {start!r}")
    if schedule not in ("linear", "constant", "exp"):
        raise ValueError(f"schedule: expected linear, constant or exp, got {schedule!r}")
    progress = step / max(count - 1, 1)
    return start * {"linear": 1 - progress, "constant": 1.0, "exp": math.exp(-6 * progress)}[schedule]
