"""Prompt-to-Prompt (arXiv 2208.01626): a changed prompt changes an image where its words do, and leaves its
layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..diffusers.protocol.batch_call import Part
from ..diffusers.protocol.layer import Layer, Step
from ..diffusers.protocol.plan import Plan
from .shared import cross_batch as borrowed, edit_roles
from .shared.edit_roles import EditRoles
from .shared.local_blend import LocalBlend
from .shared.token_alignment import TokenAlignment

# For each edit: whether the source's maps count now, for all words and for those of `shares`
Gates = tuple[tuple[bool, tuple[bool, ...]], ...]


@dataclass(frozen=True, eq=False)
class PromptEdit:
    """What one edit's prompt changes.

    Args:
        alignment: of its tokens with the source's, TokenAlignment.replace() or refine(); None: it is the same
            prompt.
        weights: {text token: c >= 0}: reweighting, which multiplies the tokens' probabilities and does not
            renormalise.
        shares: {text token: share of the steps}, for words other than those of `cross_share`.
    """

    alignment: TokenAlignment | None = None
    weights: Mapping[int, float] = field(default_factory=dict)
    shares: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.alignment is not None and not isinstance(self.alignment, TokenAlignment):
            raise ValueError(f"alignment: expected a TokenAlignment or None, got {self.alignment!r}")
        for name, most in (("weights", float("inf")), ("shares", 1)):
            # A copy: plans are kept for an edit as it is now.
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))
            for token, value in getattr(self, name).items():
                if not borrowed.is_count(token) or not borrowed.is_number(value) or not 0 <= value <= most:
                    raise ValueError(
                        f"{name}: expected {{text token: number from 0 to {most}}}, got {token!r}: {value!r}"
                    )

    def __reduce__(self) -> tuple:
        return PromptEdit, (self.alignment, dict(self.weights), dict(self.shares))


@dataclass(eq=False)
class PromptToPrompt:
    """The edits' cross-attention maps, token by token, and their self-attention maps are made of the
    source's.

    With M the mapper and a the alphas of an edit's alignment, c its weights and g = 1 as long as a word's
    share of the steps lasts, then 0; c, a, g are one number a token, and stand for diagonal matrices:

        A     = (A_src M a + A_tgt (1 - a)) c                    replace: a = 1; refine: a = 0 for new words
        o_tgt = (A g + A_tgt (1 - g)) V_tgt
              = A_src (M a c g V_tgt) + A_tgt ((1 - g + (1 - a) c g) V_tgt)

    in cross-attention, where M thus meets the values and no map, and o_tgt = A_src V_tgt in small
    self-attention layers, both in the conditional half of a classifier-free guidance alone. Nothing is
    renormalised (code; tables of the literature say otherwise). Images start from one noise; the shares'
    defaults are those of the released notebooks, as far as is known, for 50 steps and guidance of 7.5. A knob
    may be set at any time; ValueError names a wrong one.

    Args:
        edits: a PromptEdit for each of the roles.
        cross_share, self_share: of the steps, from the first on, in which cross- and self-attention maps are
            the source's.
        self_resolution: the side of a square of as many tokens, up to which layers' self-attention is; 16 in
            the early release, 32 in later notebooks.
        count: steps of the run, where the handle has not been told.
        blend: gathers maps of words, for a call of it on the latents after each step; None: there is none.
        items: which items of a call are what; None: the batch is [source, edit_1, ..., edit_n] twice, of
            which the second, conditional half is edited.
    """

    edits: Sequence[PromptEdit]
    cross_share: float = 0.8
    self_share: float = 0.4
    self_resolution: int = 16
    count: int = 50
    blend: LocalBlend | None = None
    items: Sequence[EditRoles] | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "edits":
            value = borrowed.several(value, PromptEdit)
            if not value or not all(isinstance(edit, PromptEdit) for edit in value):
                raise ValueError(f"edits: expected one or several PromptEdits, got {value!r}")
        if name in ("cross_share", "self_share"):
            value = borrowed.check_share(name, value)
        if name in ("self_resolution", "count") and not (borrowed.is_count(value) and value):
            raise ValueError(f"{name}: expected a number > 0, got {value!r}")
        if name == "blend" and not isinstance(value, LocalBlend | None):
            raise ValueError(f"blend: expected a LocalBlend or None, got {value!r}")
        object.__setattr__(self, name, edit_roles.checked_edit(name, value))

    def plan(self, layer: Layer, step: Step) -> Plan | None:
        own = borrowed.is_self(layer, borrowed.PLACES)
        see = None if self.blend is None else self.blend.plan(layer, step)
        roles, progress = (
            edit_roles.conditional(self.items, layer.batch),
            step.index / (step.count or self.count),
        )
        if len(roles) != len(self.edits):
            raise ValueError(
                f"edits: expected one for each of {len(roles)} edited items, got {len(self.edits)}"
            )
        if own:
            small = layer.image_len <= self.self_resolution**2
            return edit_roles.inject(roles) if small and progress < self.self_share else None
        if layer.kind != "cross":
            return None
        gates = tuple(
            (progress < self.cross_share, tuple(progress < s for s in e.shares.values())) for e in self.edits
        )
        plan = cross_plan(self.edits, roles, gates, layer.text_len)
        return plan if see is None else replace(plan or Plan(), see=see)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def cross_plan(
    edits: tuple[PromptEdit, ...], roles: tuple[EditRoles, ...], gates: Gates, length: int
) -> Plan | None:
    """The plan of cross-attention to `length` text tokens, None where it is plain; two calls where both maps
    count.
    """
    factors = [value_factors(edit, *gate, length) for edit, gate in zip(edits, gates, strict=True)]
    changed = [i for i, (first, second) in enumerate(factors) if first.any() or (second != 1).any()]
    parts = []
    for n, name in enumerate(("source", "target")):
        chosen = [i for i in changed if factors[i][n].any()]
        if chosen:
            read = torch.tensor([getattr(roles[i], name) for i in chosen])
            mix = ValueMix(torch.stack([factors[i][n] for i in chosen]))
            parts.append(Part([roles[i].target for i in chosen], {"q": read, "k": read}, value=mix))
    return Plan(parts=parts) if parts else None


def value_factors(
    edit: PromptEdit, all_words: bool, words: Sequence[bool], length: int
) -> tuple[Tensor, Tensor]:
    """What V_tgt is multiplied by for the source's map, (tokens, tokens), and for its own, (tokens,);
    float32.

    Args:
        all_words, words: whether the source's map counts, and whether it does for each of the edit's
            `shares`.
        length: text tokens.

    Raises:
        ValueError: an alignment for other lengths, or tokens beyond the text.
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


class ValueMix:
    """V times (items, tokens, tokens), or times one number a token, (items, tokens); kept on the device of V."""

    def __init__(self, factors: Tensor) -> None:
        self.factors = factors

    def __call__(self, v: Tensor) -> Tensor:
        self.factors = self.factors.to(v)
        if self.factors.dim() == 2:
            return v * self.factors[..., None, None]
        return torch.einsum("nij,njhd->nihd", self.factors, v)
