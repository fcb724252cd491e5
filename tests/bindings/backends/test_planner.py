"""The planner: which backend runs a call, what a fallback warns of, and how a named backend is refused."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch

import flashbrush as fb
from flashbrush.bindings.backends import planner, triton as triton_package
from flashbrush.bindings.backends.cpu import library as cpu
from flashbrush.bindings.backends.gpu.eligibility import MOST_STRIDE, attention_reasons
from flashbrush.bindings.core.lowering import lower
from flashbrush.bindings.core.problem import Problem

needs_cpu = pytest.mark.skipif(bool(cpu.available()), reason="; ".join(cpu.available()))


def problem(dtype: torch.dtype = torch.float32, **options) -> Problem:
    q = torch.randn(1, 6, 2, 8, dtype=dtype)
    mask = options.pop("mask", None)
    control = fb.Control(fb.Segments(a=2, b=4), **options) if options else None
    return lower(q, q, q, control, mask=mask)


def test_backends_give_reasons() -> None:
    found = fb.backends()
    assert list(found) == ["cpu", "triton", "cuda", "composed", "reference"]
    assert found["composed"] == [] and found["reference"] == []
    assert all(isinstance(reason, str) and reason for reasons in found.values() for reason in reasons)
    found["cpu"].append("changed by a caller")
    assert fb.backends()["cpu"] != found["cpu"]


def test_backends_print_a_table_of_operators() -> None:
    found = fb.backends()
    head, *lines = repr(found).splitlines()
    assert head.split() == list(found)
    assert [line.split()[0] for line in lines[: len(found.operators)]] == list(found.operators)
    cells = dict(
        zip(found, next(line for line in lines if line.startswith("adain")).split()[1:], strict=True)
    )
    assert cells["composed"] == "yes" and cells["cpu"] == "-" and cells["reference"] == "-"


X = torch.randn(1, 12, 2, 8)
IMAGE = torch.randn(1, 2, 3, 4)
MASK = torch.ones(1, 1, 3, 4)
LSE = fb.attention(X, X, X, return_stats=True)[1].lse
OPERATOR_CALLS = {
    "attention": lambda backend: fb.attention(X, X, X, backend=backend),
    "column_mass": lambda backend: fb.column_mass(X, X, LSE, backend=backend),
    "qk_norm_rope": lambda backend: fb.qk_norm_rope([(X, None, None)], None, None, eps=1e-6, backend=backend),
    "query_blur": lambda backend: fb.query_blur(X, (3, 4), 1.0, backend=backend),
    "blend_latents": lambda backend: fb.blend_latents(IMAGE, IMAGE, IMAGE, MASK, 0.5, backend=backend),
    "adain": lambda backend: fb.adain(IMAGE, IMAGE, backend=backend),
}


@pytest.mark.parametrize("operator", OPERATOR_CALLS)
def test_every_operator_takes_a_backend_by_name(operator: str) -> None:
    expected = OPERATOR_CALLS[operator]("composed")
    found = fb.backends()
    for name in found:
        if name in found.operators[operator] and not found[name]:
            torch.testing.assert_close(OPERATOR_CALLS[operator](name), expected)
        else:
            with pytest.raises(ValueError, match=f"backend: '{name}' cannot run this call: "):
                OPERATOR_CALLS[operator](name)
    with pytest.raises(ValueError, match=r"backend: expected 'auto' or one of .*, got 'fast'"):
        OPERATOR_CALLS[operator]("fast")


@pytest.mark.parametrize("operator", OPERATOR_CALLS)
def test_every_operator_warns_once_when_its_fused_backend_cannot_run(
    operator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(planner.FUSED, "cpu", triton_package)
    monkeypatch.setattr(planner, "_warned", set())
    if not triton_package.available():
        pytest.skip("Triton runs here")
    with pytest.warns(UserWarning, match="runs on the 'composed' backend .*triton: "):
        OPERATOR_CALLS[operator]("auto")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        OPERATOR_CALLS[operator]("auto")


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
def test_backend_chosen_and_reasons_against_others(call: dict, expected: str, reason: str | None) -> None:
    backend, refused = planner.choose("attention", torch.device("cpu"), problem(**call))
    assert backend.name == expected
    words = " ".join(" ".join(reasons) for reasons in refused.values())
    assert (reason is None and not refused) or (reason is not None and reason in words)


@pytest.mark.parametrize(("stride", "refused"), [(MOST_STRIDE, True), (MOST_STRIDE - 1, False)])
def test_triton_addresses_the_rows_of_a_tile_in_32_bits(stride: int, refused: bool) -> None:
    far = torch.empty_strided((1, 6, 2, 8), (8, stride, 8, 1), device="meta")
    for name in ("q", "k", "v", "out"):
        reasons = attention_reasons(replace(problem(), **{name: (far,) if name in "kv" else far}))
        assert any("lie" in reason for reason in reasons) == refused
    one = torch.empty_strided((1, 1, 2, 8), (8, stride, 8, 1), device="meta")
    assert not any("lie" in reason for reason in attention_reasons(replace(problem(), k=(one,), v=(one,))))


def test_every_named_backend_runs_or_fails_with_reasons() -> None:
    q = torch.randn(1, 6, 2, 8, dtype=torch.float64)
    for name in fb.backends():
        if reasons := planner.why_not("attention", name, problem(torch.float64)):
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
    monkeypatch.setattr(planner, "_warned", set())
    q = torch.randn(1, 6, 2, 8, dtype=torch.float64)
    with pytest.warns(UserWarning, match="'composed' backend .*cpu: .*"):
        fb.attention(q, q, q)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fb.attention(q, q, q)
        fb.attention(q.float(), q.float(), q.float(), backend="reference")


def test_choice_depends_on_structure_only() -> None:
    """So a changed number changes neither the launch nor the compilation."""
    device = torch.device("cpu")
    first, second = (problem(weight={("a", "b"): w}, bias={("b", "a"): 0.5}) for w in (0.0, 1e20))
    assert planner.choose("attention", device, first)[0] is planner.choose("attention", device, second)[0]
