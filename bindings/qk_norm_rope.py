"""qk_norm_rope(): what stands between the q and k projections and the attention, joined into one tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends.cpu import qk_norm_rope as cpu_norm_rope
from .backends.triton import qk_norm_rope as triton_norm_rope
from .core.autograd import first_order, has_tangent
from .core.dispatcher_bypass import unwatched, written_out

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
) -> Tensor:
    """Normalise each stream's heads, add its offset, join the streams and rotate them by their positions.

        y = x / sqrt(mean(x^2) + eps) * weight + offset        out = y * cos + rotate(y) * sin

    rotate maps the pair (a, b) to (-b, a); its halves are neighbours for "interleaved" (FLUX), dim/2 apart
    for "half". Differentiable in x, weight and offset.

    Args:
        streams: [(x, weight, offset), ...], joined in that order, for example text and image: x (batch,
            tokens, heads, dim), all of one dtype; weight (dim,) of the RMSNorm, or None: no norm; offset
            broadcastable to x's shape, added after the norm (IC-Custom, arXiv 2507.01926), or None.
        cos, sin: (all tokens, dim) float, as diffusers' get_1d_rotary_pos_embed(use_real=True) gives them, in
            the order of the joined streams; both None: no rotation.
        eps: of the RMSNorm, > 0 or 0.
        permutation: int (all tokens,) or (batch, all tokens), each token once, as Segments.from_labels gives
            it; applied last, so that out[:, i] is the joined token permutation[i].

    Returns:
        (batch, all tokens, heads, dim) in x's dtype, from float32 arithmetic. The kernels (C++ on the CPU,
        Triton on GPUs; head dims up to 256) round once, to x's dtype. Where neither runs it is torch's
        operators, which round after the norm too, as the FLUX processor of diffusers does.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
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

    xs, weights, offsets = (list(column) for column in zip(*checked, strict=True))
    half = rope == "half"
    needs_grad = [t is not None and t.requires_grad for t in (*xs, *weights, *offsets, cos, sin)]
    if has_tangent(*xs, *weights, *offsets, cos, sin):
        return composed(xs, weights, offsets, cos, sin, eps, half, permutation)
    if not torch.is_grad_enabled() or not any(needs_grad):
        run = _run_forward if unwatched(*xs, *weights, *offsets, cos, sin, permutation) else _forward
        return run(xs, weights, offsets, cos, sin, eps, half, permutation)
    # Positions that learn take torch's own gradient.
    if any(needs_grad[-2:]):
        return composed(xs, weights, offsets, cos, sin, eps, half, permutation)
    return _NormRope.apply(len(xs), cos, sin, eps, half, permutation, *xs, *weights, *offsets)


def composed(
    xs: list[Tensor],
    weights: list[Tensor | None],
    offsets: list[Tensor | None],
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    half: bool,
    permutation: Tensor | None,
) -> Tensor:
    """The same from torch operators: any device, differentiable in everything; rounded after the norm too."""
    joined = []
    for x, weight, offset in zip(xs, weights, offsets, strict=True):
        if weight is not None:
            x = F.rms_norm(x, (x.shape[3],), weight.to(x.dtype), eps)
        joined.append(x if offset is None else x + offset.to(x.dtype))
    y = torch.cat(joined, 1)
    if cos is not None and sin is not None:
        wide = torch.float64 if y.dtype == torch.float64 else torch.float32
        a, b = y.chunk(2, 3) if half else y.unflatten(3, (-1, 2)).unbind(4)
        rotated = torch.cat((-b, a), 3) if half else torch.stack((-b, a), 4).flatten(3)
        y = (y.to(wide) * cos.to(wide)[:, None] + rotated.to(wide) * sin.to(wide)[:, None]).to(y.dtype)
    if permutation is None:
        return y
    index = permutation.long()
    return y[:, index] if index.dim() == 1 else y.gather(1, index[:, :, None, None].expand_as(y))


def composed_backward(
    dout: Tensor,
    xs: list[Tensor],
    weights: list[Tensor | None],
    offsets: list[Tensor | None],
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    half: bool,
    permutation: Tensor | None,
    need_dweight: bool,
) -> tuple[list[Tensor], list[Tensor | None], list[Tensor | None]]:
    """dx, dweight and doffset from torch operators, in float32; offsets: those whose gradient is wanted.

    With g = rotate^T(dout) * weight and r = 1 / sqrt(mean(x^2) + eps): dx = r * (g - x * r^2 * mean(g * x)).
    """
    wide = torch.float64 if dout.dtype == torch.float64 else torch.float32
    dy = dout.to(wide)
    if permutation is not None:
        index = permutation.long()[..., None, None].expand(dy.shape)
        dy = torch.zeros_like(dy).scatter_add_(1, index, dy)
    if cos is not None and sin is not None:
        turned = dy * sin.to(wide)[:, None]
        a, b = turned.chunk(2, 3) if half else turned.unflatten(3, (-1, 2)).unbind(4)
        turned = torch.cat((b, -a), 3) if half else torch.stack((b, -a), 4).flatten(3)
        dy = dy * cos.to(wide)[:, None] + turned
    dxs, dweights, doffsets = [], [], []
    for x, weight, offset, d in zip(xs, weights, offsets, dy.split([x.shape[1] for x in xs], 1), strict=True):
        doffsets.append(None if offset is None else _sum_to(offset, d))
        dweight = None
        if weight is not None:
            y = x.to(wide)
            r = (y.square().mean(3, keepdim=True) + eps).rsqrt()
            dweight = (d * y * r).sum((0, 1, 2)).to(weight.dtype) if need_dweight else None
            d = d * weight.to(wide)
            d = r * (d - y * r.square() * (d * y).mean(3, keepdim=True))
        dweights.append(dweight)
        dxs.append(torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(d))
    return dxs, dweights, doffsets


class _NormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, n, cos, sin, eps, half, permutation, *tensors):  # type: ignore[override]
        ctx.save_for_backward(*tensors, cos, sin, permutation)
        ctx.n, ctx.eps, ctx.half = n, eps, half
        xs, weights, offsets = (list(tensors[i * n : i * n + n]) for i in range(3))
        return _forward(xs, weights, offsets, cos, sin, eps, half, permutation)

    @staticmethod
    @first_order
    def backward(ctx, dout):  # type: ignore[override]
        n, (*tensors, cos, sin, permutation) = ctx.n, ctx.saved_tensors
        xs, weights, offsets = (tensors[i * n : i * n + n] for i in range(3))
        need_dweight = any(ctx.needs_input_grad[6 + n : 6 + 2 * n])
        learned = [
            t if need else None for t, need in zip(offsets, ctx.needs_input_grad[6 + 2 * n :], strict=True)
        ]
        dxs, dweights, doffsets = _backward(
            dout, xs, weights, learned, cos, sin, ctx.eps, ctx.half, permutation, need_dweight
        )
        dweights = [
            None if w is None or not need_dweight else d for w, d in zip(weights, dweights, strict=True)
        ]
        return (
            *(None,) * 6,
            *dxs,
            *dweights,
            *(None if t is None else d for t, d in zip(learned, doffsets, strict=True)),
        )


_TABLES = "Tensor? cos, Tensor? sin, float eps, bool half, Tensor? permutation"
_library = torch.library.Library("flashbrush", "FRAGMENT")
_library.define(f"qk_norm_rope(Tensor[] x, Tensor?[] weight, Tensor?[] offset, {_TABLES}) -> Tensor")
_library.define(
    f"qk_norm_rope_backward(Tensor dout, Tensor[] x, Tensor?[] weight, Tensor?[] offset, {_TABLES}, bool need_dweight) "
    "-> (Tensor[] dx, Tensor[] dweight, Tensor[] doffset)"
)


def _run_forward(xs, weights, offsets, *rest):
    if cpu_norm_rope.usable(xs[0]):
        return cpu_norm_rope.forward(xs, weights, offsets, *rest)
    run = triton_norm_rope.forward if triton_norm_rope.usable(xs) else composed
    return run(xs, weights, offsets, *rest).contiguous()


def _run_backward(dout, xs, weights, offsets, *rest):
    """offsets: those whose gradient is wanted; of a weight or an offset that is not there it is an empty
    tensor.
    """
    if cpu_norm_rope.usable(xs[0]):
        run = _cpu_backward
    else:
        run = triton_norm_rope.backward if triton_norm_rope.usable(xs) else composed_backward
    dxs, *more = run(dout, xs, weights, offsets, *rest)
    return dxs, *([dout.new_empty(0) if d is None else d for d in grads] for grads in more)


def _cpu_backward(dout, xs, weights, offsets, *rest):
    *tables, need_dweight = rest
    dxs, dweights = cpu_norm_rope.backward(dout, xs, weights, *tables)
    dweights = [None if w is None or not need_dweight else d for w, d in zip(weights, dweights, strict=True)]
    if all(t is None for t in offsets):
        return dxs, dweights, offsets
    # Without a norm, the gradient of x is that of an offset of its shape.
    shifts, _ = cpu_norm_rope.backward(dout, xs, [None] * len(xs), *tables)
    return dxs, dweights, [None if t is None else _sum_to(t, d) for t, d in zip(offsets, shifts, strict=True)]


def _sum_to(t: Tensor, grad: Tensor) -> Tensor:
    wide = grad.to(torch.promote_types(grad.dtype, t.dtype))
    return wide.sum_to_size(t.shape).to(t.dtype).clone(memory_format=torch.contiguous_format)


def _fake_forward(xs, weights, offsets, *rest):
    return xs[0].new_empty(xs[0].shape[0], sum(x.shape[1] for x in xs), *xs[0].shape[2:])


def _fake_backward(dout, xs, weights, offsets, *rest):
    weights = weights if rest[-1] else [None] * len(xs)
    given = (
        [dout.new_empty(0) if t is None else t.new_empty(t.shape) for t in tensors]
        for tensors in (weights, offsets)
    )
    return [x.new_empty(x.shape) for x in xs], *given


_library.impl("qk_norm_rope", _run_forward, "CompositeExplicitAutograd")
_library.impl("qk_norm_rope_backward", _run_backward, "CompositeExplicitAutograd")
torch.library.register_fake("flashbrush::qk_norm_rope", _fake_forward, lib=_library)
torch.library.register_fake("flashbrush::qk_norm_rope_backward", _fake_backward, lib=_library)
_forward = torch.ops.flashbrush.qk_norm_rope.default
_backward = torch.ops.flashbrush.qk_norm_rope_backward.default


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
                f"streams[{i}]: expected batch {first.shape[0]} and (heads, dim) {tuple(first.shape[2:])} as in "
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
                    f"streams[{i}]: expected an offset broadcastable to {tuple(x.shape)}, got {tuple(offset.shape)}"
                )
    return [tuple(t if t is None else written_out(t) for t in s) for s in streams]  # type: ignore[misc]


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
