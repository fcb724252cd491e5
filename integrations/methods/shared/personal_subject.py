"""A subject of Personalize Anything: its tokens in the reference, and those that they shall take the place
of.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .cross_batch import is_count


@dataclass(frozen=True, eq=False)
class PersonalSubject:
    """A subject: where it is in its reference image, and where it shall be.

    Args:
        mask: bool (rows, columns) of the image tokens, at least one.
        target: as many tokens as in `mask`, matched in raster order; None: the same place. token_masks.py
            moves, dilates and erodes masks.
        item: of the batch, the reference's reconstruction.
    """

    mask: Tensor
    target: Tensor | None = None
    item: int = 0

    def __post_init__(self) -> None:
        for name, mask in (
            ("mask", self.mask),
            ("target", self.mask if self.target is None else self.target),
        ):
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() != 2 or not mask.any():
                raise ValueError(f"{name}: expected a bool tensor (rows, columns) with at least one token")
            if mask.shape != self.mask.shape or mask.sum() != self.mask.sum():
                raise ValueError(
                    f"{name}: expected {int(self.mask.sum())} tokens of {tuple(self.mask.shape)}, as in mask, got "
                    f"{int(mask.sum())} of {tuple(mask.shape)}"
                )
        if not is_count(self.item):
            raise ValueError(f"item: expected an item of the batch, got {self.item!r}")

    def positions(self, target: bool) -> Tensor:
        """int64 (tokens, 2): row and column of the target's tokens, or of the reference's, in raster order."""
        return (self.mask if self.target is None or not target else self.target).nonzero()

    def tokens(self, target: bool, device: torch.device) -> Tensor:
        """int64 (tokens,): the target's image tokens, or the reference's, in raster order."""
        return _tokens(self, target, device)

    def shuffled(self, width: int, seed: int, step: int, device: torch.device) -> Tensor:
        """The reference's tokens, those in each window of width x width in a random order."""
        return _shuffled(self, width, seed, step, device)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept outlives a call in inference mode
def _tokens(subject: PersonalSubject, target: bool, device: torch.device) -> Tensor:
    row, column = subject.positions(target).unbind(1)
    return (row * subject.mask.shape[1] + column).to(device)


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def _shuffled(subject: PersonalSubject, width: int, seed: int, step: int, device: torch.device) -> Tensor:
    tokens, cell = subject.tokens(False, torch.device("cpu")), subject.positions(False).cpu() // width
    window = cell[:, 0] * subject.mask.shape[1] + cell[:, 1]
    drawn = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed * 100_003 + step))
    shuffled = torch.empty_like(tokens)
    shuffled[window.argsort(stable=True)] = tokens[drawn[window[drawn].argsort(stable=True)]]
    return shuffled.to(device)
