"""Personalize Anything (arXiv 2503.12590): a subject's tokens replace the generation's in early steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...bindings import Control, Segments, qk_norm_rope
from ..diffusers.protocol.batch_call import Part
from ..diffusers.protocol.fields import Pair
from ..diffusers.protocol.layer import Layer, Step
from ..diffusers.protocol.plan import Plan
from .shared.knobs import Choice, Count, Several, Share
from .shared.personal_subject import PersonalSubject, replace_tokens


@dataclass
class PersonalizeAnything:
    """While the noise is above tau, image tokens of references replace the generation's before q, k and v.

        y_gen[target] <- y_ref[mask]     while sigma > tau

    in all layers of FLUX; each token keeps the RoPE of its new place. The batch holds the reconstructions
    and, last, the generation. As released (an inversion with gamma = eta = 1) a reconstruction is its photo
    noised on a straight line: `noised` gives its latents before each step. A knob may be set at any time.

    Args:
        subjects: one or several, with masks of one shape.
        tau: noise level, 0 to 1: 0.5 in the released demo, 0.45 to 0.7 in its notebooks.
        share: of the steps, 0 to 1, in place of tau where Handle.set_step() gives a count and no sigma. The
            paper has 0.8, and 0.1 for editing.
        shuffle: side of the windows within which the reference's tokens are shuffled, anew at each step; 1:
            none (released code), 3: the paper, which does not say how often.
        seed: of the shuffle, >= 0.
        concatenation: the reference's tokens as additional keys. "none": released default. "target": at the
            target's positions, at all steps and in all items (released option). "zero": at position 0, in
            the generation, at the steps without replacement (paper). Positions are FLUX's ids (0, row,
            column).

    Raises:
        ValueError: a wrong knob, by name. When the model is called: another model, masks or items that do
            not fit, a step with neither sigma nor count.

    Examples:
        >>> import torch
        >>> from diffusers import FluxPipeline
        >>> from flashbrush.integrations import PersonalizeAnything, PersonalSubject
        >>> from flashbrush.integrations.diffusers import apply
        >>> pipe = FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev")
        >>> side = 64 // (2 * pipe.vae_scale_factor)  # image tokens
        >>> mask = torch.zeros(side, side, dtype=torch.bool)
        >>> mask[1:3, 1:3] = True
        >>> def next_step(pipe, step, timestep, tensors):
        ...     handle.set_step(step + 1, pipe.num_timesteps)
        ...     return tensors
        >>> size = {"height": 64, "width": 64, "max_sequence_length": 16}
        >>> with apply(pipe.transformer, PersonalizeAnything(PersonalSubject(mask))) as handle:
        ...     handle.set_step(0, 2)
        ...     images = pipe(["a dog", "a dog on a beach"], num_inference_steps=2,
        ...         callback_on_step_end=next_step, **size).images
    """

    subjects: PersonalSubject | Sequence[PersonalSubject] = Several(PersonalSubject)
    tau: float = Share(0.5)
    share: float = Share(0.8)
    shuffle: int = Count(1, low=1)
    seed: int = Count(0)
    concatenation: Literal["none", "target", "zero"] = Choice("none", "target", "zero")
    _pos_embed: nn.Module | None = field(default=None, init=False, repr=False, compare=False)

    def _knob_changes(self, name: str, value: Any) -> None:
        if name == "subjects" and len({tuple(subject.mask.shape) for subject in value}) > 1:
            raise ValueError("subjects: expected masks of one shape")

    def attach(self, model: nn.Module) -> list:
        """Find the model's RoPE; no hook is registered."""
        self._pos_embed = getattr(model, "pos_embed", None)
        return []

    def replaces(self, step: Step) -> bool:
        """Whether tokens are replaced at this step.

        Raises:
            ValueError: the step has neither sigma nor count.
        """
        if step.sigma is not None:
            return step.sigma > self.tau
        if step.count is None:
            raise ValueError(
                "tau: neither the step's sigma is known nor the number of steps; call Handle.set_step()"
            )
        return step.index < self.share * step.count

    def plan(self, layer: Layer, step: Step) -> Plan:
        subjects: tuple[PersonalSubject, ...] = self.subjects  # type: ignore[assignment]
        if layer.kind not in ("double", "single"):
            raise ValueError(f"method: expected FLUX; layer {layer.index} is {layer.kind!r}")
        if layer.image_len != subjects[0].mask.numel():
            raise ValueError(
                f"subjects: masks of {subjects[0].mask.numel()} tokens, but the call has {layer.image_len}"
            )
        generation = layer.batch - 1
        if any(subject.item >= generation for subject in subjects):
            raise ValueError(
                f"subjects: expected items before the last, {generation}, got {[s.item for s in subjects]}"
            )
        hidden = None
        if replaces := self.replaces(step):
            start = layer.text_len if layer.kind == "single" else 0
            hidden = partial(replace_tokens, subjects, (self.shuffle, self.seed, step.index), start)
        if self.concatenation == "none" or (self.concatenation == "zero" and replaces):
            return Plan(hidden=hidden)
        control = _control(layer.rows, sum(len(subject.positions(False)) for subject in subjects))
        extra = {"references": partial(self._references, subjects, layer.text_len)}
        if self.concatenation == "zero":
            return Plan(parts=[Part([generation], control=control, extra=extra)])
        return Plan(control, extra=extra, hidden=hidden)

    def _references(self, subjects: tuple[PersonalSubject, ...], text: int, k: Tensor, v: Tensor) -> Pair:
        """k and v of the references, (1, tokens, heads, head_dim), with the RoPE of their new positions."""
        places = [(s.item, text + s.tokens(False, k.device)) for s in subjects]
        keys, values = (torch.cat([t[item, tokens] for item, tokens in places])[None] for t in (k, v))
        assert self._pos_embed is not None
        cos, sin = _turn(self._pos_embed, subjects, self.concatenation == "target", k.device)
        return qk_norm_rope([(keys, None, None)], cos, sin, eps=0.0), values


@lru_cache(maxsize=64)
def _control(tokens: int, references: int) -> Control:
    return Control(Segments(tokens=tokens), Segments(tokens=tokens, references=references))


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # cached: inference tensors cannot be used in a backward pass
def _turn(
    pos_embed: nn.Module, subjects: tuple[PersonalSubject, ...], target: bool, device: torch.device
) -> Pair:
    """cos and sin (tokens, head_dim) that rotate k from the reference's positions to the target's or 0."""
    way = torch.cat([(s.positions(True) if target else 0) - s.positions(False) for s in subjects])
    return pos_embed(nn.functional.pad(way, (1, 0)).to(device))


def noised(source: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """A reconstruction's latents at a noise level: (1 - sigma) source + sigma noise.

    Args:
        source: the photo's latents.
        noise: the same shape.
        sigma: 0 to 1.

    Examples:
        >>> import torch
        >>> from flashbrush.integrations.methods.personalize_anything import noised
        >>> noised(torch.zeros(2), torch.ones(2), sigma=0.25)
        tensor([0.2500, 0.2500])
    """
    return (1 - sigma) * source + sigma * noise
