"""A subject of Personalize Anything: its tokens in a reference image, and their new places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .knobs import Count, Mask


@dataclass(frozen=True, eq=False)
class PersonalSubject:
    """A subject of PersonalizeAnything: where it is in its reference image, and where it goes.

    Args:
        mask: bool (rows, columns), the subject's image tokens in the reference, at least one.
        target: bool, the same shape and number of tokens: the places they go to, matched in raster order.
            None: the same places. token_masks.py moves, dilates and erodes masks.
        item: the batch item of the reference's reconstruction.

    Raises:
        ValueError: a wrong argument, by name.

    Examples:
        >>> import torch
        >>> from flashbrush.integrations import PersonalSubject
        >>> mask = torch.zeros(4, 6, dtype=torch.bool)
        >>> mask[1:3, 1:3] = True
        >>> subject = PersonalSubject(mask, target=mask.roll(2, dims=1))  # two tokens to the right
        >>> subject.positions(target=True)[0]  # row and column of the first
        tensor([1, 3])
    """

    mask: Tensor = Mask("rows, columns", some=True)
    target: Tensor | None = Mask("rows, columns", some=True, default=None)
    item: int = Count(0)

    def __post_init__(self) -> None:
        mask, target = self.mask, self.mask if self.target is None else self.target
        if target.shape != mask.shape or target.sum() != mask.sum():
            raise ValueError(
                f"target: expected {int(mask.sum())} tokens of {tuple(mask.shape)}, as in mask, got "
                f"{int(target.sum())} of {tuple(target.shape)}"
            )

    def positions(self, target: bool) -> Tensor:
        """Rows and columns of the reference's tokens or the target's; int64 (tokens, 2), in raster order."""
        return (self.mask if self.target is None or not target else self.target).nonzero()

    def tokens(self, target: bool, device: torch.device) -> Tensor:
        """Indices of the reference's image tokens, or of the target's; int64 (tokens,), in raster order."""
        return _tokens(self, target, device)

    def shuffled(self, width: int, seed: int, step: int, device: torch.device) -> Tensor:
        """The reference's tokens, in a random order within each window of width x width; int64 (tokens,).

        Args:
            width: of the windows, in tokens.
            seed: of the order.
            step: index of the step, at each of which the order is drawn anew.
            device: of the result.
        """
        return _shuffled(self, width, seed, step, device)


def replace_tokens(
    subjects: Sequence[PersonalSubject], draw: tuple[int, int, int], start: int, x: Tensor
) -> Tensor:
    """A new tensor of x, with the subjects' tokens copied from the other items into the last.

    Args:
        subjects: which tokens go where.
        draw: width, seed and step of PersonalSubject.shuffled().
        start: position of the first image token.
        x: (batch, tokens, channels).
    """
    y = x.clone()
    for subject in subjects:
        y[-1, start + subject.tokens(True, x.device)] = x[
            subject.item, start + subject.shuffled(*draw, x.device)
        ]
    return y


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # cached: inference tensors cannot be used in a backward pass
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
