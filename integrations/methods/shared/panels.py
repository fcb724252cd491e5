"""The panels of a row of images: references, and the target last."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=64)
def panels(grid: tuple[int, int], references: int = 1, widths: tuple[int, ...] | None = None) -> Tensor:
    """The panel that each token is in, int64 (rows * columns,): 0, 1, ... from the left, the target last.

    Args:
        grid: (rows, columns) of the image tokens.
        references: panels beside the target.
        widths: of the panels in tokens, the target's last; None: all are equally wide.

    Raises:
        ValueError: other than references + 1 widths, or another sum of them than the columns; without
            widths, columns that have no references + 1 equal parts.

    Examples:
        >>> from flashbrush.integrations.methods.shared.panels import panels
        >>> panels((2, 4))
        tensor([0, 0, 1, 1, 0, 0, 1, 1])
    """
    rows, columns = grid
    if widths is None:
        if columns % (references + 1):
            raise ValueError(
                f"widths: {columns} columns are not {references + 1} equally wide panels; give their widths"
            )
        widths = (columns // (references + 1),) * (references + 1)
    if len(widths) != references + 1 or sum(widths) != columns:
        raise ValueError(
            f"widths: expected those of {references + 1} panels, {columns} tokens together, got {widths}"
        )
    with torch.inference_mode(False):  # cached: inference tensors cannot be used in a backward pass
        return torch.arange(references + 1).repeat_interleave(torch.tensor(widths)).repeat(rows)


def known_mask(painted: Tensor, references: Sequence[int]) -> Tensor:
    """The model's mask of all panels, (..., height, widths): 1 known, 0 generated; FLUX Fill's has 1 - mask.

    Args:
        painted: (..., height, width) of the target, 1 where it is generated; all ones for the task "free".
        references: widths of the references' panels, all of which is known.

    Examples:
        >>> import torch
        >>> from flashbrush.integrations.methods.shared.panels import known_mask
        >>> known_mask(torch.tensor([[1.0, 0.0]]), [2])  # a reference of width 2
        tensor([[1., 1., 0., 1.]])
    """
    known = painted.new_ones(*painted.shape[:-1], sum(references))
    return torch.cat([known, 1 - painted], -1)
