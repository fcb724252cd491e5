"""The segments of a diptych: text, two panels, and the hole that is painted in one of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ....bindings import Segments


def split(name: str, tokens: Any, rest: str, total: int) -> dict[str, int | Tensor]:
    """{name: its tokens, rest: the others} of `total` tokens.

    Args:
        name: of the first segment; a wrong number is reported as `name`_tokens.
        tokens: a number, or one for each item of the batch.
        rest: name of the second segment.
        total: tokens of both.

    Raises:
        ValueError: anything but whole numbers from 0 to `total`.
    """
    counts = tokens if isinstance(tokens, tuple) else (tokens,)
    if any(not isinstance(n, (int, float)) or n % 1 or not 0 <= n <= total for n in counts):
        raise ValueError(f"{name}_tokens: expected whole numbers from 0 to {total}, got {tokens}")
    first = torch.tensor(counts).int() if counts[1:] else int(counts[0])
    return {name: first, rest: total - first}


def cut_hole(segments: Segments, hole: Tensor, text_len: int) -> tuple[Segments, Tensor]:
    """The target's segment cut in two: (segments with "hole" as the last one, the order of tokens).

    Args:
        segments: of the tokens [text ; image], one of them named "target".
        hole: bool (image tokens,) or (batch, image tokens); where it is not the target's it is ignored.
        text_len: text tokens.

    Raises:
        ValueError: a hole of another number of tokens.
    """
    image_len = segments.total - text_len
    if hole.shape[-1] != image_len:
        raise ValueError(f"hole: expected {image_len} image tokens, got {hole.shape[-1]}")
    lengths = torch.tensor(segments.lengths) if segments.items is None else segments.items.cpu()
    ends = lengths.cumsum(-1)[..., None]  # ([batch,] segments, 1)
    labels = (torch.arange(segments.total) >= ends).sum(-2)
    target, painted = segments.index("target"), torch.nn.functional.pad(hole.cpu(), (text_len, 0))
    labels = torch.where(painted & (labels == target), len(segments), labels)
    with_hole, order, _ = Segments.from_labels(labels, [*segments.names, "hole"])
    return with_hole, order
