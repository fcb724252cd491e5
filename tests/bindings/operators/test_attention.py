"""The registered attention operators: torch's own checks, compilation without recompiles, gradients."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck

import flashbrush as fb
from flashbrush.bindings.core.lowering import lower
from flashbrush.bindings.core.problem import pack
from flashbrush.bindings.operators import attention as ops
from support.calls import Call, examples, random_calls
from support.gradients import check_gradients_against_eager
from support.oracle_calls import library_arguments, random_oracle_call, without_clip

# What torch demands of an operator


def packed_call(seed: int, dtype: torch.dtype, heads_first: bool) -> tuple:
    """A random call as the operators take it; heads_first: memory order (batch, heads, tokens, dim)."""
    call = without_clip(random_oracle_call(seed))

    def convert(t: Tensor) -> Tensor:
        return t.to(dtype).transpose(1, 2).contiguous().transpose(1, 2) if heads_first else t.to(dtype)

    call.q, call.k, call.v = convert(call.q), [convert(t) for t in call.k], [convert(t) for t in call.v]
    (q, k, v, control), kwargs = library_arguments(call)
    return pack(lower(q, k, v, control, **kwargs))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("seed", range(3000, 3010))
def test_opcheck(seed: int, dtype: torch.dtype) -> None:
    inputs = packed_call(seed, dtype, heads_first=seed % 2 == 0)
    q = inputs[0]
    torch.library.opcheck(ops.attention, (*inputs, seed % 3 == 0, "composed"))
    out, lse, _, gain = ops.attention(*inputs, True, "composed")
    poisoned = torch.full(out.shape, math.nan, dtype=q.dtype)
    torch.library.opcheck(ops.attention_out, (*inputs, seed % 3 == 1, "composed", poisoned))
    torch.library.opcheck(ops.attention_backward, (torch.randn_like(out), out, lse, gain, *inputs, "auto"))


def test_outputs_share_no_memory_with_inputs() -> None:
    """A gain table given for all rows, and an empty call: where an input could be returned it is copied."""
    gain = torch.rand(2, 4)
    for n in (6, 0):
        q = torch.randn(2, n, 4, 8)
        control = fb.Control(fb.Segments(a=n), gain={"a": gain})
        stats = fb.attention(q, q, q, control, backend="composed", return_stats=True)[1]
        stats.gain.zero_()
        assert control.gain is not None and bool((control.gain[..., 0] == gain).all())


# Compilation


def halves(n: int) -> fb.Segments:
    return fb.Segments(a=n // 2, b=n - n // 2)


def qkv(n: int, grad: bool = False) -> list[Tensor]:
    return [torch.randn(2, n, heads, 16, requires_grad=grad) for heads in (4, 2, 2)]


CHANGED = {
    "bias": lambda i, n: fb.Control(halves(n), bias={("a", "b"): 0.1 * i, ("b", "a"): -math.inf}),
    "bias per head": lambda i, n: fb.Control(halves(n), bias={("a", "b"): torch.randn(4)}),
    "weight": lambda i, n: fb.Control(halves(n), weight={("a", "*"): 1.0 + 0.1 * i}),
    "gain": lambda i, n: fb.Control(halves(n), gain={"a": 0.3 * i, "b": torch.rand(2, 4)}),
    "head gain": lambda i, n: fb.Control(
        halves(n), head_gain=fb.HeadGain("b", "a", span=0.1 * i, floor=1.0 - 0.1 * i)
    ),
    "groups": lambda i, n: fb.Control(
        halves(n), groups={"x": ["a"], "y": ["b"]}, gates={"y": torch.rand(2, n)}
    ),
    "gate": lambda i, n: fb.Control(halves(n), groups={"x": ["a"], "y": ["b"]}, gates={"y": 0.2 * i}),
    "valid": lambda i, n: fb.Control(halves(n), valid={"a": torch.tensor([i, 5])}),
    "contrast": lambda i, n: fb.Control(halves(n), contrast=fb.Contrast(1.1 + 0.1 * i, (0.0, 1.0 - 0.1 * i))),
}


@pytest.mark.parametrize("name", CHANGED)
def test_changed_number_does_not_recompile(name: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attention_amid_other_work, fullgraph=True, backend=counter, dynamic=True)
    for i, n in enumerate((127, 127, 193, 127, 200)):
        q, k, v = qkv(n)
        control = CHANGED[name](i, n)
        out, stats = compiled(q, k, v, control, "reference")
        expected, expected_stats = attention_amid_other_work(q, k, v, control, "reference")
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(stats, expected_stats)
    assert counter.frame_count == 1


def attention_amid_other_work(q, k, v, control, backend):
    """Operations before and after, so that the operator is inside a graph."""
    out, stats = fb.attention(q * 1.5, k, v.relu(), control, backend=backend, return_stats=True)
    return out + q, stats


@pytest.mark.parametrize("grad", (False, True))
@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
def test_compiles_without_a_graph_break_at_dynamic_sizes(backend: str, grad: bool) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(attention_amid_other_work, fullgraph=True, backend=counter, dynamic=True)
    for i, n in enumerate((127, 193)):
        q, k, v = qkv(n, grad)
        rule = fb.HeadGain("b", "a", span=0.1 + i)
        control = fb.Control(
            halves(n), weight={("a", "b"): 1.3 + i}, head_gain=rule, gain={"a": torch.rand(2, 4)}
        )
        results = []
        for function in (compiled, attention_amid_other_work):
            out, stats = function(q, k, v, control, "composed")
            grads = torch.autograd.grad(out.square().sum(), (q, k, v)) if grad else ()
            results.append((out.detach(), stats, grads))
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


def test_plain_call_compiles_with_marked_sizes() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda q, k, v: fb.attention(q * 2, k, v, backend="composed"), fullgraph=True, backend=counter
    )
    for rows, keys in ((127, 64), (193, 65)):
        q, k, v = qkv(rows)[0], *qkv(keys)[1:]
        for t in (q, k, v):
            torch._dynamo.mark_dynamic(t, 1)
        torch.testing.assert_close(compiled(q, k, v), fb.attention(q * 2, k, v, backend="composed"))
    assert counter.frame_count == 1


def test_control_made_inside_a_compiled_function() -> None:
    torch._dynamo.reset()

    def inside(q, k, v, strength):
        n = q.shape[1]
        segments = fb.Segments(a=n // 2, b=n - n // 2)
        control = fb.Control(segments, weight={("a", "b"): strength}, bias={("b", "a"): -math.inf})
        return fb.attention(q, k, v, control, backend="composed")

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(inside, fullgraph=True, backend=counter, dynamic=True)
    for n in (127, 193, 200):
        q, k, v = qkv(n)
        strength = torch.rand(4)
        torch.testing.assert_close(compiled(q, k, v, strength), inside(q, k, v, strength))
    assert counter.frame_count == 1


def test_lists_sources_masks_and_out_compile() -> None:
    torch._dynamo.reset()
    keys = fb.Segments(x=40, y=30)
    control = fb.Control(fb.Segments(r=33), keys, groups={"g": ["y"], "h": ["x"]}, gates={"g": 0.5})

    def call(q, k, v, index, mask, out):
        source = {"q": index, "k": [index, index], "v": [index.flip(0), index]}
        plain = fb.attention(q, k, v, control, source=source, mask=mask, backend="composed")
        fb.attention(q, k, v, control, source=source, backend="composed", out=out)
        return plain + 1

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    q, k = torch.randn(2, 33, 4, 8), [torch.randn(2, n, 2, 8) for n in (40, 30)]
    v, index, mask = [t * 2 for t in k], torch.tensor([1, 0, 1]), torch.rand(3, 1, 33, 70) > 0.3
    outs = torch.full((2, 3, 33, 4, 8), math.nan)
    torch.testing.assert_close(compiled(q, k, v, index, mask, outs[0]), call(q, k, v, index, mask, outs[1]))
    torch.testing.assert_close(outs[0], outs[1])
    assert bool(torch.isfinite(outs).all())


# Gradients

GRADIENTS = {
    "plain": {},
    "bias": {"bias": {("a", "y"): torch.tensor([0.5, -1.0]), ("b", "x"): -math.inf}},
    "weight": {"weight": {("a", "x"): 0.0, ("b", "*"): torch.tensor([[1.5, 0.5], [2.0, 0.0]])}},
    "gain": {"gain": {"a": torch.tensor([0.5, -1.5])}},
    "groups and gates": {"groups": {"g": ["y"], "h": ["x", "z"]}, "gates": {"g": torch.rand(2, 5), "h": 0.5}},
    "valid": {"valid": {"x": torch.tensor([0, 2])}},
}


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("backend", ("reference", "composed"))
@pytest.mark.parametrize("name", GRADIENTS)
def test_gradcheck(name: str, backend: str) -> None:
    control = fb.Control(fb.Segments(a=2, b=3), fb.Segments(x=2, y=3, z=1), **GRADIENTS[name])
    inputs = leaves((2, 5, 2, 3), (2, 6, 1, 3), (2, 6, 1, 3))  # two query heads on one of keys
    assert gradcheck(lambda q, k, v: fb.attention(q, k, v, control, backend=backend), inputs)


@pytest.mark.parametrize("backend", ("reference", "composed"))
def test_gradcheck_of_lists_sources_and_broadcast(backend: str) -> None:
    keys = fb.Segments(x=2, y=0, z=3)
    control = fb.Control(fb.Segments(a=2, b=2), keys, weight={("a", "z"): 1.5})
    q, a, b, c = leaves((2, 4, 2, 3), (2, 2, 2, 3), (1, 0, 2, 3), (1, 3, 2, 3))
    other = [t.detach().clone().requires_grad_() for t in (a, b, c)]
    index = torch.tensor([1, 0, 1])
    sources = (
        None,
        {"q": index, "k": [index, index * 0, index * 0], "v": [index.flip(0), index * 0, index * 0]},
    )
    for source in sources:

        def call(q, a, b, c, d, e, f, source=source):
            return fb.attention(q, [a, b, c], [d, e, f], control, source=source, scale=0.7, backend=backend)

        assert gradcheck(call, [q, a, b, c, *other])


@pytest.mark.parametrize("backend", ("reference", "composed"))
def test_gradcheck_of_one_tensor_in_several_arguments(backend: str) -> None:
    (x,) = leaves((2, 4, 2, 3))
    assert gradcheck(lambda x: fb.attention(x, x, x, backend=backend), [x])
    control = fb.Control(
        fb.Segments(a=4), fb.Segments(x=4, y=4), groups={"g": ["x"], "h": ["y"]}, gates={"g": 0.3}
    )
    assert gradcheck(lambda x: fb.attention(x, [x, x], [x, x], control, scale=0.4, backend=backend), [x])


def test_gradcheck_of_a_contrast_on_the_reference() -> None:
    inputs = leaves((1, 4, 2, 3), (1, 5, 2, 3), (1, 5, 2, 3))
    for clip in (None, (0.0, 1.0)):
        control = fb.Control(fb.Segments(a=4), fb.Segments(x=5), contrast=fb.Contrast(1.67, clip))
        assert gradcheck(lambda q, k, v, c=control: fb.attention(q, k, v, c, backend="reference"), inputs)


@pytest.mark.parametrize("backend", ("reference", "composed"))
def test_derived_gain_is_a_constant_in_the_gradient(backend: str) -> None:
    rows, keys = fb.Segments(a=2, b=3), fb.Segments(x=2, y=4)
    q, k, v = leaves((2, 5, 2, 3), (2, 6, 2, 3), (2, 6, 2, 3))
    derived = fb.Control(rows, keys, head_gain=fb.HeadGain("b", "x", span=0.9, apply_to="a"))
    out, stats = fb.attention(q, k, v, derived, backend=backend, return_stats=True)
    assert not any(t.requires_grad for t in stats)
    given = fb.Control(rows, keys, gain={"a": stats.gain[..., 0], "b": stats.gain[..., 1]})
    same = fb.attention(q, k, v, given, backend=backend)
    d = torch.randn_like(out)
    for mine, theirs in zip(*(torch.autograd.grad(o, (q, k, v), d) for o in (out, same)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)  # the given gain went through float32


@pytest.mark.parametrize("backend", ("composed",))
def test_gradient_does_not_read_removed_keys(backend: str) -> None:
    rows, keys = fb.Segments(see=2, blind=4), fb.Segments(a=4, b=5, c=3)
    options = {
        "bias": {("*", "c"): torch.full((2,), -math.inf), ("blind", "b"): -math.inf},
        "weight": {("see", "a"): 0.0, ("blind", "a"): 1.0},
        "valid": {"a": torch.tensor([2, 3])},
    }
    control = fb.Control(rows, keys, **options)
    q, k, v = torch.randn(2, 6, 2, 8), torch.randn(2, 12, 2, 8), torch.randn(2, 12, 2, 8)
    d = torch.randn_like(q)

    def gradients(q, k, v):
        tensors = [t.clone().requires_grad_() for t in (q, k, v)]
        return torch.autograd.grad(fb.attention(*tensors, control, backend=backend), tensors, d)

    clean = gradients(q, k, v)
    gone = torch.zeros(2, 12, dtype=torch.bool)
    gone[:, 9:] = gone[0, 2:4] = gone[1, 3] = True
    for value in (math.nan, math.inf):
        bad = [t.masked_fill(gone[..., None, None], value) for t in (k, v)]
        for mine, expected in zip(gradients(q, *bad), clean, strict=True):
            torch.testing.assert_close(mine, expected)
    assert all(bool((t[gone] == 0).all()) for t in clean[1:])
    # NaN in a key reaches the gradient of rows that attend to it only.
    k[:, 6] = math.nan
    dq = gradients(q, k, v)[0]
    assert bool(torch.isnan(dq[:, :2]).any())
    torch.testing.assert_close(dq[:, 2:], clean[0][:, 2:])


@settings(max_examples=examples(120))
@given(random_calls(contrast=False, dtypes=(torch.float32,), longest=50, mask=True))
def test_gradients_of_random_calls(call: Call) -> None:
    check_gradients_against_eager(call, "composed")


@settings(max_examples=examples(80))
@given(random_calls(contrast=False, dtypes=(torch.bfloat16, torch.float16), longest=50))
def test_gradients_of_random_calls_in_16_bits(call: Call) -> None:
    check_gradients_against_eager(call, "composed")


def test_calls_without_a_gradient_are_refused() -> None:
    q = torch.randn(1, 4, 2, 8, requires_grad=True)
    control = fb.Control(fb.Segments(a=4), contrast=fb.Contrast())
    with pytest.raises(TypeError, match=r"contrast.*reference"):
        fb.attention(q, q, q, control, backend="auto")
    with pytest.raises(ValueError, match="out"):
        fb.attention(q, q, q, out=torch.empty_like(q))
    with torch.no_grad():
        assert fb.attention(q, q, q, control, backend="reference").shape == q.shape
