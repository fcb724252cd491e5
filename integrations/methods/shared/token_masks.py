"""Masks of latents and of image tokens: from one to the other, larger, smaller and elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def token_mask(mask: Tensor) -> Tensor:
    """bool (tokens,) from a mask of the latents (rows, columns): tokens of which any of the 2 x 2 latents is
    masked.
    """
    return _blocks(mask).bool().any(1)


def packed_mask(mask: Tensor, channels: int) -> Tensor:
    """The mask of the latents (rows, columns) as FLUX packs `channels` of them, (tokens, 4 * channels)."""
    return _blocks(mask)[:, None].expand(-1, channels, -1).flatten(1)


def _blocks(mask: Tensor) -> Tensor:
    """(tokens, 4)"""
    if mask.dim() != 2 or mask.shape[0] % 2 or mask.shape[1] % 2:
        raise ValueError(
            f"mask: expected (rows, columns) of the latents, even numbers, got {tuple(mask.shape)}"
        )
    rows, columns = mask.shape
    return mask.reshape(rows // 2, 2, columns // 2, 2).transpose(1, 2).reshape(-1, 4)


def moved(mask: Tensor, rows: int = 0, columns: int = 0) -> Tensor:
    """The mask (rows, columns) moved down and right; ValueError where it would leave the image."""
    height, width = mask.shape
    places = mask.nonzero() + torch.tensor([rows, columns], device=mask.device)
    if bool(((places < 0) | (places >= torch.tensor([height, width], device=mask.device))).any()):
        raise ValueError(f"mask: moved by ({rows}, {columns}) it leaves the {height} x {width} tokens")
    return mask.roll((rows, columns), (0, 1))


def dilated(mask: Tensor, size: int = 3) -> Tensor:
    """The mask (rows, columns) and all tokens within a square of size x size, odd, around one of its tokens."""
    if size % 2 == 0 or size < 1:
        raise ValueError(f"size: expected an odd number of tokens, got {size!r}")
    return nn.functional.max_pool2d(mask[None].float(), size, 1, size // 2)[0] > 0


def eroded(mask: Tensor, size: int = 3) -> Tensor:
    """The tokens of the mask (rows, columns) around which a square of size x size has no other; beyond the
    image is none.
    """
    return ~dilated(~mask, size)
