"""Calls that go past torch's dispatcher, and everything that is to be shown an operator all the same."""

from __future__ import annotations

import warnings
from threading import Thread

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch._C._profiler import _ExperimentalConfig
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

import flashbrush as fb
from flashbrush.bindings.core.dispatcher_bypass import can_skip_dispatcher
from flashbrush.bindings.operators import attention as ops
from support.calls import Call, examples, random_calls


def small(seed: int = 0) -> Tensor:
    return torch.randn(2, 12, 2, 8, generator=torch.Generator().manual_seed(seed))


def norm_rope(x: Tensor) -> Tensor:
    return fb.qk_norm_rope([(x, None, None)], None, None, eps=1e-6)


CALLS = {"attention": lambda x: fb.attention(x, x, x), "qk_norm_rope": norm_rope}


class Names:
    """What a mode is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def see(self, func, args, kwargs):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Seen(Names, TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.see(func, args, kwargs)


class SeenFunctions(Names, TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return self.see(func, args, kwargs)


class Shown(Exception):
    """A subclass was shown an operator."""


class Subclass(torch.Tensor):
    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise Shown(str(func))


@pytest.mark.parametrize("name", CALLS)
def test_nobody_looks(name: str) -> None:
    x = small()
    assert can_skip_dispatcher(x, None, torch.nn.Parameter(x)) and CALLS[name](x).isfinite().all()


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("mode", [Seen, SeenFunctions])
def test_modes_see_the_operator(name: str, mode: type) -> None:
    expected = CALLS[name](small())
    with mode() as seen:
        assert not can_skip_dispatcher(small())
        result = CALLS[name](small())
    assert torch.equal(result, expected) and any(f"flashbrush.{name}" in one for one in seen.names)


@pytest.mark.parametrize("name", CALLS)
def test_a_subclass_sees_the_operator(name: str) -> None:
    x = torch.Tensor._make_subclass(Subclass, small())
    assert not can_skip_dispatcher(x)
    with pytest.raises(Shown, match=f"flashbrush.{name}"):
        CALLS[name](x)


@pytest.mark.parametrize("name", CALLS)
def test_a_profile_names_the_operator(name: str) -> None:
    with profile() as seen:
        CALLS[name](small())
    assert f"flashbrush::{name}" in {event.key for event in seen.key_averages()}


@pytest.mark.parametrize("name", CALLS)
def test_a_trace_is_not_made_of_constants(name: str) -> None:
    """torch.jit.trace does not take the operators' lists; it must not come back with what this call gave."""
    with warnings.catch_warnings(), pytest.raises(RuntimeError):
        warnings.simplefilter("ignore")
        torch.jit.trace(CALLS[name], (small(),))


@pytest.mark.parametrize("name", CALLS)
def test_without_memory_there_are_shapes(name: str) -> None:
    meta = CALLS[name](small().to("meta"))
    assert meta.is_meta and meta.shape == small().shape
    with FakeTensorMode() as mode:
        fake = CALLS[name](mode.from_tensor(small()))
    assert type(fake) is not Tensor and fake.shape == small().shape


@pytest.mark.parametrize("name", CALLS)
def test_transforms_are_told(name: str) -> None:
    with pytest.raises(RuntimeError, match="Batching rule not implemented"):
        torch.vmap(CALLS[name])(torch.stack([small(), small(1)]))


@pytest.mark.parametrize("name", CALLS)
def test_a_negated_view_is_negative(name: str) -> None:
    x = torch.complex(small(), small(1)).conj().imag
    assert x.is_neg() and not can_skip_dispatcher(x)
    assert torch.equal(CALLS[name](x), CALLS[name](x.resolve_neg()))


@settings(max_examples=examples(200))
@given(random_calls(dtypes=(torch.float32, torch.bfloat16, torch.float64)))
def test_the_same_bits_as_the_operator(call: Call) -> None:
    warnings.simplefilter("ignore")
    tensors = [t for x in (call.q, call.k, call.v) for t in ([x] if isinstance(x, Tensor) else x)]
    assert can_skip_dispatcher(*tensors)
    direct, plain = call.run("auto", return_stats=True), call.run("auto")
    with Seen() as seen:
        dispatched, alone = call.run("auto", return_stats=True), call.run("auto")
    assert sum("flashbrush.attention" in name for name in seen.names) == 2
    for one, other in (
        (plain, alone),
        (direct[0], dispatched[0]),
        *zip(direct[1], dispatched[1], strict=True),
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
        assert one.is_contiguous() and one.stride() == other.stride()


def test_nothing_is_dispatched(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("attention", "attention_out"):
        monkeypatch.setattr(ops, name, None)
    x = small()
    assert torch.equal(fb.attention(x, x, x), fb.attention(x, x, x, out=torch.empty(x.shape)))


def unwritten() -> Tensor:
    """A gradient of zeros without memory, as torch.sgn gives it."""
    x = small().requires_grad_()
    torch.sgn(x).sum().backward()
    assert x.grad is not None and x.grad._is_zerotensor()
    return x.grad


def test_zeros_without_memory_are_zeros() -> None:
    x, zero = small(), torch.zeros(2, 12, 2, 8)
    for arguments in ((unwritten(), x, x), (x, unwritten(), x), (x, x, unwritten())):
        expected = fb.attention(*(zero if t is not x else x for t in arguments))
        assert torch.equal(fb.attention(*arguments), expected)
        with Seen():
            assert torch.equal(fb.attention(*arguments), expected)
    assert torch.equal(norm_rope(unwritten()), zero)
    assert torch.equal(fb.qk_norm_rope([(x, None, unwritten())], None, None, eps=0.0), norm_rope(x))
    with pytest.raises(ValueError, match="out: expected a tensor with memory"):
        fb.attention(x, x, x, out=unwritten())


def test_a_profile_of_all_threads_names_the_operator() -> None:
    with profile(experimental_config=_ExperimentalConfig(profile_all_threads=True)) as seen:
        worker = Thread(target=lambda: fb.attention(small(), small(), small()))
        worker.start()
        worker.join()
    assert "flashbrush::attention" in {event.key for event in seen.key_averages()}


def test_statistics_are_the_caller_s_own() -> None:
    segments = fb.Segments(a=4, b=8)
    control = fb.Control(segments, segments, gain={"a": 2.0})
    x = small()
    _, stats = fb.attention(x, x, x, control, return_stats=True)
    stats.gain.zero_()
    assert torch.equal(
        fb.attention(x, x, x, control, return_stats=True)[1].gain[..., 0], torch.full((2, 2), 2.0)
    )


def test_a_written_output_counts_as_changed() -> None:
    x, out = small(), torch.empty(2, 12, 2, 8)
    before = out._version
    assert fb.attention(x, x, x, out=out) is out and out._version > before
