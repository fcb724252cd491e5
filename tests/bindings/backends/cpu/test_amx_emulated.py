"""The AMX path's logic: the library's sources with AMX's intrinsics as plain C++ functions, on a machine
without it.

This says nothing of AMX hardware, nor of speed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
from hypothesis import given, settings

import flashbrush as fb
from flashbrush.bindings.backends.cpu import library as cpu
from support.builder import ROOT, load_setup
from support.calls import Call, examples, random_calls
from support.error_bars import check_result
from support.gradients import check_gradients

EMULATION = Path(__file__).parents[3] / "support" / "amx_emulation.h"


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The backend with a library of the one instruction set, forced."""
    if "avx512" not in cpu.isas():
        pytest.skip("the emulation needs AVX-512")
    folder = tmp_path_factory.mktemp("amx")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        build = load_setup()
        patch.setattr(build, "ISAS", {"amx": build.ISAS["amx"]})
        report: dict = {"isas": [], "isa_flags": {}, "left_out": {}}
        flags = [*build.FLAGS, "-O1", "-include", str(EMULATION), "-DFLASHBRUSH_AMX_EMULATED"]
        build.compile_and_link(folder, flags, report)
        if report["left_out"]:
            pytest.skip(f"the compiler knows no AMX: {report['left_out']['amx']}")
        patch.setattr(cpu, "LIBRARY", folder / build.LIBRARY)
        patch.setenv("FLASHBRUSH_CPU_ISA", "amx")
        cpu._load.cache_clear()
        assert cpu.isas() == ["amx"] and not cpu.available()
        yield
    cpu._load.cache_clear()


def run(call: Call) -> None:
    out = torch.full_like(call.run("reference"), float("nan"))
    _, stats = call.run("cpu", return_stats=True, out=out)
    check_result(call, out, stats)
    check_result(call, call.run("cpu"))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_drawn_calls(emulated: None, dtype: torch.dtype) -> None:
    @hypothesis.seed(4)
    @settings(max_examples=examples(300 if dtype == torch.bfloat16 else 50), derandomize=False, database=None)
    @given(random_calls(dtypes=(dtype,)))
    def drawn(call: Call) -> None:
        run(call)

    drawn()


@pytest.mark.parametrize("rows", (25, 48, 200))  # a group of 16 with padding, whole groups, several blocks
@pytest.mark.parametrize("dim", (32, 40, 128, 256))  # whole tiles along the head dim, and padded ones
def test_shapes(emulated: None, dim: int, rows: int) -> None:
    q, k, v = (torch.randn(1, n, 2, dim).bfloat16() for n in (rows, 333, 333))
    run(Call(q, k, v, None))


def test_gradients(emulated: None) -> None:
    @settings(max_examples=examples(60))
    @given(random_calls(contrast=False, weights=(0.0, 0.25, 0.7, 1.0, 1.3, 4.0)))
    def drawn(call: Call) -> None:
        check_gradients(call, "cpu")

    drawn()


@pytest.mark.parametrize("dim", (40, 64))
def test_masses_of_keys(emulated: None, dim: int) -> None:
    q, k, v = (torch.randn(1, n, 2, dim).bfloat16() for n in (77, 210, 210))
    _, stats = fb.attention(q, k, v, backend="cpu", return_stats=True)
    scores = torch.einsum("bmhd,bnhd->bhmn", q.double(), k.double()) / dim**0.5
    torch.testing.assert_close(
        fb.column_mass(q, k, stats.lse).double(), scores.softmax(-1).sum(2), rtol=1e-4, atol=1e-5
    )


def test_it_has_to_be_named(emulated: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLASHBRUSH_CPU_ISA")
    q = torch.randn(1, 3, 1, 8)
    with pytest.raises(RuntimeError, match="instruction set"):
        fb.attention(q, q, q, backend="cpu")
