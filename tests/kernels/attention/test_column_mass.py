"""The Triton column mass against float64 of the map: in the interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

import flashbrush as fb
from flashbrush.bindings.backends import triton
from flashbrush.bindings.backends.triton import column_mass as triton_column_mass
from support.calls import Call, examples, random_calls

pytestmark = pytest.mark.skipif(bool(triton.available()), reason="; ".join(triton.available()))
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def run(call: Call) -> None:
    call = call.on(DEVICE)
    exact = call.to(torch.float64)
    lse = exact.run("reference", return_stats=True)[1].lse
    kwargs = {name: value for name, value in call.kwargs.items() if name == "scale"}
    if "source" in call.kwargs:
        kwargs["source"] = {name: call.kwargs["source"][name] for name in ("q", "k")}
    p = call.problem()
    names = (
        ("*",)
        if call.control is None or p.batch * p.rows * p.keys == 0
        else ("*", call.control.rows.names[-1])
    )
    for rows in names:
        truth = fb.column_mass(exact.q, exact.k, lse, call.control, rows=rows, **kwargs)
        counted = tuple(range(len(p.row_lengths))) if rows == "*" else (len(p.row_lengths) - 1,)
        if p.batch * p.rows * p.keys == 0:
            continue
        got = triton_column_mass.column_mass(p, lse, counted)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), truth, rtol=1e-4, atol=1e-5)


@settings(max_examples=300 if DEVICE.type == "cuda" else examples(45))
@given(random_calls(longest=70, dims=(3, 16, 40, 64, 80, 128), contrast=False))
def test_drawn_calls(call: Call) -> None:
    run(call)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_several_tiles(dtype: torch.dtype) -> None:
    rows, keys = fb.Segments(a=130, b=40), fb.Segments(c=165, d=1, e=3, f=129)
    control = fb.Control(rows, keys, bias={("b", "c"): -1.0, ("a", "e"): -torch.inf})
    q, k = (torch.randn(1, n, h, 64).to(dtype) for n, h in ((170, 2), (298, 1)))
    run(Call(q, k, k, control, {}))
