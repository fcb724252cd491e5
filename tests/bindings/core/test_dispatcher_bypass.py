"""Calls skip torch's dispatcher in plain eager inference only, and give the bits that it gives."""

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


def random_tensor(seed: int = 0) -> Tensor:
    return torch.randn(2, 12, 2, 8, generator=torch.Generator().manual_seed(seed))


def norm_rope(x: Tensor) -> Tensor:
    return fb.qk_norm_rope([(x, None, None)], None, None, eps=1e-6)


CALLS = {"attention": lambda x: fb.attention(x, x, x), "qk_norm_rope": norm_rope}


class RecordsNames:
    """Records the names of the operators or functions that a mode intercepts."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def record(self, func, args, kwargs):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class RecordingDispatchMode(RecordsNames, TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.record(func, args, kwargs)


class RecordingFunctionMode(RecordsNames, TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return self.record(func, args, kwargs)


class OperatorSeen(Exception):
    """A tensor subclass received an operator."""


class RaisingSubclass(torch.Tensor):
    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise OperatorSeen(str(func))


@pytest.mark.parametrize("name", CALLS)
def test_plain_tensors_skip_the_dispatcher(name: str) -> None:
    x = random_tensor()
    assert can_skip_dispatcher(x, None, torch.nn.Parameter(x)) and CALLS[name](x).isfinite().all()


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("mode", [RecordingDispatchMode, RecordingFunctionMode])
def test_modes_see_the_operator(name: str, mode: type) -> None:
    expected = CALLS[name](random_tensor())
    with mode() as seen:
        assert not can_skip_dispatcher(random_tensor())
        result = CALLS[name](random_tensor())
    assert torch.equal(result, expected) and any(f"flashbrush.{name}" in one for one in seen.names)


@pytest.mark.parametrize("name", CALLS)
def test_a_subclass_sees_the_operator(name: str) -> None:
    x = torch.Tensor._make_subclass(RaisingSubclass, random_tensor())
    assert not can_skip_dispatcher(x)
    with pytest.raises(OperatorSeen, match=f"flashbrush.{name}"):
        CALLS[name](x)


@pytest.mark.parametrize("name", CALLS)
def test_a_profile_names_the_operator(name: str) -> None:
    with profile() as seen:
        CALLS[name](random_tensor())
    assert f"flashbrush::{name}" in {event.key for event in seen.key_averages()}


@pytest.mark.parametrize("name", CALLS)
def test_jit_trace_fails_instead_of_recording_constants(name: str) -> None:
    """torch.jit.trace cannot take the operators' lists; a trace must not hold this call's result."""
    with warnings.catch_warnings(), pytest.raises(RuntimeError):
        warnings.simplefilter("ignore")
        torch.jit.trace(CALLS[name], (random_tensor(),))


@pytest.mark.parametrize("name", CALLS)
def test_meta_and_fake_tensors_give_shapes(name: str) -> None:
    meta = CALLS[name](random_tensor().to("meta"))
    assert meta.is_meta and meta.shape == random_tensor().shape
    with FakeTensorMode() as mode:
        fake = CALLS[name](mode.from_tensor(random_tensor()))
    assert type(fake) is not Tensor and fake.shape == random_tensor().shape


@pytest.mark.parametrize("name", CALLS)
def test_vmap_is_refused(name: str) -> None:
    with pytest.raises(RuntimeError, match="Batching rule not implemented"):
        torch.vmap(CALLS[name])(torch.stack([random_tensor(), random_tensor(1)]))


@pytest.mark.parametrize("name", CALLS)
def test_negated_views_are_read_negated(name: str) -> None:
    x = torch.complex(random_tensor(), random_tensor(1)).conj().imag
    assert x.is_neg() and not can_skip_dispatcher(x)
    assert torch.equal(CALLS[name](x), CALLS[name](x.resolve_neg()))


@pytest.mark.filterwarnings("ignore:flashbrush")
@settings(max_examples=examples(200))
@given(random_calls(dtypes=(torch.float32, torch.bfloat16, torch.float64)))
def test_same_bits_as_through_the_dispatcher(call: Call) -> None:
    tensors = [t for x in (call.q, call.k, call.v) for t in ([x] if isinstance(x, Tensor) else x)]
    assert can_skip_dispatcher(*tensors)
    direct, plain = call.run("auto", return_stats=True), call.run("auto")
    with RecordingDispatchMode() as seen:
        dispatched, alone = call.run("auto", return_stats=True), call.run("auto")
    assert sum("flashbrush.attention" in name for name in seen.names) == 2
    for one, other in (
        (plain, alone),
        (direct[0], dispatched[0]),
        *zip(direct[1], dispatched[1], strict=True),
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
        assert one.is_contiguous() and one.stride() == other.stride()


def test_plain_call_uses_no_registered_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("attention", "attention_out"):
        monkeypatch.setattr(ops, name, None)
    x = random_tensor()
    assert torch.equal(fb.attention(x, x, x), fb.attention(x, x, x, out=torch.empty(x.shape)))


def zero_tensor() -> Tensor:
    """A ZeroTensor: a gradient of zeros without memory, as torch.sgn gives it."""
    x = random_tensor().requires_grad_()
    torch.sgn(x).sum().backward()
    assert x.grad is not None and x.grad._is_zerotensor()
    return x.grad


def test_zero_tensors_are_read_as_zeros() -> None:
    x, zero = random_tensor(), torch.zeros(2, 12, 2, 8)
    for arguments in ((zero_tensor(), x, x), (x, zero_tensor(), x), (x, x, zero_tensor())):
        expected = fb.attention(*(zero if t is not x else x for t in arguments))
        assert torch.equal(fb.attention(*arguments), expected)
        with RecordingDispatchMode():
            assert torch.equal(fb.attention(*arguments), expected)
    assert torch.equal(norm_rope(zero_tensor()), zero)
    assert torch.equal(fb.qk_norm_rope([(x, None, zero_tensor())], None, None, eps=0.0), norm_rope(x))
    with pytest.raises(ValueError, match="out: expected a tensor with memory"):
        fb.attention(x, x, x, out=zero_tensor())


def test_a_profile_of_all_threads_names_the_operator() -> None:
    with profile(experimental_config=_ExperimentalConfig(profile_all_threads=True)) as seen:
        worker = Thread(target=lambda: fb.attention(random_tensor(), random_tensor(), random_tensor()))
        worker.start()
        worker.join()
    assert "flashbrush::attention" in {event.key for event in seen.key_averages()}


def test_statistics_do_not_alias_the_control() -> None:
    segments = fb.Segments(a=4, b=8)
    control = fb.Control(segments, segments, gain={"a": 2.0})
    x = random_tensor()
    _, stats = fb.attention(x, x, x, control, return_stats=True)
    stats.gain.zero_()
    assert torch.equal(
        fb.attention(x, x, x, control, return_stats=True)[1].gain[..., 0], torch.full((2, 2), 2.0)
    )


def test_out_counts_as_modified() -> None:
    x, out = random_tensor(), torch.empty(2, 12, 2, 8)
    before = out._version
    assert fb.attention(x, x, x, out=out) is out and out._version > before
