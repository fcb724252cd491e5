"""column_mass() equals the oracle's probabilities summed over rows."""

from __future__ import annotations

import math

import pytest
import torch

import flashbrush as fb
from flashbrush.bindings.core import recomputed_map
from support.oracle import probabilities, segment_of
from support.oracle_calls import map_arguments, random_oracle_call


@pytest.mark.parametrize("seed", range(4000, 4030))
def test_equals_the_probabilities_summed_over_rows(seed: int, monkeypatch) -> None:
    monkeypatch.setattr(recomputed_map, "BLOCK_ELEMENTS", 40)  # several blocks of rows
    call = random_oracle_call(seed)
    call.mask = None
    q, k, lse, control, kwargs = map_arguments(call)
    truth = probabilities(call)
    torch.testing.assert_close(
        fb.column_mass(q, k, lse, control, **kwargs), truth.sum(2), rtol=1e-9, atol=1e-9
    )
    name = call.row_names[seed % len(call.row_names)]
    counted = torch.tensor(
        [[segment_of(call.row_names, s, i)[0] == name for i in range(q.shape[1])] for s in call.row_sizes]
    ).reshape(len(call.row_sizes), 1, -1, 1)
    for rows in (name, [name]):
        got = fb.column_mass(q, k, lse, control, **kwargs, rows=rows)
        torch.testing.assert_close(got, (truth * counted).sum(2), rtol=1e-9, atol=1e-9)


def test_sums_to_the_mass_of_stats() -> None:
    q, k, v = torch.randn(2, 40, 4, 16), torch.randn(2, 70, 2, 16), torch.randn(2, 70, 2, 16)
    rows, keys = fb.Segments(a=15, b=25), fb.Segments(x=30, y=40)
    control = fb.Control(rows, keys, bias={("a", "x"): 0.7, ("b", "y"): -0.3}, weight={("*", "x"): 3.0})
    stats = fb.attention(q, k, v, control, backend="reference", return_stats=True)[1]
    for r, name in enumerate(rows):
        mass = fb.column_mass(q, k, stats.lse, control, rows=name)
        for c, key in enumerate(keys):
            torch.testing.assert_close(mass[..., keys.slice(key)].sum(-1), stats.mass[:, :, r, c])
    plain = fb.attention(q, k, v, backend="reference", return_stats=True)[1]
    mass = fb.column_mass(q.requires_grad_(), k, plain.lse)
    assert mass.dtype == torch.float32 and not mass.requires_grad
    torch.testing.assert_close(mass.sum(-1), torch.full((2, 4), 40.0))


def test_removed_keys_are_not_read() -> None:
    q, k = torch.randn(1, 5, 2, 8), torch.randn(1, 9, 2, 8)
    k[:, 6] = math.nan
    control = fb.Control(fb.Segments(r=5), fb.Segments(x=4, y=5), bias={("*", "y"): -math.inf})
    lse = fb.attention(q, k, k, control, backend="reference", return_stats=True)[1].lse
    mass = fb.column_mass(q, k, lse, control)
    assert bool((mass[..., 4:] == 0).all())
    torch.testing.assert_close(mass.sum(-1), torch.full((1, 2), 5.0))


def test_empty_calls() -> None:
    for rows, keys in ((0, 4), (4, 0)):
        q, k = torch.randn(2, rows, 2, 8), torch.randn(2, keys, 2, 8)
        mass = fb.column_mass(q, k, torch.zeros(2, 2, rows, 1))
        assert mass.shape == (2, 2, keys) and bool((mass == 0).all())


def test_bad_calls() -> None:
    q, k, lse = torch.randn(2, 5, 2, 8), torch.randn(2, 9, 2, 8), torch.zeros(2, 2, 5, 1)
    control = fb.Control(fb.Segments(a=2, b=3), fb.Segments(x=9))
    for call, more, error, word in (
        ((q, k, None), {}, TypeError, "lse"),
        ((q, k, lse[..., 0]), {}, ValueError, r"lse.*\(2, 2, 5, 1\)"),
        ((q, k, lse.clone().requires_grad_()), {}, TypeError, "lse"),
        ((q, k[:, :8], lse, control), {}, ValueError, "control.keys"),
        ((q, k, lse, control), {"rows": "c"}, ValueError, "rows.*'c'.*a, b"),
        ((q, k, lse), {"rows": "a"}, ValueError, "rows"),
        ((q, k, lse), {"source": {"v": torch.tensor([0, 1])}}, ValueError, "source"),
    ):
        with pytest.raises(error, match=word):
            fb.column_mass(*call, **more)


def test_compiles_and_passes_opcheck() -> None:
    q, k, lse = torch.randn(2, 40, 4, 16), torch.randn(2, 70, 2, 16), torch.randn(2, 4, 40, 1) + 4
    compiled = torch.compile(fb.column_mass, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, lse), fb.column_mass(q, k, lse))
    arguments = (q, [k], lse, [40], [70], [0], [0], 0.25, *(None,) * 7, [0])
    torch.library.opcheck(torch.ops.flashbrush.column_mass.default, arguments)


@pytest.mark.parametrize("change", ["dtype", "strides"])
def test_lse_of_any_dtype_and_strides(change: str) -> None:
    """The converted lse must stay alive until the kernel has read it: freed memory is soon overwritten."""
    q = torch.randn(2, 300, 4, 32, generator=torch.Generator().manual_seed(0))
    lse = fb.attention(q, q, q, return_stats=True)[1].lse
    expected = fb.column_mass(q, q, lse)
    other = (
        lse.double() if change == "dtype" else torch.stack([lse, torch.full_like(lse, math.nan)], -1)[..., 0]
    )
    for _ in range(10):
        assert torch.equal(fb.column_mass(q, q, other), expected)
