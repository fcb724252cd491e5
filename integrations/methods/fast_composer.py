"""FastComposer (arXiv 2305.10431): subjects fused into their words, kept apart in training by where the words
are seen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..diffusers.hosts.registry import find_host
from ..diffusers.protocol.layer import Layer, Step
from ..diffusers.protocol.plan import Plan, Seen


@dataclass(eq=False)
class FastComposer:
    """The localisation loss on a UNet's cross-attention, which itself stays plain. With A the map of a
    layer's head, j the token of a subject, and fg and bg the weights of the image's tokens, that are the
    subject's or not:

        loss = weight * mean over items, subjects, heads, layers of   sum bg A_j / sum bg - sum fg A_j / sum fg

    Read `loss()` after the model's call and before its backward pass; it has a gradient. A knob may be set at
    any time, such as the next batch's `tokens` and `masks`; ValueError names a wrong one.

    Args:
        tokens: int (batch, subjects), each subject's token in its text; -1: there is none.
        masks: (batch, subjects, rows, columns) within 0 and 1, resized to each layer's grid bilinearly,
            antialiased; bg = 1 - fg.
        weight: the paper's.
        stages: how many of the UNet's stages with attention count, down, middle and up, from the middle; the
            released code's 5 of 7 are all but those of the finest grid. None: all.
    """

    tokens: Tensor
    masks: Tensor
    weight: float = 1e-3
    stages: int | None = 5

    def __post_init__(self) -> None:
        self._cross: dict[int, tuple] = {}  # the stage of each cross-attention layer
        self._losses: dict[int, Tensor] = {}  # of each layer in its last call

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "tokens" and (
            not isinstance(value, Tensor) or value.dtype != torch.int64 or value.dim() != 2
        ):
            raise ValueError("tokens: expected an int64 tensor (batch, subjects)")
        if name == "masks" and (
            not isinstance(value, Tensor) or value.dim() != 4 or not ((value >= 0) & (value <= 1)).all()
        ):
            raise ValueError("masks: expected a tensor (batch, subjects, rows, columns) within 0 and 1")
        if name == "weight" and not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
            raise ValueError(f"weight: expected a finite number >= 0, got {value!r}")
        if name == "stages" and value is not None and not (isinstance(value, int) and value > 0):
            raise ValueError(f"stages: expected a number of stages > 0 or None, got {value!r}")
        object.__setattr__(self, name, value)

    def attach(self, model: nn.Module) -> list:
        """Finds the model's stages; there is nothing to remove."""
        places = find_host(model).places(model)
        self._cross = {
            i: (place.place, place.level) for i, place in enumerate(places) if place.kind == "cross"
        }
        return []

    def plan(self, layer: Layer, step: Step) -> Plan | None:
        if layer.kind not in ("self", "cross") or layer.place is None:
            raise ValueError(
                f"FastComposer: it is made for a UNet's cross-attention; layer {layer.index} is {layer.kind!r}"
            )
        if layer.index not in self._counted():
            return None
        if self.tokens.shape != self.masks.shape[:2] or self.tokens.shape[0] != layer.batch:
            raise ValueError(
                f"tokens: expected ({layer.batch}, subjects) as the masks have, got {tuple(self.tokens.shape)} "
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
        """Of the last call, a scalar. RuntimeError where no layer was read."""
        losses = [self._losses[i] for i in self._counted() if i in self._losses]
        if not losses:
            raise RuntimeError(
                "FastComposer: no layer was read; is the method applied, and has the UNet cross-attention?"
            )
        return self.weight * torch.stack(losses).mean()


class Fusion(nn.Module):
    """A subject's image embedding z fused into the word that names it: c = LN(MLP_2(MLP_1([e ; z]) + e)).

    An MLP is LN, linear, GELU, linear; the second one adds its input to its output. Parameters have names of
    our own: published ones do not load.

    Args:
        dim: channels of the text's embeddings and of the image's.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp1 = nn.Sequential(
            nn.LayerNorm(2 * dim), nn.Linear(2 * dim, dim), nn.GELU(), nn.Linear(dim, dim)
        )
        self.mlp2 = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))
        self.layer_norm = nn.LayerNorm(dim)

    def forward(self, text: Tensor, images: Tensor, tokens: Tensor) -> Tensor:
        """The text (batch, length, dim) with images (batch, subjects, dim) fused in at tokens (batch,
        subjects), -1: none.
        """
        batch, subject = (tokens >= 0).nonzero(as_tuple=True)
        place = tokens[batch, subject]
        words = text[batch, place]
        fused = self.mlp1(torch.cat([words, images[batch, subject]], -1)) + words
        fused = self.layer_norm(self.mlp2(fused) + fused)
        return text.index_put((batch, place), fused.to(text))


def condition(step: Step, text: Tensor, augmented: Tensor, alpha: float = 0.7) -> Tensor:
    """Delayed subject conditioning: the text alone for steps i <= (1 - alpha) T, then the augmented one.

    Args:
        step: with its count. text, augmented: embeddings without and with the subjects.
        alpha: the share of steps with subjects; the paper finds 0.6 to 0.8 good.

    Raises:
        ValueError: a step without a count, an alpha that is not within 0 and 1.
    """
    if step.count is None or not 0 <= alpha <= 1:
        raise ValueError(
            f"condition: expected a step with a count, and 0 <= alpha <= 1, got {step} and {alpha}"
        )
    return text if step.index <= (1 - alpha) * step.count else augmented
