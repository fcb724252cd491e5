"""Run-time arguments of the attention kernels, declared once.

A launch packs them from tensors with the functions below; a kernel reads them by name, as in
`inputs.tables.weight`. A new table of the operator is one field of Tables and the kernel code that reads it.

Triton 3.6.0, 3.7.1 and 3.9.0 treat pointers and ints in nested NamedTuples as plain arguments: a multiple of
16 and an int of 1 are compiled in, None becomes a constant. In all three every kernel compiles to the code of
the version that had one argument for each tensor, size and stride, but for the order of its parameters
(benchmarks/results/triton_compiled.json). Two kinds of argument stay outside of the NamedTuples:

* Counts. do_not_specialize does not reach into a tuple in any of the three versions, so that a kernel would
  be compiled again for a count of 1 and for a multiple of 16. Each kernel takes the fields of Counts as plain
  arguments and groups them on its first line.
* Tensor descriptors. Triton's launchers look for them among the plain arguments only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .traits import AttentionTraits


class RowTensor(NamedTuple):
    """q, out or a gradient of theirs."""

    p: Tensor  # (items, M, H, D), the last dimension contiguous
    stride: tuple[int, int, int]  # (item, row, head)
    source: Tensor | None  # (B,) int64: output item b reads item source[b]; None: item b


class KeyTensors(NamedTuple):
    """k, v or a gradient of theirs: one tensor of all keys, or one for each key segment."""

    ps: tuple[Tensor, ...]  # T.KEY_TENSORS of (items, keys, Hkv, D), the last dimension contiguous
    stride_b: tuple[int, ...]  # of items, one for each tensor; 0 where one item serves all
    stride_n: tuple[int, ...]  # of keys
    stride_h: tuple[int, ...]  # of heads
    source: Tensor | None  # (T.KEY_TENSORS, B) int64: the item that each output item reads


class Table(NamedTuple):
    """A small tensor whose leading dimensions may broadcast."""

    p: Tensor
    stride: tuple[int, ...]  # of the leading dimensions, 0 where one is broadcast


class Tables(NamedTuple):
    """The control's tables, float32, by the names that the problem has for them. None: it has no such table.

    stride (item, head), where nothing else is said.
    """

    scales: Table | None  # (1|B, 1|H), in place of Inputs.scale
    bias: Table | None  # (1|B, 1|H, R, C), natural log units; -inf removes the pair
    weight: Table | None  # (1|B, 1|H, R, C)
    gain: Table | None  # (1|B, 1|H, R)
    gates: Table | None  # (1|B, 1|M, G); stride (item, row)


class Layout(NamedTuple):
    """Row segments, and the key ranges: a range is one key segment, or a run of short ones (T.MIXED)."""

    # (1|B, R + 1) int32 first row of each segment; stride (item,); None: one segment
    row_starts: Table | None
    # (1|B, K + 1) int32 first key of each key range; stride (item,); None: one range
    key_starts: Table | None
    # (K + G + 1,) int32: the key ranges sorted by group, then each group's first position among them. For
    # kernels that own rows; None: one group
    order: Tensor | None
    groups: Tensor | None  # (K,) int32 group of each key range. For kernels that own keys; None: one group
    segments: Tensor | None  # (K,) int32 segment of each key range, -1: several; None: ranges are segments
    labels: Tensor | None  # (N,) int32 segment of each key; given with `segments`
    valid: Tensor | None  # (B, C) int32: how many keys of each segment exist; None: all


class Contrast(NamedTuple):
    """Contrast of each softmax group."""

    rules: Tensor  # (G, 4) float32: kind (none, LINEAR or CLIPPED of forward.py), beta, low, high
    value_sums: Tensor | None  # (B, Hkv, C, D) float32 sum of each segment's valid values, for LINEAR


class Inputs(NamedTuple):
    """What every attention kernel reads."""

    q: RowTensor
    k: KeyTensors
    v: KeyTensors | None  # None for the column mass
    tables: Tables
    layout: Layout
    contrast: Contrast | None  # forward only
    scale: float


class Outputs(NamedTuple):
    """What the forward kernel writes."""

    out: RowTensor
    lse: Tensor | None  # (B, H, M, G) float32
    partial_mass: Tensor | None  # (B, H, row blocks, C) float32


class Counts(NamedTuple):
    """Sizes of a call: plain arguments of each kernel, see above."""

    n_items: int  # B, output items
    n_heads: int  # H
    n_rows: int  # M
    n_keys: int  # N
    n_blocks: int  # blocks of rows or of keys of one item and head, at least as many as its segments have
    n_row_segments: int  # R
    n_key_segments: int  # C
    n_ranges: int  # K, key ranges
    n_groups: int  # G


class MatrixDescriptor(NamedTuple):
    """A tensor (batch, tokens, heads, D) as a matrix: each token of a head is D columns of one row."""

    base: Tensor
    rows: int
    columns: int
    stride: int
    steps: tuple[int, int, int]  # row b * steps[0] + h * steps[1] + n, column h * steps[2]

    def make(self, traits: AttentionTraits) -> TensorDescriptor:
        """The tensor descriptor of tiles (BLOCK_N, D)."""
        shape, strides = [self.rows, self.columns], [self.stride, 1]
        return TensorDescriptor(self.base, shape, strides, [traits.BLOCK_N, traits.D])


def row_tensor(t: Tensor, source: Tensor | None = None) -> RowTensor:
    """Pack (items, M, H, D)."""
    return RowTensor(t, (t.stride(0), t.stride(1), t.stride(2)), source)


def key_tensors(tensors: Sequence[Tensor], source: Tensor | None = None) -> KeyTensors:
    """Pack tensors (items, keys, Hkv, D); without a source, a batch of 1 serves all items."""
    return KeyTensors(
        tuple(tensors),
        tuple(t.stride(0) if source is not None or t.shape[0] > 1 else 0 for t in tensors),
        tuple(t.stride(1) for t in tensors),
        tuple(t.stride(2) for t in tensors),
        source,
    )


def table(t: Tensor | None, leading: int = 2) -> Table | None:
    """Pack a tensor whose first `leading` dimensions may be 1 for a larger size."""
    if t is None:
        return None
    t = t.contiguous()
    return Table(t, tuple(t.stride(i) if t.shape[i] > 1 else 0 for i in range(leading)))


def item_stride(t: Tensor | None) -> int:
    """Stride of the first dimension, 0 where it is broadcast."""
    return 0 if t is None or t.shape[0] == 1 else t.stride(0)


def alignment(tensors: Sequence[Tensor]) -> int:
    """The largest power of two, up to 16, that divides the strides of every item, token and head."""
    common = 16
    for t in tensors:
        for size, stride in zip(t.shape[:3], t.stride()[:3], strict=True):
            common = math.gcd(common, stride) if size > 1 else common
    return common


def describe_matrix(t: Tensor, broadcast: bool) -> MatrixDescriptor | None:
    """The matrix that holds t (batch, tokens, heads, D); None if its strides allow none.

    Rows are tokens; heads lie beside each other in a row, or follow each other in rows. The copy engine wants
    the address and the stride of rows to be multiples of 16 bytes.

    Args:
        t: the tensor.
        broadcast: every output item reads the first item.
    """
    batch, tokens, heads, dim = t.shape
    stride_b, stride_n, stride_h, _ = t.stride()
    if tokens == 0 or t.data_ptr() % 16 or stride_n * t.element_size() % 16 or stride_n < dim:
        return None
    row_b, row_h, column_h = 0, 0, 0
    if batch > 1 and not broadcast:
        if stride_b % stride_n:
            return None
        row_b = stride_b // stride_n
    if heads > 1 and stride_h % stride_n == 0:
        row_h = stride_h // stride_n
    elif heads > 1:
        if (heads - 1) * stride_h + dim > stride_n:
            return None
        column_h = stride_h
    rows = (batch - 1) * row_b + (heads - 1) * row_h + tokens
    return MatrixDescriptor(t, rows, (heads - 1) * column_h + dim, stride_n, (row_b, row_h, column_h))
