"""Plug-and-Play (arXiv 2211.12572): an edit takes its layout from a source's features and attention maps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..diffusers.handle import Handle
from ..diffusers.protocol.layer import Layer, Step
from ..diffusers.protocol.plan import Plan
from .shared.cross_batch import inject_maps
from .shared.knobs import Choice, Pair, Several, Share, Window, checked, is_count
from .shared.layers_and_steps import block_index, is_self_attention, within
from .shared.roles import EditRoles, edit_roles


@dataclass
class PlugAndPlay:
    """The edit takes the source's self-attention maps, and one residual block's features, in the first steps.

        o_tgt = softmax(Q_src K_src^T / sqrt(d)) V_tgt        f_tgt = f_src

    in both halves of classifier-free guidance, each from its own source. f is what the block's convolutions
    add to its shortcut. The source is a photo's DDIM inversion or another sample; both start from the same
    latents. The defaults are the released code's for 50 steps, guidance of 10 and a negative prompt that
    negative_prompt_share() fades in. A knob may be set at any time.

    Args:
        layers: (first, the one after the last or None) of the transformer blocks, in the order of the
            forward pass. The code has ldm's output blocks 4 to 11: SD 1.5's last two of up_blocks[1], and
            all of up_blocks[2] and up_blocks[3].
        steps: (first, the one after the last or None) with the source's maps; in the code half of the steps
            and one more.
        feature: (up block, resnet) of the features, or None; the code has ldm's output block 4.
        feature_steps: (first, the one after the last or None) with the source's features; in the code up to
            40.
        items: the roles of a call's items. None: the batch is [source, edit_1, ..., edit_n] twice.

    Raises:
        ValueError: a wrong knob, by name; from apply(), a model without the block of `feature`. When the
            model is called: another model, a batch that does not fit.

    Examples:
        >>> from diffusers import StableDiffusionPipeline
        >>> from flashbrush.integrations import PlugAndPlay
        >>> from flashbrush.integrations.diffusers import apply
        >>> pipe = StableDiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
        >>> method = PlugAndPlay(layers=(2, None), steps=(0, 2))  # the defaults are for SD 1.5 and 50 steps
        >>> with apply(pipe.unet, method):
        ...     images = pipe(["a horse", "a zebra"], guidance_scale=10.0, num_inference_steps=3).images
    """

    layers: tuple[int, int | None] = Window(8)
    steps: tuple[int, int | None] = Window(0, 26)
    feature: tuple[int, int] | None = Pair("up block, resnet", (1, 1), optional=True)
    feature_steps: tuple[int, int | None] = Window(0, 41)
    items: Sequence[EditRoles] | None = Several(EditRoles, None)

    def plan(self, layer: Layer, step: Step) -> Plan | None:
        if not is_self_attention(layer) or not within(self.layers, block_index(layer)):
            return None
        if not within(self.steps, step.index):
            return None
        return inject_maps(edit_roles(self.items, layer.batch))

    def attach(self, model: nn.Module) -> list[Any]:
        """Register hooks on the residual blocks of the up blocks.

        Raises:
            ValueError: the model has no block `feature`.
        """
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

    @torch.compiler.disable()  # its result changes with the step, which would cause recompilations
    def _wanted(self) -> bool:
        handle = Handle.of(self.model)
        if handle is None or not handle.controls_step or self.method.feature != self.place:
            return False
        return within(self.method.feature_steps, handle.step.index)

    def __call__(self, module: nn.Module, inputs: tuple, output: Tensor) -> Tensor | None:
        if not self._wanted():
            return None
        read = list(range(output.shape[0]))
        for roles in edit_roles(self.method.items, output.shape[0]):
            read[roles.target] = roles.source
        return output[torch.tensor(read, device=output.device)]


def negative_prompt_share(
    step: int, count: int, start: float = 1.0, schedule: Literal["linear", "constant", "exp"] = "linear"
) -> float:
    """alpha of a step: guidance starts from alpha * unconditional + (1 - alpha) * negative.

    The negative prompt describes the source; it gains weight as the edit's structure settles. As in the
    released code alpha falls from `start` to 0 ("linear") or to start / e^6 ("exp"), or stays ("constant").

    Args:
        step: from 0.
        count: steps of the run.
        start: alpha of the first step, 0 to 1; 1 with "constant" leaves the negative prompt out.
        schedule: "linear", "constant" or "exp".

    Returns:
        alpha, from 0 to `start`.

    Raises:
        ValueError: a wrong argument, by name.

    Examples:
        >>> from flashbrush.integrations.methods.plug_and_play import negative_prompt_share
        >>> [negative_prompt_share(step, 3) for step in range(3)]
        [1.0, 0.5, 0.0]
    """
    if not is_count(step) or not is_count(count) or step >= count:
        raise ValueError(f"step: expected one of 0 to count - 1, got {step!r} of {count!r}")
    checked("start", Share(), start)
    checked("schedule", Choice("linear", "constant", "exp"), schedule)
    progress = step / max(count - 1, 1)
    return start * {"linear": 1 - progress, "constant": 1.0, "exp": math.exp(-6 * progress)}[schedule]
