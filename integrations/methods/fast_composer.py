"""FastComposer (arXiv 2305.10431): subjects fused into their words, and a loss that keeps them apart."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..diffusers.hosts.registry import find_host
from ..diffusers.protocol.layer import Layer, Step
from ..diffusers.protocol.plan import Plan, Seen
from .shared.knobs import Count, Indices, Number, SoftMask
from .shared.subject_fusion import Fusion

__all__ = ["FastComposer", "Fusion", "condition"]


@dataclass(eq=False)
class FastComposer:
    """The localisation loss on a UNet's cross-attention, which itself stays plain.

    With A the map of a layer's head, j the token of a subject, fg the subject's share of each image token
    and bg = 1 - fg:

        loss = weight * mean over items, subjects, heads, layers of  sum bg A_j / sum bg - sum fg A_j / sum fg

    Read `loss()` after the model's call and before its backward pass. A knob may be set at any time; set
    `tokens` and `masks` for each batch.

    Args:
        tokens: int64 (batch, subjects), the position of each subject's token in its text; -1: there is
            none.
        masks: (batch, subjects, rows, columns) within 0 and 1, resized to each layer's grid bilinearly,
            antialiased.
        weight: at least 0; 1e-3 in the paper.
        stages: how many of the UNet's stages with attention (down, middle, up) enter the loss, counted
            outwards from the middle. The released code takes 5 of 7: all but those of the finest grid. None:
            all.

    Raises:
        ValueError: a wrong knob, by name. When the model is called: another model, a batch that does not
            fit.

    Examples:
        >>> import torch
        >>> from diffusers import StableDiffusionPipeline
        >>> from flashbrush.integrations import FastComposer
        >>> from flashbrush.integrations.diffusers import apply
        >>> pipe = StableDiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
        >>> latents = torch.randn(1, pipe.unet.config.in_channels, 16, 16)
        >>> text, empty = pipe.encode_prompt("a cat", "cpu", 1, True)
        >>> masks = torch.zeros(1, 1, 64, 64)
        >>> masks[..., 16:48, 16:48] = 1
        >>> method = FastComposer(tokens=torch.tensor([[2]]), masks=masks)  # "cat" is token 2
        >>> with apply(pipe.unet, method):
        ...     noise = pipe.unet(latents, 500, text).sample
        >>> loss = noise.square().mean() + method.loss()
        >>> loss.backward()
    """

    tokens: Tensor = Indices("batch, subjects")
    masks: Tensor = SoftMask("batch, subjects, rows, columns")
    weight: float = Number(1e-3, low=0)
    stages: int | None = Count(5, low=1, optional=True)

    def __post_init__(self) -> None:
        self._cross: dict[int, tuple] = {}  # the stage of each cross-attention layer
        self._losses: dict[int, Tensor] = {}  # of each layer in its last call

    def attach(self, model: nn.Module) -> list:
        """Find the model's stages; no hook is registered."""
        places = find_host(model).sites(model)
        self._cross = {
            i: (place.place, place.level) for i, place in enumerate(places) if place.kind == "cross"
        }
        return []

    def plan(self, layer: Layer, step: Step) -> Plan | None:
        if layer.kind not in ("self", "cross") or layer.place is None:
            raise ValueError(
                f"FastComposer: expected the cross-attention of a UNet; layer {layer.index} is {layer.kind!r}"
            )
        if layer.index not in self._counted():
            return None
        if self.tokens.shape != self.masks.shape[:2] or self.tokens.shape[0] != layer.batch:
            raise ValueError(
                f"tokens: expected ({layer.batch}, subjects), as the masks, got {tuple(self.tokens.shape)} "
                f"and {tuple(self.masks.shape)}"
            )
        return Plan(see=partial(self._see, layer))

    def _see(self, layer: Layer, seen: Seen) -> None:
        keys, column = self.tokens.clamp(min=0).unique(return_inverse=True)
        maps = seen.probabilities(keys)  # (batch, heads, rows, keys)
        index = column.to(maps.device)[:, None, None].expand(-1, *maps.shape[1:3], -1)
        maps = maps.gather(3, index).transpose(2, 3)  # (batch, heads, subjects, rows)
        fg = F.interpolate(self.masks.to(maps), layer.grid, mode="bilinear", antialias=True).flatten(2)[
            :, None
        ]
        inside, outside = ((maps * w).sum(-1) / w.sum(-1).clamp(min=1e-5) for w in (fg, 1 - fg))
        there = (self.tokens >= 0).to(maps)[:, None].expand_as(inside)
        self._losses[layer.index] = ((outside - inside) * there).sum() / there.sum().clamp(min=1)

    def _counted(self) -> list[int]:
        stages = list(dict.fromkeys(self._cross.values()))
        cut = 0 if self.stages is None else max(0, (len(stages) - self.stages) // 2)
        return [i for i, stage in self._cross.items() if stage in stages[cut : len(stages) - cut]]

    def loss(self) -> Tensor:
        """The loss of the last call, a scalar with a gradient.

        Raises:
            RuntimeError: no layer was read.
        """
        losses = [self._losses[i] for i in self._counted() if i in self._losses]
        if not losses:
            raise RuntimeError(
                "FastComposer: no layer was read; is the method applied, and does the UNet have "
                "cross-attention?"
            )
        return self.weight * torch.stack(losses).mean()


def condition(step: Step, text: Tensor, augmented: Tensor, alpha: float = 0.7) -> Tensor:
    """Delayed subject conditioning: the text alone for steps i <= (1 - alpha) T, then the augmented one.

    Args:
        step: the step, with its count T.
        text: embeddings without the subjects.
        augmented: embeddings with the subjects.
        alpha: share of the steps with subjects, 0 to 1; 0.6 to 0.8 in the paper.

    Returns:
        `text` or `augmented`.

    Raises:
        ValueError: a step without a count; a wrong alpha.

    Examples:
        >>> import torch
        >>> from flashbrush.integrations.diffusers import Step
        >>> from flashbrush.integrations.methods.fast_composer import condition
        >>> text, augmented = torch.zeros(1, 5, 8), torch.ones(1, 5, 8)
        >>> [condition(Step(i, 10), text, augmented) is augmented for i in (3, 4)]
        [False, True]
    """
    if step.count is None or not 0 <= alpha <= 1:
        raise ValueError(
            f"condition: expected a step with a count, and 0 <= alpha <= 1, got {step} and {alpha}"
        )
    return text if step.index <= (1 - alpha) * step.count else augmented
