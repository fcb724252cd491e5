"""qk_norm_rope(): what stands between the q and k projections and the attention, joined into one tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .backends.composed import qk_norm_rope as composed
from .backends.planner import check_name
from .core.autograd import first_order, has_tangent
from .core.dispatcher_bypass import can_skip_dispatcher, with_memory
from .core.norm_rope import NormRope
from .operators import qk_norm_rope as operators

Stream = tuple[Tensor, Tensor | None, Tensor | None]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def qk_norm_rope(
    streams: Sequence[Stream],
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    eps: float,
    rope: Literal["interleaved", "half"] = "interleaved",
    permutation: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Normalise each stream's heads, add its offset, join the streams and rotate them by their positions.

        y = x / sqrt(mean(x^2) + eps) * weight + offset        out = y * cos + rotate(y) * sin

    rotate maps the pair (a, b) to (-b, a). The two of a pair are neighbours for "interleaved" (FLUX), and
    dim/2 apart for "half". Differentiable in x, weight and offset, and through torch's own operators in cos
    and sin.

    Args:
        streams: [(x, weight, offset), ...], joined in that order, for example text and image. x: (batch,
            tokens, heads, dim), all of one dtype. weight: (dim,) of the RMSNorm, or None: no norm. offset:
            broadcastable to x's shape, added after the norm (IC-Custom, arXiv 2507.01926), or None.
        cos: (all tokens, dim) float, as diffusers' get_1d_rotary_pos_embed(use_real=True) gives it, in the
            order of the joined streams. None, with sin: no rotation.
        sin: as cos.
        eps: of the RMSNorm, >= 0.
        rope: "interleaved" or "half".
        permutation: int (all tokens,) or (batch, all tokens), each token once, as Segments.from_labels gives
            it. Applied last: out[:, i] is the joined token permutation[i].
        backend: "auto", or a name of backends(). A named one raises with its reasons rather than fall back.

    Returns:
        (batch, all tokens, heads, dim) in x's dtype. The kernels (C++ on the CPU, Triton on GPUs; head dims
        up to 256) compute in float32 and round once; torch's operators, where neither runs, round after the
        norm too, as the FLUX processor of diffusers does.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Examples:
        >>> import torch, flashbrush as fb
        >>> text, image = torch.randn(1, 5, 2, 16), torch.randn(1, 24, 2, 16)
        >>> angle = torch.arange(29)[:, None] * torch.ones(16)
        >>> streams = [(text, None, None), (image, None, None)]
        >>> fb.qk_norm_rope(streams, angle.cos(), angle.sin(), eps=1e-6).shape
        torch.Size([1, 29, 2, 16])
    """
    checked = _check_streams(streams)
    total = sum(x.shape[1] for x, _, _ in checked)
    x0 = checked[0][0]
    if not isinstance(eps, (int, float)) or isinstance(eps, bool) or not 0 <= eps < float("inf"):
        raise ValueError(f"eps: expected a finite number >= 0, got {eps!r}")
    if rope not in ("interleaved", "half"):
        raise ValueError(f"rope: expected 'interleaved' or 'half', got {rope!r}")
    if (cos is None) != (sin is None):
        raise ValueError("cos, sin: expected both or neither")
    for name, table in (("cos", cos), ("sin", sin)):
        if table is not None:
            _check_table(name, table, total, x0)
    _check_permutation(permutation, x0.shape[0], total, x0.device)
    check_name(backend)

    xs, weights, offsets = (list(column) for column in zip(*checked, strict=True))
    call = NormRope(xs, weights, offsets, cos, sin, eps, rope == "half", permutation)
    tensors = [*xs, *weights, *offsets, cos, sin]
    learned = [t is not None and t.requires_grad for t in tensors]
    # Forward-mode derivatives, and positions that are learned, take torch's own rules.
    if has_tangent(*tensors) or (torch.is_grad_enabled() and any(learned[-2:])):
        return composed.forward(call)
    if not torch.is_grad_enabled() or not any(learned):
        run = operators.run if can_skip_dispatcher(*tensors, permutation) else operators.qk_norm_rope
        return run(*call, backend=backend)
    return _NormRope.apply(len(xs), call[3:], backend, *xs, *weights, *offsets)


class _NormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, n, tables, backend, *tensors):  # type: ignore[override]
        cos, sin, eps, half, permutation = tables
        ctx.save_for_backward(*tensors, cos, sin, permutation)
        ctx.n, ctx.eps, ctx.half, ctx.backend = n, eps, half, backend
        xs, weights, offsets = (list(tensors[i * n : i * n + n]) for i in range(3))
        return operators.qk_norm_rope(xs, weights, offsets, *tables, backend=backend)

    @staticmethod
    @first_order
    def backward(ctx, dout):  # type: ignore[override]
        n, (*tensors, cos, sin, permutation) = ctx.n, ctx.saved_tensors
        xs, weights, offsets = (tensors[i * n : i * n + n] for i in range(3))
        _, need_weights, need_offsets = (ctx.needs_input_grad[3 + i * n : 3 + i * n + n] for i in range(3))
        need_dweight = any(need_weights)
        learned = [t if need else None for t, need in zip(offsets, need_offsets, strict=True)]
        tables = (cos, sin, ctx.eps, ctx.half, permutation)
        dxs, dweights, doffsets = operators.qk_norm_rope_backward(
            dout, xs, weights, learned, *tables, need_dweight, backend=ctx.backend
        )
        no_weight = [w is None or not need_dweight for w in weights]
        return (
            None,
            None,
            None,
            *dxs,
            *(None if no else d for no, d in zip(no_weight, dweights, strict=True)),
            *(None if t is None else d for t, d in zip(learned, doffsets, strict=True)),
        )


def _check_streams(streams: Sequence[Stream]) -> list[Stream]:
    if not isinstance(streams, (list, tuple)) or not streams:
        raise TypeError("streams: expected a non-empty list of (x, norm weight or None, offset or None)")
    first: Tensor | None = None
    for i, stream in enumerate(streams):
        if not isinstance(stream, (list, tuple)) or len(stream) != 3:
            raise TypeError(f"streams[{i}]: expected (x, norm weight or None, offset or None)")
        x, weight, offset = stream
        if not isinstance(x, Tensor) or x.dim() != 4:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"streams[{i}]: expected x (batch, tokens, heads, dim), got {got}")
        if x.dtype not in DTYPES:
            raise TypeError(f"streams[{i}]: expected float32, bfloat16, float16 or float64, got {x.dtype}")
        first = x if first is None else first
        if x.shape[0] != first.shape[0] or x.shape[2:] != first.shape[2:]:
            raise ValueError(
                f"streams[{i}]: expected batch {first.shape[0]}, (heads, dim) {tuple(first.shape[2:])} as in "
                f"streams[0], got {tuple(x.shape)}"
            )
        if x.dtype != first.dtype:
            raise TypeError(f"streams[{i}]: expected {first.dtype} as in streams[0], got {x.dtype}")
        for name, t in (("x", x), ("norm weight", weight), ("offset", offset)):
            if t is not None and not isinstance(t, Tensor):
                raise TypeError(f"streams[{i}]: expected a tensor or None as {name}, got {type(t).__name__}")
            if t is not None and t.device != first.device:
                raise ValueError(f"streams[{i}]: expected {name} on {first.device}, got {t.device}")
        if weight is not None and tuple(weight.shape) != (x.shape[3],):
            raise ValueError(
                f"streams[{i}]: expected a norm weight ({x.shape[3]},), got {tuple(weight.shape)}"
            )
        if offset is not None:
            shape = (1,) * (4 - offset.dim()) + tuple(offset.shape)
            if len(shape) != 4 or any(a not in (1, b) for a, b in zip(shape, x.shape, strict=True)):
                raise ValueError(
                    f"streams[{i}]: expected an offset broadcastable to {tuple(x.shape)}, "
                    f"got {tuple(offset.shape)}"
                )
    return [tuple(t if t is None else with_memory(t) for t in s) for s in streams]  # type: ignore[misc]


def _check_table(name: str, table: Tensor, total: int, x: Tensor) -> None:
    if not isinstance(table, Tensor) or not table.is_floating_point():
        got = table.dtype if isinstance(table, Tensor) else type(table).__name__
        raise TypeError(f"{name}: expected a float tensor ({total}, {x.shape[3]}), got {got}")
    if tuple(table.shape) != (total, x.shape[3]):
        raise ValueError(f"{name}: expected shape ({total} tokens, {x.shape[3]}), got {tuple(table.shape)}")
    if x.shape[3] % 2:
        raise ValueError(f"{name}: a rotation needs an even head dim, got {x.shape[3]}")
    if table.device != x.device:
        raise ValueError(f"{name}: expected device {x.device}, got {table.device}")


def _check_permutation(permutation: Tensor | None, batch: int, total: int, device: torch.device) -> None:
    if permutation is None:
        return
    if not isinstance(permutation, Tensor) or permutation.dtype not in (torch.int32, torch.int64):
        got = permutation.dtype if isinstance(permutation, Tensor) else type(permutation).__name__
        raise TypeError(f"permutation: expected an int32 or int64 tensor, got {got}")
    if tuple(permutation.shape) not in ((total,), (batch, total)):
        raise ValueError(
            f"permutation: expected shape ({total},) or ({batch}, {total}), got {tuple(permutation.shape)}"
        )
    if permutation.device != device:
        raise ValueError(f"permutation: expected device {device}, got {permutation.device}")
    if device.type == "cpu" and not torch.compiler.is_compiling():
        if permutation.numel() and (int(permutation.min()) < 0 or int(permutation.max()) >= total):
            raise ValueError(f"permutation: expected values in 0..{total - 1}, got others")
