"""Files of a GPU run: complete after every row, and valid JSON whatever was measured."""

from __future__ import annotations

import json
from pathlib import Path

from flashbrush.benchmarks.gpu import machine, plan as gpu_plan, report


def test_numbers_that_json_does_not_have(tmp_path: Path) -> None:
    plan = [gpu_plan.Task("ceilings", "one", lambda _: {}, 1)]
    results = report.Results(plan, {"dry_run": True}, tmp_path)
    results.add(0, {"errors": {"plain": {"max_error": float("nan"), "all": (float("inf"), 1.0)}}})
    (row,) = json.loads((tmp_path / "gpu-dry-run.json").read_text())["rows"]
    assert row["errors"] == {"plain": {"max_error": "nan", "all": ["inf", 1.0]}}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gpu-dry-run.csv", "gpu-dry-run.json"]


def test_skipped_tasks_end_the_summary(tmp_path: Path) -> None:
    plan = [gpu_plan.Task("forward", "tokens-64k", lambda _: {}, 1)]
    results = report.Results(plan, {"dry_run": True}, tmp_path)
    results.add(0, {"skipped": "the time did not suffice"})
    assert list(report.summary(results))[-1] == "skipped: forward, tokens-64k: the time did not suffice"
    assert json.loads((tmp_path / "gpu-dry-run.json").read_text())["skipped"] == results.skipped != {}


def test_a_device_in_a_file_name() -> None:
    assert machine.slug("NVIDIA H200") == "nvidia-h200"
    assert machine.slug(None) == "cpu"
