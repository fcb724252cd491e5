"""Personalize Anything (arXiv 2503.12590): a subject's tokens put where it shall be, while the image takes
shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...bindings import Control, Segments, qk_norm_rope
from ..diffusers.protocol.batch_call import Pair, Part
from ..diffusers.protocol.layer import Layer, Step
from ..diffusers.protocol.plan import Plan
from .shared.cross_batch import is_count
from .shared.personal_subject import PersonalSubject

CONCATENATIONS = ("none", "target", "zero")


@dataclass
class PersonalizeAnything:
    """While the noise is above tau, image tokens of references replace the generation's before q, k and v of
    each layer.

        y_gen[target] <- y_ref[mask]     while sigma > tau

    in all layers of FLUX; each keeps the RoPE of where it comes to be. The batch holds the reconstructions
    and, last, the generation. As released (an inversion with gamma = eta = 1), a reconstruction is its photo
    noised on a straight line: `noised` puts it back before each step. A knob may be set at any time;
    ValueError names a wrong one.

    Args:
        subjects: one or several.
        tau: noise level, 0 to 1: 0.5 in the released demo, 0.45 to 0.7 in its notebooks.
        share: of the steps, where Handle.set_step tells no sigma but a count. The paper: 0.8, and 0.1 for
            editing.
        shuffle: width of the windows within which the reference's tokens change places, anew at each step; 1:
            none (released code), 3: the paper, which does not say how often.
        seed: of the shuffle.
        concatenation: the reference's tokens as additional keys. "none": released default. "target": at the
            target's positions, at all steps and in all items (released option). "zero": at position 0, in the
            generation at the steps without replacement (paper). Positions are those of FLUX's ids (0, row,
            column).
    """

    subjects: PersonalSubject | Sequence[PersonalSubject]
    tau: float = 0.5
    share: float = 0.8
    shuffle: int = 1
    seed: int = 0
    concatenation: Literal["none", "target", "zero"] = "none"
    _pos_embed: nn.Module | None = field(default=None, init=False, repr=False, compare=False)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "subjects":
            value = (
                (value,)
                if isinstance(value, PersonalSubject)
                else tuple(value)
                if isinstance(value, Sequence)
                else ()
            )
            if not value or not all(isinstance(subject, PersonalSubject) for subject in value):
                raise ValueError(f"subjects: expected one or several PersonalSubject, got {value!r}")
            if len({tuple(subject.mask.shape) for subject in value}) > 1:
                raise ValueError("subjects: expected masks of one shape")
        if name in ("tau", "share") and not (isinstance(value, (int, float)) and 0 <= value <= 1):
            raise ValueError(f"{name}: expected a number from 0 to 1, got {value!r}")
        if name == "shuffle" and not (is_count(value) and value):
            raise ValueError(f"shuffle: expected the width of a window in tokens, > 0, got {value!r}")
        if name == "seed" and not is_count(value):
            raise ValueError(f"seed: expected a whole number >= 0, got {value!r}")
        if name == "concatenation" and value not in CONCATENATIONS:
            raise ValueError(f"concatenation: expected one of {', '.join(CONCATENATIONS)}, got {value!r}")
        object.__setattr__(self, name, value)

    def attach(self, model: nn.Module) -> list:
        """Takes note of the model's RoPE."""
        self._pos_embed = getattr(model, "pos_embed", None)
        return []

    def replaces(self, step: Step) -> bool:
        """Whether tokens are replaced at this step."""
        if step.sigma is not None:
            return step.sigma > self.tau
        if step.count is None:
            raise ValueError(
                "tau: neither the step's sigma is known nor the number of steps; Handle.set_step tells them"
            )
        return step.index < self.share * step.count

    def plan(self, layer: Layer, step: Step) -> Plan:
        subjects: tuple[PersonalSubject, ...] = self.subjects  # type: ignore[assignment]
        if layer.kind not in ("double", "single"):
            raise ValueError(f"method: it is made for FLUX; layer {layer.index} is {layer.kind!r}")
        if layer.image_len != subjects[0].mask.numel():
            raise ValueError(
                f"subjects: masks of {subjects[0].mask.numel()} tokens, but the call has {layer.image_len} of image"
            )
        generation = layer.batch - 1
        if any(subject.item >= generation for subject in subjects):
            raise ValueError(
                f"subjects: expected items before the last, {generation}, got {[s.item for s in subjects]}"
            )
        hidden = None
        if replaces := self.replaces(step):
            start = layer.text_len if layer.kind == "single" else 0
            hidden = partial(_replace, subjects, (self.shuffle, self.seed, step.index), start)
        if self.concatenation == "none" or (self.concatenation == "zero" and replaces):
            return Plan(hidden=hidden)
        control = _control(layer.rows, sum(len(subject.positions(False)) for subject in subjects))
        extra = {"references": partial(self._references, subjects, layer.text_len)}
        if self.concatenation == "zero":
            return Plan(parts=[Part([generation], control=control, extra=extra)])
        return Plan(control, extra=extra, hidden=hidden)

    def _references(self, subjects: tuple[PersonalSubject, ...], text: int, k: Tensor, v: Tensor) -> Pair:
        """(1, tokens of all subjects, heads, head_dim), with the RoPE turned on to where they are said to be."""
        places = [(s.item, text + s.tokens(False, k.device)) for s in subjects]
        keys, values = (torch.cat([t[item, tokens] for item, tokens in places])[None] for t in (k, v))
        assert self._pos_embed is not None
        cos, sin = _turn(self._pos_embed, subjects, self.concatenation == "target", k.device)
        return qk_norm_rope([(keys, None, None)], cos, sin, eps=0.0), values


def _replace(
    subjects: tuple[PersonalSubject, ...], draw: tuple[int, int, int], start: int, x: Tensor
) -> Tensor:
    """x (batch, [text and] image tokens, channels) with the image's tokens from `start` on."""
    y = x.clone()
    for subject in subjects:
        y[-1, start + subject.tokens(True, x.device)] = x[
            subject.item, start + subject.shuffled(*draw, x.device)
        ]
    return y


@lru_cache(maxsize=64)
def _control(tokens: int, references: int) -> Control:
    return Control(Segments(tokens=tokens), Segments(tokens=tokens, references=references))


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept outlives a call in inference mode
def _turn(
    pos_embed: nn.Module, subjects: tuple[PersonalSubject, ...], target: bool, device: torch.device
) -> Pair:
    """cos and sin (tokens, head_dim) of the way from the reference's positions to the target's, or to
    position 0.
    """
    way = torch.cat([(s.positions(True) if target else 0) - s.positions(False) for s in subjects])
    return pos_embed(nn.functional.pad(way, (1, 0)).to(device))


def noised(source: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """(1 - sigma) source + sigma noise: a reconstruction's latents at a noise level."""
    return (1 - sigma) * source + sigma * noise
