"""Segments: an ordered, named partition of a run of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

INT_DTYPES = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)


class Segments:
    """Contiguous, named runs of tokens: ``Segments(prompt=512, subject=2304, target=2304)``.

    A length is an int (>= 0, in tokens), or an int tensor of shape (batch,) on the CPU where the items of a
    batch differ; then the totals of all items must be equal. An empty segment is legal.

    Raises:
        TypeError: a length is neither an int nor an int tensor.
        ValueError: no segment, a negative length, tensors of different batch sizes, totals that differ.
    """

    def __init__(self, lengths: Mapping[str, int | Tensor] | None = None, /, **named: int | Tensor) -> None:
        if lengths is not None and not isinstance(lengths, Mapping):
            raise TypeError(f"Segments: expected name=length or a dict of them, got {type(lengths).__name__}")
        merged = {**(lengths or {}), **named}
        if len(merged) < len(lengths or {}) + len(named):
            raise ValueError("Segments: a name is given twice, in the dict and as a keyword")
        if not merged:
            raise ValueError(
                "Segments: expected at least one segment, for example Segments(tokens=128), got none"
            )
        batch: int | None = None
        for name, length in merged.items():
            if not isinstance(name, str) or not name or name == "*":
                raise ValueError(f"Segments: a name must be a non-empty string other than '*', got {name!r}")
            if isinstance(length, Tensor):
                batch = _check_item_lengths(name, length, batch)
            elif isinstance(length, bool) or not isinstance(length, (int, torch.SymInt)):
                raise TypeError(
                    f"Segments: the length of {name!r} must be an int or an int tensor (batch,), "
                    f"got {type(length).__name__}"
                )
            elif length < 0:
                raise ValueError(f"Segments: the length of {name!r} must be >= 0 tokens, got {length}")
        self.names: tuple[str, ...] = tuple(merged)
        self.items: Tensor | None = None
        if batch is None:
            self.lengths: tuple[int, ...] = tuple(merged.values())  # type: ignore[arg-type]
            self.total: int = sum(self.lengths)
            return
        items = torch.stack(
            [
                length.to(torch.int32)
                if isinstance(length, Tensor)
                else torch.full((batch,), length, dtype=torch.int32, device="cpu")
                for length in merged.values()
            ],
            dim=1,
        )  # (batch, segments)
        totals = items.sum(1)
        if not bool((totals == totals[0]).all()):
            raise ValueError(f"Segments: the items' totals must be equal, got {totals.tolist()}")
        self.total = int(totals[0])
        if bool((items == items[0]).all()):
            self.lengths = tuple(items[0].tolist())
        else:
            self.items = items
            self.lengths = tuple(items.max(0).values.tolist())

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __repr__(self) -> str:
        if self.items is None:
            return (
                "Segments("
                + ", ".join(f"{n}={k}" for n, k in zip(self.names, self.lengths, strict=True))
                + ")"
            )
        columns = self.items.t().tolist()
        return "Segments(" + ", ".join(f"{n}={c}" for n, c in zip(self.names, columns, strict=True)) + ")"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Segments) or self.names != other.names or self.lengths != other.lengths:
            return False
        if self.items is None or other.items is None:
            return self.items is other.items
        return self.items.shape == other.items.shape and bool((self.items == other.items).all())

    def __hash__(self) -> int:
        return hash((self.names, self.lengths))

    def index(self, name: str, argument: str = "name") -> int:
        """Position of a segment; ValueError naming `argument` if there is none of that name."""
        if name not in self.names:
            raise ValueError(f"{argument}: unknown segment {name!r}; expected one of {', '.join(self.names)}")
        return self.names.index(name)

    def slice(self, name: str) -> slice:
        """The tokens of a segment as a slice; ValueError where they differ from item to item."""
        position = self.index(name)
        if self.items is not None:
            before = self.items[:, :position].sum(1)
            if not bool(
                (before == before[0]).all() and (self.items[:, position] == self.items[0, position]).all()
            ):
                raise ValueError(
                    f"Segments.slice: {name!r} lies elsewhere in each item of the batch; use .items"
                )
            start, length = int(before[0]), int(self.items[0, position])
        else:
            start, length = sum(self.lengths[:position]), self.lengths[position]
        return slice(start, start + length)

    @staticmethod
    def from_labels(labels: Tensor, names: Sequence[str]) -> tuple[Segments, Tensor, Tensor]:
        """Sort interleaved labels (a horizontal diptych, a region mask) into contiguous segments.

        Args:
            labels: int (tokens,) or (batch, tokens); a label is an index into `names`.
            names: the segments' names, in the order they are to be sorted into.

        Returns:
            ``(segments, permutation, inverse)``; the index tensors have the shape of `labels`, int64, and are
            stable: ``sorted = x[:, permutation]`` and ``x = sorted[:, inverse]`` for labels (tokens,); with
            (batch, tokens) gather item by item.

        Raises:
            TypeError: labels are not integers. ValueError: their rank is not 1 or 2, or one is not an index
                of `names`.
        """
        if not isinstance(labels, Tensor) or labels.dtype not in INT_DTYPES:
            got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
            raise TypeError(f"labels: expected an int tensor, got {got}")
        if labels.dim() not in (1, 2):
            raise ValueError(
                f"labels: expected shape (tokens,) or (batch, tokens), got {tuple(labels.shape)}"
            )
        if isinstance(names, str):
            raise TypeError(f"names: expected a list of names, got the string {names!r}")
        names = list(names)
        if len(set(names)) != len(names):
            raise ValueError(f"names: expected distinct names, got {names}")
        if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) >= len(names)):
            raise ValueError(
                f"labels: expected values in 0..{len(names) - 1}, "
                f"got {int(labels.min())}..{int(labels.max())}"
            )
        permutation = torch.argsort(labels.long(), dim=-1, stable=True)
        inverse = torch.argsort(permutation, dim=-1)
        one_hot = labels.long().unsqueeze(-1) == torch.arange(len(names), device=labels.device)
        counts = one_hot.sum(-2).cpu()  # (names,) or (batch, names)
        if labels.dim() == 1:
            lengths: dict[str, int | Tensor] = {n: int(c) for n, c in zip(names, counts, strict=True)}
        else:
            lengths = {n: counts[:, i].contiguous() for i, n in enumerate(names)}
        return Segments(lengths), permutation, inverse


def _check_item_lengths(name: str, length: Tensor, batch: int | None) -> int:
    if length.dtype not in INT_DTYPES or length.dim() != 1:
        raise TypeError(
            f"Segments: the length of {name!r} must be an int tensor (batch,), "
            f"got {length.dtype} of shape {tuple(length.shape)}"
        )
    if length.device.type != "cpu":
        raise TypeError(
            f"Segments: the length of {name!r} must be on the CPU (it decides a layout), got {length.device}"
        )
    if not length.shape[0]:
        raise ValueError(
            f"Segments: the length of {name!r} must be an int tensor (batch,) with at least one item"
        )
    if bool((length < 0).any()):
        raise ValueError(f"Segments: the length of {name!r} must be >= 0 tokens, got {length.tolist()}")
    if batch is not None and length.shape[0] != batch:
        raise ValueError(
            f"Segments: the length of {name!r} has {length.shape[0]} items, another segment has {batch}"
        )
    return length.shape[0]
