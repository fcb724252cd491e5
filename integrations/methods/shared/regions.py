"""Regions of the image and their spans of the text, as segments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ....bindings import Segments


def on_grid(masks: Tensor, grid: tuple[int, int]) -> Tensor:
    """Masks (regions, rows, columns) resized by area; (regions, image tokens) float32, on the CPU."""
    return F.interpolate(masks.detach().cpu().float()[None], grid, mode="area")[0].flatten(1)


def text_segments(spans: Sequence[tuple[int, int]], text_len: int) -> tuple[Segments, dict[str, int]]:
    """The text cut into spans and the rests between them.

    Returns:
        The segments, without empty ones, and {name of a span's segment: its region}.
    """
    lengths, start = {}, 0
    for first, end, k in sorted((*span, k) for k, span in enumerate(spans)):
        lengths |= {f"rest_{k}": first - start, f"span_{k}": end - first}
        start = end
    lengths["rest"] = text_len - start
    names = {f"span_{k}": k for k in range(len(spans))}
    return Segments({n: length for n, length in lengths.items() if length}), names


def image_segments(masks: Tensor) -> tuple[Segments, Tensor, Tensor]:
    """The image cut into segments whose tokens are in the same regions.

    Args:
        masks: (regions, image tokens); a token is in a region from 0.5 on.

    Returns:
        The segments image_0, image_1, ...; the order of the image tokens that sorts them, int64; and bool
        (regions, segments): which regions each segment is in.
    """
    members, labels = (masks >= 0.5).unique(dim=1, return_inverse=True)
    names = [f"image_{n}" for n in range(members.shape[1])]
    segments, order, _ = Segments.from_labels(labels, names)
    return segments, order, members


def outside_pairs(image: Segments, members: Tensor, spans: dict[str, int]) -> list[tuple[str, str]]:
    """(image segment, span) for all image segments that are not in the span's region."""
    inside = members.tolist()
    return [
        (segment, span)
        for span, region in spans.items()
        for n, segment in enumerate(image.names)
        if not inside[region][n]
    ]


def joined(text: Segments, image: Segments) -> Segments:
    """The segments of [text ; image]."""
    return Segments({n: length for s in (text, image) for n, length in zip(s.names, s.lengths, strict=True)})


def text_first(order: Tensor, text_len: int) -> Tensor:
    """The order of image tokens as one of [text ; image], with the text in place."""
    return torch.cat([torch.arange(text_len), text_len + order])
