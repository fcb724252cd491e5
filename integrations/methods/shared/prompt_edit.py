"""One edited prompt of Prompt-to-Prompt, and the cross-attention plan that it makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ...diffusers.protocol.batch_call import Part
from ...diffusers.protocol.plan import Plan
from .knobs import Instance, Numbers
from .roles import EditRoles
from .token_alignment import TokenAlignment

# For each edit: whether the source's map counts now, for all words, and for each word of `shares`
Gates = tuple[tuple[bool, tuple[bool, ...]], ...]


@dataclass(frozen=True, eq=False)
class PromptEdit:
    """What one edit's prompt changes: words, their weights, and how long they keep the source's attention.

    Args:
        alignment: of the edit's text tokens with the source's, TokenAlignment.replace() or .refine(). None:
            the prompt is the same.
        weights: {text token: c >= 0}: reweighting. c multiplies the token's probabilities, which are not
            renormalised.
        shares: {text token: share of the steps, 0 to 1}, for words that differ from `cross_share`.

    Raises:
        ValueError: a wrong argument, by name.

    Examples:
        >>> from diffusers import StableDiffusionPipeline
        >>> from flashbrush.integrations import PromptEdit, PromptToPrompt
        >>> from flashbrush.integrations.diffusers import apply
        >>> pipe = StableDiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
        >>> edit = PromptEdit(weights={2: 2.0})  # the same prompt, with twice the attention for token 2
        >>> with apply(pipe.unet, PromptToPrompt(edit)):
        ...     images = pipe(["a fluffy cat", "a fluffy cat"], num_inference_steps=2).images
    """

    alignment: TokenAlignment | None = Instance(TokenAlignment, None)
    weights: Mapping[int, float] = Numbers({})
    shares: Mapping[int, float] = Numbers({}, high=1)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # cached: inference tensors cannot be used in a backward pass
def cross_plan(
    edits: tuple[PromptEdit, ...], roles: tuple[EditRoles, ...], gates: Gates, length: int
) -> Plan | None:
    """The plan of cross-attention to `length` text tokens, or None where it is plain.

    An edit that uses both the source's map and its own is in two parts, whose outputs are added.
    """
    factors = [value_factors(edit, *gate, length) for edit, gate in zip(edits, gates, strict=True)]
    changed = [i for i, (first, second) in enumerate(factors) if first.any() or (second != 1).any()]
    parts = []
    for n, name in enumerate(("source", "target")):
        chosen = [i for i in changed if factors[i][n].any()]
        if chosen:
            read = torch.tensor([getattr(roles[i], name) for i in chosen])
            scale = ValueScale(torch.stack([factors[i][n] for i in chosen]))
            parts.append(Part([roles[i].target for i in chosen], {"q": read, "k": read}, value=scale))
    return Plan(parts=parts) if parts else None


def value_factors(
    edit: PromptEdit, all_words: bool, words: Sequence[bool], length: int
) -> tuple[Tensor, Tensor]:
    """The factors of V_tgt under the source's map, (tokens, tokens), and under its own, (tokens,); float32.

    Args:
        edit: the edit.
        all_words: whether the source's map counts for words without a share of their own.
        words: the same for each word of the edit's `shares`.
        length: text tokens.

    Raises:
        ValueError: an alignment of another length, or tokens beyond the text.
    """
    alignment = edit.alignment or TokenAlignment(torch.eye(length), torch.ones(length))
    if len(alignment.alphas) != length:
        raise ValueError(
            f"alignment: expected one for {length} text tokens, got one for {len(alignment.alphas)}"
        )
    if (last := max((*edit.weights, *edit.shares), default=0)) >= length:
        raise ValueError(f"edits: expected weights and shares of text tokens below {length}, got {last}")
    gate, weight = torch.full((length,), float(all_words)), torch.ones(length)
    gate[list(edit.shares)] = torch.tensor([float(word) for word in words])
    weight[list(edit.weights)] = torch.tensor([float(c) for c in edit.weights.values()])
    kept = alignment.alphas
    return alignment.mapper * (kept * weight * gate), 1 - gate + (1 - kept) * weight * gate


class ValueScale:
    """Part.value: V times (items, tokens, tokens), or times one number a token, (items, tokens)."""

    def __init__(self, factors: Tensor) -> None:
        self.factors = factors

    def __call__(self, v: Tensor) -> Tensor:
        self.factors = self.factors.to(v)  # kept on the device of V
        if self.factors.dim() == 2:
            return v * self.factors[..., None, None]
        return torch.einsum("nij,njhd->nihd", self.factors, v)
