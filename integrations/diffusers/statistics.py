"""Statistics of controlled calls: what Handle.stats holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from ...bindings import Stats

if TYPE_CHECKING:  # imports diffusers
    from .hosts.processor import ControlledProcessor


class Record(NamedTuple):
    """Statistics of one controlled attention call.

    Attributes:
        step: Step.index.
        layer: Layer.index.
        kind: Layer.kind.
        stats: on the model's device; a field that apply() was not asked for is an empty tensor.
        items: batch items of the call; None: all.
    """

    step: int
    layer: int
    kind: str
    stats: Stats
    items: tuple[int, ...] | None = None


class Records:
    """The statistics so far.

    Args:
        kinds: Layer.kind of each layer.
        fields: the fields of Stats to keep.
    """

    def __init__(self, kinds: Sequence[str], fields: frozenset[str]) -> None:
        self.kinds, self.fields = kinds, fields
        self.records: list[Record] = []

    def collect(self, processors: Sequence[ControlledProcessor], step: int) -> None:
        """Move the statistics of the processors' calls into records of that step."""
        for i, processor in enumerate(processors):
            for items, stats in processor.stats:
                kept = {name: _kept(t, name in self.fields) for name, t in stats._asdict().items()}
                self.records.append(Record(step, i, self.kinds[i], Stats(**kept), items))
            processor.stats = ()

    def clear(self) -> None:
        """Start a new list; one that was handed out keeps its records."""
        self.records = []


def _kept(t: Tensor, wanted: bool) -> Tensor:
    """A copy: a CUDA graph overwrites its own outputs in the next step."""
    return t.detach().clone() if wanted else t.new_empty(0)
