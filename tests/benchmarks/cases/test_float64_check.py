"""The check before every time: its expected values, its allowance, and that it refuses wrong results."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import flashbrush as fb
from flashbrush.benchmarks.cases import contestants, eager_forms, float64_check
from flashbrush.benchmarks.cases.float64_check import (
    ExpectedGradients,
    ExpectedRows,
    FeatureCall,
    WrongResult,
    compare,
    eager_output,
    exact_answer,
    largest_term_sum,
)
from flashbrush.benchmarks.cases.inputs import Case, draw_case
from flashbrush.benchmarks.cases.shapes import QUICK
from flashbrush.benchmarks.gpu import backward as gpu_backward
from flashbrush.benchmarks.gpu.controls import CONTROLS, case_with_control
from flashbrush.benchmarks.gpu.shapes import GPU_SHAPES, dry


def dry_case(name: str, control: str, dtype: torch.dtype = torch.bfloat16) -> Case:
    return case_with_control(draw_case(dry(GPU_SHAPES[name]), dtype), control)


def reference_output(case: Case, controlled: bool) -> torch.Tensor:
    """All rows at once, with the head gain derived from the whole map."""
    q, k, v = (t.double() for t in (case.q, case.k, case.v))
    return fb.attention(q, k, v, case.control if controlled else None, backend="reference")


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("controlled", [False, True])
def test_expected_rows_of_the_cpu_shapes(name: str, controlled: bool) -> None:
    case = draw_case(QUICK[name], torch.bfloat16)
    expected, out = ExpectedRows(case, controlled), reference_output(case, controlled)
    assert torch.allclose(out[:, expected.rows], expected.exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("name", ["flux-1024", "sd15-64"])  # one batch item, and several
def test_expected_rows_of_the_gpu_controls(name: str, control: str) -> None:
    case = dry_case(name, control)
    expected, out = ExpectedRows(case, control != "plain"), reference_output(case, True)
    assert torch.allclose(out[:, expected.rows], expected.exact, rtol=0, atol=1e-6)


def test_the_inputs_give_heads_different_gains() -> None:
    """Otherwise a head gain that is not applied would pass the check."""
    case = draw_case(QUICK["quick-diptych-d64"], torch.bfloat16)
    gain = reference_output(case, True)[:, 0] / reference_output(case, False)[:, 0]
    assert float(gain.amax()) > 1.19 and float(gain.amin()) < 1.01


def test_the_map_is_computed_by_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    case = dry_case("flux-1024", "brush")
    grad = gpu_backward.output_gradient(case)
    rows, gradients = ExpectedRows(case, True), ExpectedGradients(case, grad)
    monkeypatch.setattr(float64_check, "CHUNK", 300)  # 5 of 59 rows at a time
    assert torch.allclose(ExpectedRows(case, True).exact, rows.exact, rtol=0, atol=1e-12)
    again = ExpectedGradients(case, grad)
    for name in ("dq", "dk", "dv"):
        assert torch.allclose(getattr(again, name), getattr(gradients, name), rtol=0, atol=1e-12)


@pytest.mark.parametrize("control", gpu_backward.OURS)
def test_expected_gradients(control: str) -> None:
    case = dry_case("flux-1024", control)
    grad = gpu_backward.output_gradient(case)
    expected = ExpectedGradients(case, grad)
    leaves = [t.double().requires_grad_() for t in (case.q, case.k, case.v)]
    out = fb.attention(*leaves, case.control, backend="reference")  # type: ignore[arg-type]
    grads = torch.autograd.grad(out, leaves, grad.double())
    for found, part in zip(grads, (expected.dq, expected.dk, expected.dv), strict=True):
        assert torch.allclose(found[:, expected.rows], part, rtol=0, atol=1e-6)
    report = expected.check("itself", tuple(g.float() for g in grads), None)
    assert all(cell["max_error"] < 1e-5 for cell in report.values())
    spoiled = (grads[0], grads[1] + 0.1 * grads[1].abs().max(), grads[2])
    with pytest.raises(WrongResult, match="gradient of k"):
        expected.check("spoiled", spoiled, None)


def test_the_allowance_is_that_of_rounded_probabilities() -> None:
    """By hand: softmax in float32, rounded to bfloat16, times v, rounded."""
    q, k, v = (
        torch.randn(1, 9, 2, 8, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(3)
    )
    call = FeatureCall(q, k, v, {"all": 9}, {"all": 9})
    heads = [t.float().transpose(1, 2) for t in (q, k, v)]
    by_hand = (eager_forms.attention_map(*heads[:2]).bfloat16().float() @ heads[2]).bfloat16().float()
    assert torch.allclose(eager_output(call, torch.bfloat16), by_hand.transpose(1, 2), rtol=0, atol=1e-2)
    exact, _ = exact_answer(call)
    eager, rounded_once = eager_output(call, torch.bfloat16), exact.bfloat16()
    assert (eager - exact).abs().mean() > (rounded_once - exact).abs().mean()


def test_the_sum_of_absolute_terms() -> None:
    """One row whose map is (1/4, 3/4), with a weight, with a negative gain, and with contrast 2."""
    q, k = torch.ones(1, 1, 1, 1), torch.tensor([0.0, 1.0]).log1p().reshape(1, 2, 1, 1)
    k[0, 1] = torch.tensor(3.0).log()
    v = torch.tensor([4.0, -8.0]).reshape(1, 2, 1, 1)
    call = FeatureCall(q, k, v, {"row": 1}, {"a": 1, "b": 1}, {"weight": {("row", "a"): 2.0}}, scale=1.0)
    assert largest_term_sum(call) == pytest.approx(2 * 4 / 4 + 8 * 3 / 4)
    assert largest_term_sum(replace(call, options={"gain": {"row": -3.0}})) == pytest.approx(3 * (1 + 6))
    contrasted = replace(call, options={"contrast": fb.Contrast(2.0, (0.0, 1.0))})
    assert largest_term_sum(contrasted) == pytest.approx(2 * (1 + 6) + (4 + 8) / 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda out: out.index_fill(1, torch.tensor(0), torch.nan), "not finite"),
        (lambda out: out[:, :-1], "expected the shape"),
        (lambda out: out + 0.1, "mean error"),
        (lambda out: out.index_fill(1, torch.tensor(0), 0.1), "max error"),
    ],
)
def test_a_wrong_result_is_refused(change, message: str) -> None:
    exact = torch.zeros(1, 1000, dtype=torch.float64)
    eager = exact + 0.01
    with pytest.raises(WrongResult, match=f"ours: .*{message}"):
        compare("ours", change(exact.bfloat16()), exact, eager, torch.bfloat16)
    report = compare("ours", exact.bfloat16() + 0.005, exact, eager, torch.bfloat16)
    assert report["max_error_eager"] == pytest.approx(0.01) and report["max_error"] < 0.011


def test_eager_forms_agree_with_the_operator() -> None:
    eager = replace(contestants.EAGER, slack=4.0)
    for control in ("brush", "groups", "contrast", "contrast_linear"):
        case = dry_case("sd15-32", control, torch.float32)
        _, out = eager.start(case)
        ExpectedRows(case, True).check(control, out, eager.slack)
    case = draw_case(QUICK["quick-text-cross"], torch.float32)
    _, out = eager.start(case)
    ExpectedRows(case, True).check("reweight", out, eager.slack)
    with pytest.raises(contestants.Missing, match="weights alone"):
        eager.start(dry_case("sd15-32", "shift"))
