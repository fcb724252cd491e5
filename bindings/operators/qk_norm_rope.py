"""The registered qk_norm_rope and its gradient."""

from __future__ import annotations

from ..backends.planner import resolve
from ..core.norm_rope import SCHEMA, NormRope
from .library import register


def run(*fields, backend: str = "auto"):
    """The implementation: (batch, all tokens, heads, dim), contiguous."""
    call = NormRope(*fields)
    return resolve("qk_norm_rope", backend, call.xs[0].device, call.xs)(call).contiguous()


def _run_backward(dout, *inputs, backend: str = "auto"):
    """call.offsets: those whose gradient is wanted. A gradient that is None becomes an empty tensor."""
    *fields, need_dweight = inputs
    call = NormRope(*fields)
    backward = resolve("qk_norm_rope_backward", backend, dout.device, call.xs)
    dxs, *more = backward(dout, call, need_dweight)
    return dxs, *([dout.new_empty(0) if d is None else d for d in grads] for grads in more)


def _fake(xs, *_, **__):
    return xs[0].new_empty(xs[0].shape[0], sum(x.shape[1] for x in xs), *xs[0].shape[2:])


def _fake_backward(dout, xs, weights, offsets, *rest, **_):
    need_dweight = rest[-1]
    weights = weights if need_dweight else [None] * len(xs)
    dweights, doffsets = (
        [dout.new_empty(0) if t is None else t.new_empty(t.shape) for t in tensors]
        for tensors in (weights, offsets)
    )
    return [x.new_empty(x.shape) for x in xs], dweights, doffsets


qk_norm_rope = register(f'qk_norm_rope({SCHEMA}, *, str backend="auto") -> Tensor', run, _fake)
qk_norm_rope_backward = register(
    f'qk_norm_rope_backward(Tensor dout, {SCHEMA}, bool need_dweight, *, str backend="auto") '
    "-> (Tensor[] dx, Tensor[] dweight, Tensor[] doffset)",
    _run_backward,
    _fake_backward,
)
