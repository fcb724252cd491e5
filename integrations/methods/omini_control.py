"""OminiControl (arXiv 2411.15098): how strongly condition tokens and the rest of the sequence see each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from ...bindings import Control, Segments
from ..diffusers.protocol.layer import Layer, Step
from ..diffusers.protocol.plan import Plan, Seen
from .shared.cross_batch import is_count


@dataclass
class OminiControl:
    """Attention over [text ; image ; conditions] whose blocks between the conditions and the rest are weighed
    by gamma.

        o = softmax(Q K^T / sqrt(d) + B) V,     B = log(gamma) on (conditions, others) and (others, conditions)

    in all layers of FLUX. The conditions are the last of the image tokens. Text and image see all, a
    condition sees itself, text and image, and no other condition. The first release weighs one condition by
    gamma; the second has none, several conditions, and optionally keeps their keys and values (`cached`): at
    step 0 a condition then sees itself alone, and the calls of later steps are without the conditions'
    tokens. As their stream depends on nothing else, step 0 may be a call of [text ; conditions] alone, with
    the LoRA of the conditions and at time 0 as released, and the sampling's steps count from 1. LoRA, time
    and ids (`offset_ids`) are the caller's. A knob may be set at any time; ValueError names a wrong one.

    Args:
        condition_tokens: how many there are, or one number for each condition; > 0.
        strength: gamma >= 0; 1 is neutral, 0 cuts the conditions off.
        independent_condition: the conditions do not see text and image.
        cached: keep their keys and values at step 0 and read them, in place, at later steps.
    """

    condition_tokens: int | Sequence[int]
    strength: float = 1.0
    independent_condition: bool = False
    cached: bool = False
    # {layer: (k, v)}, (batch, condition tokens, heads, head_dim)
    kept: dict[int, tuple[Tensor, Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "condition_tokens":
            lengths = (
                (value,) if isinstance(value, int) else tuple(value) if isinstance(value, Sequence) else ()
            )
            if not lengths or not all(is_count(n) and n for n in lengths):
                raise ValueError(
                    f"condition_tokens: expected a number > 0, or one for each condition, got {value!r}"
                )
            value = lengths
        if name == "strength" and not (isinstance(value, (int, float)) and 0 <= value < math.inf):
            raise ValueError(f"strength: expected a finite number >= 0, got {value!r}")
        object.__setattr__(self, name, value)

    def plan(self, layer: Layer, step: Step) -> Plan:
        lengths = self._lengths
        if self.cached and step.index:
            if layer.index not in self.kept:
                raise ValueError(
                    f"cached: nothing is kept for layer {layer.index}; step 0 brings the conditions"
                )
            control = _control(layer.text_len + layer.image_len, lengths, self.strength, False, True)
            return Plan(control, extra={"conditions": self.kept[layer.index]})
        others = layer.text_len + layer.image_len - sum(lengths)
        if others < layer.text_len:
            raise ValueError(
                f"condition_tokens: they are {sum(lengths)}, but the call has {layer.image_len} image tokens"
            )
        control = _control(others, lengths, self.strength, self.independent_condition or self.cached, False)
        return Plan(control, see=partial(self._keep, layer.index) if self.cached else None)

    @property
    def _lengths(self) -> tuple[int, ...]:
        return self.condition_tokens  # type: ignore[return-value]

    def _keep(self, layer: int, seen: Seen) -> None:
        first = seen.k.shape[1] - sum(self._lengths)
        self.kept[layer] = seen.k[:, first:].detach().clone(), seen.v[:, first:].detach().clone()


@lru_cache(maxsize=64)
def _control(
    others: int, lengths: tuple[int, ...], strength: float, independent: bool, extra: bool
) -> Control:
    """Of rows [others ; conditions], or where the conditions are extra keys of the others alone."""
    gamma = -math.inf if strength == 0 else math.log(strength)
    if extra:
        keys = Segments(others=others, conditions=sum(lengths))
        return Control(
            Segments(others=others), keys, bias={("others", "conditions"): gamma} if gamma else None
        )
    names = [f"condition_{n}" for n in range(1, len(lengths) + 1)]
    bias = {(a, b): -math.inf for a in names for b in names if a != b}
    for name in names:
        seen = {("others", name): gamma, (name, "others"): -math.inf if independent else gamma}
        bias |= {pair: value for pair, value in seen.items() if value}
    return Control(Segments({"others": others} | dict(zip(names, lengths, strict=True))), bias=bias)


def offset_ids(ids: Tensor, rows: float = 0, columns: float = 0) -> Tensor:
    """Image ids (..., 3) of a condition that lies that many tokens below and to the right of the image.

    Subject tasks: columns=W/16 of the image (32 at 512 pixels) in current examples, of the other sign in
        older models.
    Spatial tasks: none, a condition has the image's own ids.
    """
    return ids + torch.tensor([0, rows, columns], dtype=ids.dtype, device=ids.device)
