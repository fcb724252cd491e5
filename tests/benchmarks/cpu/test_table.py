"""The benchmark's command: its file's fields, and that a wrong result is never reported as a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import flashbrush as fb
from flashbrush.benchmarks.cases.shapes import EVERY, QUICK, SHAPES
from flashbrush.benchmarks.cases.truth import Truth, WrongResult
from flashbrush.benchmarks.cpu import backward, growth, layer, pages, peers, table
from flashbrush.benchmarks.timing import memory
from flashbrush.benchmarks.timing.paired import paired, ratio, spread

TINY = ["--quick", "--repeats", "2", "--threads", "1", "--shapes", "quick-diptych-d64"]


def has_kernel() -> bool:
    return not fb.backends()["cpu"]


def test_file(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "cpu.json"
    threads = torch.get_num_threads()
    assert table.main([*TINY, "--output", str(path)]) == 0
    assert torch.get_num_threads() == threads
    results = json.loads(path.read_text())
    assert results["schema"] == table.SCHEMA
    assert {"cpu", "isa", "threads", "torch", "triton", "python", "flashbrush", "date", "commit"} <= set(
        results["machine"]
    )
    assert results["machine"]["threads"] == results["conditions"]["threads"] == 1
    sections = {row["section"] for row in results["rows"]}
    assert sections == {"forward", "forward and backward", "layer", "unet", "methods", "growth"}
    for row in results["rows"]:
        assert row["dtype"] in ("bfloat16", "float32")
        for cell in row["seconds"].values():
            assert len(cell["samples"]) == cell["n"] == 2
            assert 0 < cell["min"] <= cell["q1"] <= cell["median"] <= cell["q3"] <= cell["max"]
        assert has_kernel() or row["missing"]
    forward = [row for row in results["rows"] if row["section"] == "forward"]
    assert [row["dtype"] for row in forward] == ["bfloat16", "float32"]
    for row in forward:
        assert row["shape"]["size"] == "(1,2,193,64)"
        assert {"sdpa", "eager", "composed", "gemm_256"} <= set(row["seconds"])
        assert all({"mean_error", "max_error"} <= set(errors) for errors in row["errors"].values())
        if has_kernel():
            assert {"sdpa/plain", "controlled/plain", "eager/controlled", "composed/controlled"} <= set(
                row["ratios"]
            )
            assert "plain rate/gemm_256 rate" in row["ratios"]


def test_without_our_kernel(monkeypatch, capsys, tmp_path: Path) -> None:
    """The rest is measured all the same, and the table says what is missing and why."""

    def without() -> dict[str, list[str]]:
        return {**fb.backends(), "cpu": ["no compiler was found"]}

    for module in (peers, backward, growth, layer):
        monkeypatch.setattr(module, "backends", without)
    path = tmp_path / "cpu.json"
    assert table.main([*TINY, "--output", str(path)]) == 0
    assert "no compiler was found" in capsys.readouterr().out
    for row in json.loads(path.read_text())["rows"]:
        assert list(row["missing"].values()) and set(row["missing"].values()) == {"no compiler was found"}
        assert not {"plain", "controlled"} & set(row["seconds"])
    assert pages.section(pages.attention, path) == "\n"


def broken(peer: peers.Peer, value: float) -> peers.Peer:
    """The same contestant with one output element changed."""

    def prepare(case: peers.Case):
        call, heads_first = peer.prepare(case)

        def wrong() -> torch.Tensor:
            out = call().clone()
            out[0, 0, 0, 0] = value
            return out

        return wrong, heads_first

    return peers.Peer(peer.name, peer.title, peer.controlled, prepare, peer.slack)


@pytest.mark.parametrize("name", ["sdpa", "eager", "composed"])
@pytest.mark.parametrize("value", [3.0, float("nan")])
def test_wrong_contestant_fails_loudly(monkeypatch, capsys, tmp_path: Path, name: str, value: float) -> None:
    monkeypatch.setitem(peers.PEERS, name, broken(peers.PEERS[name], value))
    path = tmp_path / "cpu.json"
    assert table.main([*TINY, "--sections", "forward", "--output", str(path)]) == 1
    captured = capsys.readouterr()
    assert "wrong result" in captured.err and peers.PEERS[name].title in captured.err
    assert not path.exists() and "ms" not in captured.out


def test_wrong_gradient_fails_loudly(monkeypatch) -> None:
    run, heads_first = backward.CONTESTANTS["sdpa"]
    monkeypatch.setitem(backward.CONTESTANTS, "sdpa", (lambda q, k, v: run(q, k, v) + 0.3 * q, heads_first))
    with pytest.raises(WrongResult, match="gradient of q"):
        backward.check(peers.draw(QUICK["quick-diptych-d64"], torch.float32), ["sdpa"])


@pytest.mark.parametrize("name", QUICK)
def test_truth_is_the_reference(name: str) -> None:
    """The check's float64 form, written out once more from the formula, against the reference backend's."""
    case = peers.draw(QUICK[name], torch.bfloat16)
    for controlled in (False, True):
        truth = Truth(case, controlled)
        q, k, v = (t.double() for t in (case.q, case.k, case.v))
        out = fb.attention(q, k, v, case.control if controlled else None, backend="reference")
        assert torch.allclose(
            out[:, truth.rows], truth.exact, rtol=0, atol=1e-12 if not controlled else 1e-6
        )  # the tables are float32
        if controlled and case.shape.head_gain is not None:
            plain = fb.attention(q, k, v, backend="reference")
            gain = out[:, truth.rows[0]] / plain[:, truth.rows[0]]
            assert float(gain.amax()) > 1.19 and float(gain.amin()) < 1.01  # the gain has work to do


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "no-such-shape"], "no-such-shape"),
        (["--dtypes", "int8"], "int8"),
        (["--threads", "0"], "--threads"),
        (["--repeats", "-1"], "--repeats"),
        (["--sections", "sideways"], "sideways"),
    ],
)
def test_wrong_arguments(capsys, arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as exit_code:
        table.main(arguments)
    assert exit_code.value.code == 2
    assert message in capsys.readouterr().err


def test_paired_timing() -> None:
    order: list[str] = []
    samples = paired({n: lambda n=n: order.append(n) for n in "abc"}, repeats=5, shortest=0.0)
    assert all(len(s) == 5 for s in samples.values())
    rounds = [tuple(order[3 + 3 * i : 6 + 3 * i]) for i in range(5)]  # after one call each to warm up
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds) and len(set(rounds)) > 1
    found = ratio({"a": [2.0, 4.0, 90.0], "b": [1.0, 2.0, 30.0]}, "a", "b")
    assert (found.median, found.min, found.max, found.n) == (2.0, 2.0, 3.0, 3)
    assert spread([5.0]).q1 == 5.0


@pytest.mark.skipif(not memory.measurable(), reason="the system does not tell a process's high-water mark")
def test_memory_sees_the_map() -> None:
    """The eager form holds two maps of (8, 1024, 1024); torch SDPA holds tiles; 2 MB may be noise."""
    shape = SHAPES["h8-1024-d64"]
    found = {name: memory.peak(name, shape.name, torch.bfloat16, 1) for name in ("eager", "sdpa")}
    a_map = 2 * shape.heads * shape.n_rows * shape.n_keys
    assert found["eager"] is not None and found["sdpa"] is not None
    assert found["sdpa"].output == 2 * shape.heads * shape.n_rows * shape.dim
    assert 2 * a_map - 2e6 < found["eager"].peak < 3 * a_map + 2e6
    assert found["sdpa"].extra < 0.5 * a_map


def test_shapes() -> None:
    assert SHAPES["flux-768-diptych"].size == "(1,24,5120,128)"
    assert SHAPES["sd15-text-cross"].size == "(8,8,4096x77,40)"
    assert EVERY.keys() == SHAPES.keys() | QUICK.keys()
    assert all(shape.control().rows.total == shape.n_rows for shape in EVERY.values())
