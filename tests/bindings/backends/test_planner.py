"""The planner: who takes a call, what it says when nobody fast does, and what a named backend answers."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch

import flashbrush as fb
from flashbrush.bindings.attention import _lower
from flashbrush.bindings.backends import planner as plan
from flashbrush.bindings.backends.cpu import attention as cpu
from flashbrush.bindings.backends.triton import attention as triton

needs_cpu = pytest.mark.skipif(bool(cpu.available()), reason="; ".join(cpu.available()))


def problem(dtype=torch.float32, **options):
    q = torch.randn(1, 6, 2, 8, dtype=dtype)
    mask = options.pop("mask", None)
    control = fb.Control(fb.Segments(a=2, b=4), **options) if options else None
    return _lower(q, q, q, control, None, None, mask, None)


def test_backends_say_why_not() -> None:
    found = fb.backends()
    assert list(found) == ["cpu", "triton", "cuda", "composed", "reference"]
    assert found["composed"] == [] and found["reference"] == []
    assert all(isinstance(reason, str) and reason for reasons in found.values() for reason in reasons)
    found["cpu"].append("changed by a caller")
    assert fb.backends()["cpu"] != found["cpu"]


@needs_cpu
@pytest.mark.parametrize(
    ("call", "expected", "reason"),
    [
        ({}, "cpu", None),
        ({"weight": {("a", "b"): 2.0}, "groups": {"x": ["a"], "y": ["b"]}}, "cpu", None),
        ({"contrast": fb.Contrast()}, "cpu", None),
        ({"dtype": torch.float64}, "composed", "float64"),
        ({"mask": torch.ones(6, 6, dtype=torch.bool)}, "composed", "dense mask"),
        ({"dtype": torch.float64, "contrast": fb.Contrast()}, "reference", "clipped contrast"),
    ],
)
def test_choice(call: dict, expected: str, reason: str | None) -> None:
    backend, refused = plan.choose(problem(**call))
    assert backend.name == expected
    words = " ".join(" ".join(reasons) for reasons in refused.values())
    assert (reason is None and not refused) or (reason is not None and reason in words)


@pytest.mark.parametrize(("stride", "refused"), [(triton.MOST_STRIDE, True), (triton.MOST_STRIDE - 1, False)])
def test_triton_addresses_the_rows_of_a_tile_in_32_bits(stride: int, refused: bool) -> None:
    far = torch.empty_strided((1, 6, 2, 8), (8, stride, 8, 1), device="meta")
    for name in ("q", "k", "v", "out"):
        reasons = triton.why_not(replace(problem(), **{name: (far,) if name in "kv" else far}))
        assert any("lie" in reason for reason in reasons) == refused
    one = torch.empty_strided((1, 1, 2, 8), (8, stride, 8, 1), device="meta")
    assert not any("lie" in reason for reason in triton.why_not(replace(problem(), k=(one,), v=(one,))))


def test_every_named_backend_runs_or_fails_with_reasons() -> None:
    q = torch.randn(1, 6, 2, 8, dtype=torch.float64)
    for name in fb.backends():
        if reasons := plan.BACKENDS[name].available() or plan.BACKENDS[name].why_not(problem(torch.float64)):
            with pytest.raises(ValueError, match=f"backend: '{name}' cannot run this call: ") as error:
                fb.attention(q, q, q, backend=name)
            assert all(reason in str(error.value) for reason in reasons)
        else:
            assert fb.attention(q, q, q, backend=name).shape == q.shape
    with pytest.raises(
        ValueError,
        match="backend: expected 'auto' or one of cpu, triton, cuda, composed, reference, got 'fast'",
    ):
        fb.attention(q, q, q, backend="fast")


def test_a_fallback_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_warned", set())
    q = torch.randn(1, 6, 2, 8, dtype=torch.float64)
    with pytest.warns(UserWarning, match="'composed' backend .*cpu: .*"):
        fb.attention(q, q, q)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fb.attention(q, q, q)
        fb.attention(q.float(), q.float(), q.float(), backend="reference")


def test_no_values_are_read() -> None:
    """The choice depends on structure alone, so that a changed number changes neither launch nor compilation."""
    first, second = (problem(weight={("a", "b"): w}, bias={("b", "a"): 0.5}) for w in (0.0, 1e20))
    assert plan.choose(first)[0] is plan.choose(second)[0]
