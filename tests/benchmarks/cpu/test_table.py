"""`flashbrush bench`: the fields of its file, and that a wrong result is never reported with a time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import flashbrush as fb
from flashbrush.benchmarks.cases import contestants
from flashbrush.benchmarks.cases.float64_check import WrongResult
from flashbrush.benchmarks.cases.inputs import Case, draw_case
from flashbrush.benchmarks.cases.shapes import EVERY, QUICK, SHAPES
from flashbrush.benchmarks.cpu import backward, growth, pages, table

TINY = ["--quick", "--repeats", "2", "--threads", "1", "--shapes", "quick-diptych-d64"]


def has_kernel() -> bool:
    return not fb.backends()["cpu"]


def test_fields_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "cpu.json"
    threads = torch.get_num_threads()
    assert table.main([*TINY, "--dtypes", "bfloat16", "--output", str(path)]) == 0
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
        assert row["dtype"] == "bfloat16"
        for cell in row["seconds"].values():
            assert len(cell["samples"]) == cell["n"] == 2
            assert 0 < cell["min"] <= cell["q1"] <= cell["median"] <= cell["q3"] <= cell["max"]
        assert has_kernel() or row["missing"]
    (row,) = (row for row in results["rows"] if row["section"] == "forward")
    assert row["shape"]["size"] == "(1,2,193,64)"
    assert {"sdpa", "eager", "composed", "gemm_256"} <= set(row["seconds"])
    assert all({"mean_error", "max_error"} <= set(errors) for errors in row["errors"].values())
    if has_kernel():
        ratios = "sdpa/plain controlled/plain eager/controlled composed/controlled"
        assert {*ratios.split(), "plain rate/gemm_256 rate"} <= set(row["ratios"])


def test_without_our_kernel(monkeypatch, capsys, tmp_path: Path) -> None:
    """The other contestants are measured; the table lists what is missing, with the reason."""

    def without() -> dict[str, list[str]]:
        return {**fb.backends(), "cpu": ["no compiler was found"]}

    for module in (contestants, backward, growth):
        monkeypatch.setattr(module, "backends", without)
    path = tmp_path / "cpu.json"
    assert table.main([*TINY, "--output", str(path)]) == 0
    assert "no compiler was found" in capsys.readouterr().out
    rows = json.loads(path.read_text())["rows"]
    assert [r["dtype"] for r in rows if r["section"] == "forward"] == ["bfloat16", "float32"]
    for row in rows:
        assert list(row["missing"].values()) and set(row["missing"].values()) == {"no compiler was found"}
        assert not {"plain", "controlled"} & set(row["seconds"])
    assert pages.section(pages.attention, path) == "\n"


def with_wrong_element(right: contestants.Contestant, value: float) -> contestants.Contestant:
    """The same contestant with one output element changed."""

    def prepare(case: Case):
        call, heads_first = right.prepare(case)

        def wrong() -> torch.Tensor:
            out = call().clone()
            out[0, 0, 0, 0] = value
            return out

        return wrong, heads_first

    return replace(right, prepare=prepare)


@pytest.mark.parametrize(("name", "value"), [("sdpa", 3.0), ("eager", float("nan")), ("composed", 3.0)])
def test_a_wrong_result_stops_the_run(monkeypatch, capsys, tmp_path: Path, name: str, value: float) -> None:
    """No time is printed or written, and the message names the contestant."""
    right = contestants.CONTESTANTS[name]
    monkeypatch.setitem(contestants.CONTESTANTS, name, with_wrong_element(right, value))
    path = tmp_path / "cpu.json"
    assert table.main([*TINY, "--sections", "forward", "--output", str(path)]) == 1
    captured = capsys.readouterr()
    assert "wrong result" in captured.err and right.title in captured.err
    assert not path.exists() and "ms" not in captured.out


def test_a_wrong_gradient_is_refused(monkeypatch) -> None:
    run, heads_first = backward.CONTESTANTS["sdpa"]
    monkeypatch.setitem(backward.CONTESTANTS, "sdpa", (lambda q, k, v: run(q, k, v) + 0.3 * q, heads_first))
    with pytest.raises(WrongResult, match="gradient of q"):
        backward.check(draw_case(QUICK["quick-diptych-d64"], torch.float32), ["sdpa"])


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


def test_shapes() -> None:
    assert SHAPES["flux-768-diptych"].size == "(1,24,5120,128)"
    assert SHAPES["sd15-text-cross"].size == "(8,8,4096x77,40)"
    assert EVERY.keys() == SHAPES.keys() | QUICK.keys()
    assert all(shape.control().rows.total == shape.n_rows for shape in EVERY.values())
