"""column_mass() of the C++ backend against float64, on every instruction set that runs here."""

from __future__ import annotations

import torch
from hypothesis import given, settings

import flashbrush as fb
from support.calls import Call, examples, random_calls


@settings(max_examples=examples(90))
@given(call=random_calls(contrast=False))
def test_instruction_sets(isa: str, call: Call) -> None:
    """Probabilities are float32 products of the inputs as they are, in every dtype."""
    assert call.control is None or call.control.rows is not None
    kwargs = {name: value for name, value in call.kwargs.items() if name != "mask"}
    if (source := kwargs.pop("source", None)) is not None:
        kwargs["source"] = {name: source[name] for name in ("q", "k")}
    exact = call.to(torch.float64)
    lse = exact.run("reference", return_stats=True)[1].lse
    names = ("*",) if call.control is None else ("*", call.control.rows.names[-1])
    for rows in names:
        truth = fb.column_mass(exact.q, exact.k, lse, call.control, rows=rows, **kwargs)
        got = fb.column_mass(call.q, call.k, lse.float(), call.control, rows=rows, **kwargs)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), truth, rtol=1e-4, atol=1e-5)
