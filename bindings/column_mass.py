"""column_mass(): how much attention each key receives, without the attention map."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .backends.planner import check_name
from .core.autograd import refuse_tangents
from .core.control import Control, segment_indices
from .core.lowering import Keys, Source, lower_with_lse
from .operators import column_mass as operators


@torch.no_grad()
def column_mass(
    q: Tensor,
    k: Keys,
    lse: Tensor,
    control: Control | None = None,
    *,
    scale: float | Tensor | None = None,
    source: Source | None = None,
    rows: str | Sequence[str] = "*",
    backend: str = "auto",
) -> Tensor:
    """sum_i p_ij for each key j, over the rows i of some row segments: the mass of self-attention guidance.

    p is the probability within the key's softmax group, before weight, gate, contrast and gain, as in
    Stats.mass; here it is given for each key. The map is recomputed from lse in tiles. Not differentiable.

    Args:
        q: as in attention().
        k: as in attention().
        lse: Stats.lse of that attention, (batch, heads, rows, groups).
        control: as in attention().
        scale: as in attention().
        source: as in attention(), with the keys "q" and "k".
        rows: the row segments whose rows count: a name of control.rows, or a sequence of names. "*": all
            rows.
        backend: "auto", or a name of backends(). A named one raises with its reasons rather than fall back.

    Returns:
        (batch, heads, keys) float32 (float64 for float64), keys in the order of k, or of the joined list. A
        removed key has 0.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Examples:
        >>> import torch, flashbrush as fb
        >>> q, k, v = torch.randn(3, 1, 12, 2, 8)
        >>> _, stats = fb.attention(q, k, v, return_stats=True)
        >>> fb.column_mass(q, k, stats.lse).sum(-1).round()
        tensor([[12., 12.]])
    """
    p = lower_with_lse(q, k, lse, control, scale, source)
    refuse_tangents(p.q, *p.k, lse)
    check_name(backend)
    if rows == "*":
        counted = tuple(range(len(p.row_lengths)))
    elif control is None:
        raise ValueError(f"rows: expected '*' in a call without a control, got {rows!r}")
    else:
        counted = segment_indices("rows", rows, control.rows)
    return operators.call(p, lse, counted, backend)
