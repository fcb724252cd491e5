"""Masks of latents and of image tokens: converted, moved, dilated and eroded."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def token_mask(mask: Tensor) -> Tensor:
    """The tokens of which any of the 2 x 2 latents is masked, bool (tokens,).

    Args:
        mask: of the latents, (rows, columns), even numbers; anything but 0 is masked.

    Raises:
        ValueError: another shape.
    """
    return _blocks(mask).bool().any(1)


def packed_mask(mask: Tensor, channels: int) -> Tensor:
    """The mask as FLUX packs its latents, (tokens, 4 * channels).

    Args:
        mask: of the latents, (rows, columns), even numbers.
        channels: of the latents.

    Raises:
        ValueError: another shape.
    """
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
    """The mask moved down and right.

    Args:
        mask: bool (rows, columns).
        rows: how far down, in tokens.
        columns: how far to the right, in tokens.

    Raises:
        ValueError: it would leave the image.
    """
    height, width = mask.shape
    places = mask.nonzero() + torch.tensor([rows, columns], device=mask.device)
    if bool(((places < 0) | (places >= torch.tensor([height, width], device=mask.device))).any()):
        raise ValueError(f"mask: moved by ({rows}, {columns}) it leaves the {height} x {width} tokens")
    return mask.roll((rows, columns), (0, 1))


def dilated(mask: Tensor, size: int = 3) -> Tensor:
    """The mask and all tokens in a square of size x size around one of its tokens.

    Args:
        mask: bool (rows, columns).
        size: an odd number of tokens.

    Raises:
        ValueError: another size.
    """
    if size % 2 == 0 or size < 1:
        raise ValueError(f"size: expected an odd number of tokens, got {size!r}")
    return nn.functional.max_pool2d(mask[None].float(), size, 1, size // 2)[0] > 0


def eroded(mask: Tensor, size: int = 3) -> Tensor:
    """The tokens of the mask whose square of size x size is all masked; beyond the image counts as masked.

    Args:
        mask: bool (rows, columns).
        size: an odd number of tokens.

    Raises:
        ValueError: another size.
    """
    return ~dilated(~mask, size)
