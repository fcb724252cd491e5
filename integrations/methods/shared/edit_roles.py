"""Batches in which images are edited along with their source: which item is which, and which transformer
block it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from ...diffusers.protocol.batch_call import Part
from ...diffusers.protocol.layer import Layer
from ...diffusers.protocol.plan import Plan
from .cross_batch import check_window, checked


@dataclass(frozen=True)
class EditRoles:
    """Which item of a batch is the source, and which one is its edit, in one half of a classifier-free
    guidance.
    """

    source: int
    target: int

    @staticmethod
    def stacked(edits: int = 1, halves: int = 2) -> tuple[EditRoles, ...]:
        """For batches [source, edit_1, ..., edit_n], `halves` times one after the other.

        Args:
            edits: n. halves: 2 where the unconditional half of a classifier-free guidance is in the same
                batch.

        Raises:
            ValueError: less than one of them.
        """
        for name, count in (("edits", edits), ("halves", halves)):
            if count < 1:
                raise ValueError(f"{name}: expected at least 1, got {count}")
        return tuple(
            EditRoles(first, first + n)
            for first in range(0, halves * (edits + 1), edits + 1)
            for n in range(1, edits + 1)
        )


def pairs(items: Sequence[EditRoles] | None, batch: int) -> tuple[EditRoles, ...]:
    """The roles, by default those of [source, edit_1, ..., edit_n] unconditional and then conditional."""
    if items is not None:
        return tuple(items)
    if batch < 4 or batch % 2:
        raise ValueError(
            f"items: without them a batch is [source, edit_1, ..., edit_n] twice, unconditional and conditional, which "
            f"{batch} items are not"
        )
    return EditRoles.stacked(batch // 2 - 1)


def conditional(items: Sequence[EditRoles] | None, batch: int) -> tuple[EditRoles, ...]:
    """The roles, by default those of the second, conditional half of such a batch."""
    chosen = pairs(items, batch)
    return chosen if items is not None else chosen[len(chosen) // 2 :]


@lru_cache(maxsize=64)
@torch.inference_mode(
    False
)  # kept beyond a call in inference mode, whose tensors would be of no use to a gradient
def inject(roles: tuple[EditRoles, ...]) -> Plan:
    """The edits' attention maps are their source's: o_tgt = softmax(Q_src K_src^T / sqrt(d)) V_tgt."""
    source = torch.tensor([pair.source for pair in roles])
    return Plan(parts=[Part([pair.target for pair in roles], {"q": source, "k": source})])


def block_index(layer: Layer) -> int:
    """The transformer block's place in a UNet's forward pass: each has a self- and a cross-attention.

    It is also the place among the self-attention layers: 0 to 15 in SD 1.5 and SD 2, 0 to 69 in SDXL.
    """
    return layer.index // 2


def checked_edit(name: str, value: Any) -> Any:
    """The canonical form of the knob `name`, as it is where the name is not known here; ValueError for a
    wrong value.
    """
    return (
        check_window(name, value) if name in ("layers", "feature_steps") else checked(name, value, EditRoles)
    )
