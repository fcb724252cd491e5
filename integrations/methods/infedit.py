"""InfEdit (arXiv 2312.04965): unified attention control, for its sampler in ddcm.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..diffusers.protocol.batch_call import Part
from ..diffusers.protocol.layer import Layer, Step
from ..diffusers.protocol.plan import Plan
from .prompt_to_prompt import PromptEdit, cross_plan
from .shared import cross_batch as borrowed
from .shared.cross_batch import Resolution
from .shared.edit_roles import EditRoles
from .shared.local_blend import LocalBlend


@dataclass(frozen=True)
class MutualRoles:
    """The source, its edit, and the item of the edit's layout and the source's contents; of one half of a
    guidance.
    """

    source: int = 0
    target: int = 1
    mutual: int = 2
    conditional: bool = True  # whether its cross-attention is edited


@dataclass(eq=False)
class InfEdit:
    """Unified attention control over the items source, target and mutual.

    With A_x the self-attention map of item x's queries and keys, up to a share of the steps

        o_tgt = A_src V_tgt                     o_mut = A_src V_src

    and from then on o_mut = softmax(Q_tgt K_src^T / sqrt(d)) V_src, with o_tgt plain; the target's
    cross-attention is Prompt-to-Prompt's refinement by the source's, up to another share. The source is
    plain. The switches are the released code's; the paper mixes both maps by a factor. Around it ddcm_step()
    samples, for 15 steps with guidance of 1 for the source and 2 for the target. A knob may be set at any
    time; ValueError names a wrong one.

    Args:
        edit: the target's prompt; its alignment is TokenAlignment.refine()'s. (The code also aligns words
            that are new to the source, by the cosine of their embeddings: an alignment of one's own does
            that.)
        self_share: of the steps before which self-attention is the source's.
        cross_share: of the steps up to which, itself included, cross-attention is refined.
        count: steps of the run, where the handle has not been told.
        blend: gathers maps of words, for a call of it on the latents; None: there is none.
        items: which items of a call are what; None: the batch is [source, target, mutual], once, or twice,
            unconditional and conditional.
    """

    edit: PromptEdit
    self_share: float = 0.3
    cross_share: float = 0.7
    count: int = 15
    blend: MutualBlend | None = None
    items: Sequence[MutualRoles] | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "edit" and not isinstance(value, PromptEdit):
            raise ValueError(f"edit: expected a PromptEdit, got {value!r}")
        if name in ("self_share", "cross_share"):
            value = borrowed.check_share(name, value)
        if name == "count" and not (borrowed.is_count(value) and value):
            raise ValueError(f"count: expected a number of steps > 0, got {value!r}")
        if name == "blend" and not isinstance(value, MutualBlend | None):
            raise ValueError(f"blend: expected a MutualBlend or None, got {value!r}")
        object.__setattr__(self, name, borrowed.checked(name, value, MutualRoles))

    def plan(self, layer: Layer, step: Step) -> Plan | None:
        own = borrowed.is_self(layer, borrowed.PLACES)
        see = None if self.blend is None else self.blend.plan(layer, step)
        roles, progress = self._roles(layer.batch), step.index / (step.count or self.count)
        if own:
            return _self(roles, progress < self.self_share)
        if layer.kind != "cross":
            return None
        edited = tuple(EditRoles(item.source, item.target) for item in roles if item.conditional)
        gates = (
            (progress <= self.cross_share, tuple(progress <= s for s in self.edit.shares.values())),
        ) * len(edited)
        plan = cross_plan((self.edit,) * len(edited), edited, gates, layer.text_len)
        return plan if see is None else replace(plan or Plan(), see=see)

    def _roles(self, batch: int) -> tuple[MutualRoles, ...]:
        if self.items is not None:
            return tuple(self.items)
        if batch not in (3, 6):
            raise ValueError(
                f"items: without them a batch is [source, target, mutual], once or twice, not {batch} items"
            )
        return (MutualRoles(),) if batch == 3 else (MutualRoles(conditional=False), MutualRoles(3, 4, 5))


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _self(roles: tuple[MutualRoles, ...], early: bool) -> Plan:
    source, target = (torch.tensor([getattr(item, name) for item in roles]) for name in ("source", "target"))
    mutual = [item.mutual for item in roles]
    if not early:
        return Plan(parts=[Part(mutual, {"q": target, "k": source, "v": source})])
    both = torch.cat([source, source])
    items = [item.target for item in roles] + mutual
    return Plan(parts=[Part(items, {"q": both, "k": both, "v": torch.cat([target, source])})])


class MutualBlend(LocalBlend):
    """Fed by InfEdit's plans; called on the latents of [source, target, mutual].

    Each pixel of the target is the target's where its words are looked at, else the mutual's where the
    mutual's words are, else the source's. Maps are pooled and resized as LocalBlend's. (Which of the two
    comes first, and whose attention is looked at, is our reading of the method.)

    Args:
        target, mutual: positions of words among their own text tokens. target_threshold, mutual_threshold: in
            [0, 1].
        resolution: of the layers, the side of a square of as many tokens or (rows, columns).

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """

    def __init__(
        self,
        target: Sequence[int],
        mutual: Sequence[int],
        target_threshold: float = 0.6,
        mutual_threshold: float = 0.6,
        resolution: Resolution = 16,
    ) -> None:
        super().__init__([target, mutual], resolution=resolution)
        self.thresholds = (
            borrowed.check_share("target_threshold", target_threshold),
            borrowed.check_share("mutual_threshold", mutual_threshold),
        )

    def __call__(self, latents: Tensor) -> Tensor:
        """latents: (3, channels, rows, columns), without the unconditional half; a new tensor like it."""
        if len(latents) != 3:
            raise ValueError(
                f"latents: expected those of the source, the target and the mutual item, got {len(latents)}"
            )
        target, mutual = self.masks((latents.shape[2], latents.shape[3]))
        blended = torch.where(target, latents[1], torch.where(mutual, latents[2], latents[0]))
        return torch.stack([latents[0], blended, latents[2]])
