"""lower(): the arguments of an attention call, checked by name and value, as a Problem.

A wrong argument raises before anything is computed. Values are read on the CPU only: reading a device tensor
would wait for the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .control import Control, fits_float32
from .dispatcher_bypass import with_memory
from .problem import Problem, default_scale

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_DIM = 256
Keys = Tensor | Sequence[Tensor]
Source = Mapping[str, Tensor | Sequence[Tensor | None] | None]


def lower(
    q: Tensor,
    k: Keys,
    v: Keys,
    control: Control | None = None,
    scale: float | Tensor | None = None,
    source: Source | None = None,
    mask: Tensor | None = None,
    out: Tensor | None = None,
) -> Problem:
    """The problem of an attention() call, whose arguments these are.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    cast = _autocast_dtype(q) if isinstance(q, Tensor) else None
    q = _check_tensor("q", q, None, cast)
    keys, values = _check_list("k", k, q, cast), _check_list("v", v, q, cast)
    _check_pairs(q, keys, values)
    if control is not None and not isinstance(control, Control):
        raise TypeError(f"control: expected a Control or None, got {type(control).__name__}")
    source_q, source_k, source_v, batch = _lower_source(source, q, keys, values)
    number, scales = default_scale(q.shape[3]), None
    if isinstance(scale, Tensor):
        scales = _lower_scales(scale, batch, q)
    elif scale is not None:
        if not isinstance(scale, (int, float, torch.SymInt, torch.SymFloat)) or isinstance(scale, bool):
            raise TypeError(f"scale: expected a number or a float tensor, got {type(scale).__name__}")
        if not fits_float32(scale):
            raise ValueError(f"scale: expected a finite number, got {scale}")
        number = float(scale)
    if control is None:
        several = (0,) * len(keys)
        fields: dict = {
            "row_lengths": (q.shape[1],),
            "key_lengths": tuple(t.shape[1] for t in keys),
            "groups": several,
            "pair_ids": several,
            "contrast": (None,),
        }
    else:
        _check_layout(control, q, keys, batch)
        fields = _lower_control(control.to(q.device), q.device)
    if mask is not None:
        _check_mask(mask, batch, q, sum(t.shape[1] for t in keys))
    if out is not None:
        check_out(out, q, (batch, *q.shape[1:]))
    return Problem(
        q=q,
        k=keys,
        v=values,
        batch=batch,
        scale=number,
        scales=scales,
        source_q=source_q,
        source_k=source_k,
        source_v=source_v,
        mask=mask,
        **fields,
    )


def _lower_control(control: Control, device: torch.device) -> dict:
    rows, keys = control.rows, control.keys
    fields = {name: getattr(control, name) for name in Control.LOWERED}
    fields["row_lengths"], fields["key_lengths"] = rows.lengths, keys.lengths
    fields["head_gain"] = control.gain_rule
    if rows.items is not None:
        fields["row_items"] = rows.items.to(device)
    if keys.items is not None:
        fields["key_items"] = keys.items.to(device)
    return fields


def _check_tensor(name: str, t: Tensor, like: Tensor | None, cast: torch.dtype | None) -> Tensor:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a tensor (batch, tokens, heads, dim), got {type(t).__name__}")
    if t.dim() != 4:
        raise ValueError(f"{name}: expected shape (batch, tokens, heads, dim), got {tuple(t.shape)}")
    if t.dtype not in DTYPES:
        raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {t.dtype}")
    if cast is not None and t.dtype != torch.float64:
        t = t.to(cast)
    shape = t.shape
    if like is None:
        if not 1 <= shape[3] <= MAX_DIM:
            raise ValueError(f"{name}: expected a head dim of 1 to {MAX_DIM}, got {shape[3]}")
        if shape[2] < 1:
            raise ValueError(f"{name}: expected at least one head, got {tuple(shape)}")
    else:
        if t.dtype != like.dtype:
            raise TypeError(f"{name}: expected q's dtype {like.dtype}, got {t.dtype}")
        if t.device != like.device:
            raise ValueError(f"{name}: expected q's device {like.device}, got {t.device}")
        if shape[3] != like.shape[3]:
            raise ValueError(f"{name}: expected q's head dim {like.shape[3]}, got {shape[3]}")
    t = with_memory(t)
    # Every kernel reads rows of D neighbours; a strided last dimension is the one layout that is copied.
    return t if t.stride(3) == 1 or shape[3] == 1 else t.contiguous()


def _autocast_dtype(t: Tensor) -> torch.dtype | None:
    """What torch.autocast casts to on the tensor's device, where it is on."""
    device = t.device.type
    # "meta" among others has none, and is not asked.
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


def _check_list(name: str, tensors: Keys, q: Tensor, cast: torch.dtype | None) -> tuple[Tensor, ...]:
    if isinstance(tensors, Tensor):
        return (_check_tensor(name, tensors, q, cast),)
    if not isinstance(tensors, (list, tuple)) or not tensors:
        got = type(tensors).__name__ if tensors or not isinstance(tensors, (list, tuple)) else "an empty list"
        raise TypeError(f"{name}: expected a tensor or a non-empty list of tensors, got {got}")
    return tuple(_check_tensor(f"{name}[{i}]", t, q, cast) for i, t in enumerate(tensors))


def _check_pairs(q: Tensor, k: tuple[Tensor, ...], v: tuple[Tensor, ...]) -> None:
    if len(k) != len(v):
        raise ValueError(f"v: expected as many tensors as k ({len(k)}), got {len(v)}")
    first, several = k[0], len(k) > 1
    for i, (a, b) in enumerate(zip(k, v, strict=True)):
        which = f"v[{i}]" if several else "v"
        if a.shape[1:3] != b.shape[1:3]:
            raise ValueError(
                f"{which}: expected k's tokens and heads {tuple(a.shape[1:3])}, got {tuple(b.shape[1:3])}"
            )
        if a.shape[2] != first.shape[2]:
            raise ValueError(f"k[{i}]: expected {first.shape[2]} heads as in k[0], got {a.shape[2]}")
    if first.shape[2] < 1 or q.shape[2] % first.shape[2]:
        raise ValueError(f"k: q's {q.shape[2]} heads are not a multiple of its {first.shape[2]} heads")


def check_out(out: Tensor, q: Tensor, expected: tuple[int, ...]) -> None:
    if (
        not isinstance(out, Tensor)
        or out.dtype != q.dtype
        or out.device != q.device
        or tuple(out.shape) != expected
    ):
        got = (
            f"{out.dtype} {tuple(out.shape)} on {out.device}"
            if isinstance(out, Tensor)
            else type(out).__name__
        )
        raise ValueError(f"out: expected {q.dtype} {tuple(expected)} on {q.device}, got {got}")
    if out.shape[3] > 1 and out.stride(3) != 1:
        raise ValueError(f"out: expected a contiguous last dimension, got strides {out.stride()}")
    if any(n > 1 and s == 0 for n, s in zip(out.shape, out.stride(), strict=True)):
        raise ValueError(f"out: expected elements that do not share memory, got strides {out.stride()}")
    if with_memory(out) is not out:
        raise ValueError("out: expected a tensor with memory, got zeros that torch has not written out")
    if out.requires_grad and torch.is_grad_enabled():
        raise ValueError("out: expected a tensor that does not require grad")


def _lower_source(
    source: Source | None, q: Tensor, k: tuple[Tensor, ...], v: tuple[Tensor, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, int]:
    if source is None:
        for name, tensors in (("k", k), ("v", v)):
            for t in tensors:
                if t.shape[0] not in (1, q.shape[0]):
                    raise ValueError(f"{name}: expected a batch of {q.shape[0]} (q's) or 1, got {t.shape[0]}")
        return None, None, None, q.shape[0]
    if not isinstance(source, Mapping):
        raise TypeError(f"source: expected a dict with the keys q, k and v, got {type(source).__name__}")
    if unknown := set(source) - {"q", "k", "v"}:
        raise ValueError(f"source: expected the keys q, k and v, got {sorted(map(str, unknown))}")
    entries = {"q": (q,), "k": k, "v": v}
    indices: dict[str, list[Tensor | None]] = {}
    sizes: set[int] = set()
    for name, tensors in entries.items():
        given = source.get(name)
        listed = list(given) if isinstance(given, (list, tuple)) else [given] * len(tensors)
        if len(listed) != len(tensors):
            raise ValueError(f"source[{name!r}]: expected {len(tensors)} index tensors, got {len(listed)}")
        indices[name] = [
            None if index is None else _check_index(f"source[{name!r}]", index, t)
            for index, t in zip(listed, tensors, strict=True)
        ]
        sizes |= {index.shape[0] for index in indices[name] if index is not None}
    if len(sizes) > 1:
        raise ValueError(f"source: the index tensors' lengths differ: {sorted(sizes)}")
    batch = sizes.pop() if sizes else q.shape[0]
    lowered: list[Tensor | None] = []
    for name, tensors in entries.items():
        rows = []
        for index, t in zip(indices[name], tensors, strict=True):
            if index is None and t.shape[0] not in (1, batch):
                raise ValueError(f"{name}: expected a batch of {batch} (the source's) or 1, got {t.shape[0]}")
            if index is None:
                index = (
                    torch.arange(batch, device=q.device)
                    if t.shape[0] == batch
                    else torch.zeros(batch, dtype=torch.int64)
                )
            rows.append(index.to(q.device, torch.int64))
        given = any(i is not None for i in indices[name])
        needed = given or (name == "q" and q.shape[0] != batch)
        lowered.append(torch.stack(rows) if needed else None)
    source_q = None if lowered[0] is None else lowered[0][0]
    return source_q, lowered[1], lowered[2], batch


def _check_index(name: str, index: object, t: Tensor) -> Tensor:
    if not isinstance(index, Tensor) or index.dtype not in (torch.int32, torch.int64) or index.dim() != 1:
        got = f"{index.dtype} {tuple(index.shape)}" if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"{name}: expected an int32 or int64 tensor (out_batch,), got {got}")
    if index.device.type == "cpu" and index.numel() and not torch.compiler.is_compiling():
        low, high = int(index.min()), int(index.max())
        if low < 0 or high >= t.shape[0]:
            raise ValueError(f"{name}: expected indices in 0..{t.shape[0] - 1}, got {low}..{high}")
    return index


def _lower_scales(scale: Tensor, batch: int, q: Tensor) -> Tensor:
    if not scale.is_floating_point():
        raise TypeError(f"scale: expected a float tensor, got {scale.dtype}")
    if scale.requires_grad:
        raise TypeError("scale: a tensor that requires grad is not differentiated; pass scale.detach()")
    heads, given = q.shape[2], tuple(scale.shape)
    if scale.dim() == 0:
        scale = scale.reshape(1, 1)
    elif scale.dim() == 1:
        scale = scale[:, None]
    if scale.dim() != 2 or scale.shape[0] not in (1, batch) or scale.shape[1] not in (1, heads):
        raise ValueError(f"scale: expected a number or shape ({batch},) or ({batch}, {heads}), got {given}")
    if (
        scale.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not bool(torch.isfinite(scale).all())
    ):
        raise ValueError("scale: expected finite values, got others")
    return scale.to(q.device, torch.float32)


def _check_layout(control: Control, q: Tensor, k: tuple[Tensor, ...], batch: int) -> None:
    if control.rows.total != q.shape[1]:
        raise ValueError(
            f"control.rows: the segments hold {control.rows.total} tokens, q has {q.shape[1]} rows"
        )
    segments = control.keys
    if len(k) == 1:
        if segments.total != k[0].shape[1]:
            raise ValueError(
                f"control.keys: the segments hold {segments.total} tokens, k has {k[0].shape[1]}"
            )
    elif len(k) != len(segments):
        raise ValueError(f"k: expected one tensor per key segment ({len(segments)}), got {len(k)}")
    elif segments.items is not None:
        raise ValueError("control.keys: lengths that differ from item to item need k and v as single tensors")
    else:
        for name, length, t in zip(segments.names, segments.lengths, k, strict=True):
            if t.shape[1] != length:
                raise ValueError(f"k: segment {name!r} holds {length} tokens, its tensor has {t.shape[1]}")
    if wrong := {b for b in control.batches if b != batch}:
        raise ValueError(f"control: its tables are for a batch of {sorted(wrong)}, the call has {batch}")
    if wrong := {h for h in control.heads if h != q.shape[2]}:
        raise ValueError(f"control: its tables are for {sorted(wrong)} heads, q has {q.shape[2]}")


def _check_mask(mask: Tensor, batch: int, q: Tensor, keys: int) -> None:
    if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or mask.is_floating_point()):
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask: expected a bool or float tensor, got {got}")
    if mask.requires_grad:
        raise TypeError("mask: a tensor that requires grad is not differentiated; pass mask.detach()")
    full = (batch, q.shape[2], q.shape[1], keys)
    shape = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    if len(shape) != 4 or any(a not in (1, b) for a, b in zip(shape, full, strict=True)):
        raise ValueError(f"mask: expected a shape broadcastable to {full}, got {tuple(mask.shape)}")
    if mask.device != q.device:
        raise ValueError(f"mask: expected q's device {q.device}, got {mask.device}")


def lower_with_lse(
    q: Tensor,
    k: Keys,
    lse: Tensor,
    control: Control | None,
    scale: float | Tensor | None,
    source: Source | None,
) -> Problem:
    """The problem of a call that reads no values; the keys stand in for them. lse: (batch, heads, rows,
    groups).
    """
    if source is not None and isinstance(source, dict) and "v" in source:
        raise ValueError("source: expected the keys q and k, got v")
    both = None if source is None else {**source, "v": source.get("k")}
    p = lower(q, k, k, control, scale, both)
    expected = (p.batch, p.heads, p.rows, p.n_groups)
    if not isinstance(lse, Tensor) or not lse.is_floating_point():
        got = lse.dtype if isinstance(lse, Tensor) else type(lse).__name__
        raise TypeError(f"lse: expected a float tensor {expected}, got {got}")
    if lse.requires_grad:
        raise TypeError(
            "lse: a tensor that requires grad is not differentiated; its part is in the result's own gradient"
        )
    if tuple(lse.shape) != expected:
        raise ValueError(
            f"lse: expected shape {expected} (batch, heads, rows, groups), got {tuple(lse.shape)}"
        )
    if lse.device != q.device:
        raise ValueError(f"lse: expected q's device {q.device}, got {lse.device}")
    return p
