"""Files that a command writes: names are checked first, and all files appear together or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashbrush.integrations.cli.shared.output import check_pictures, write_pictures


def test_files_are_written_together_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    one, two = tmp_path / "one.png", tmp_path / "other" / "two.png"
    one.write_text("old")

    def fail(path: Path) -> None:
        assert path.parent.parent == two.parent and not two.exists()
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_pictures({one: lambda path: path.write_text("new"), two: fail})
    assert one.read_text() == "old" and list(two.parent.iterdir()) == []
    write_pictures({one: lambda path: path.write_text("new"), two: lambda path: path.write_text("two")})
    assert (one.read_text(), two.read_text()) == ("new", "two")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["one.png", "other", "two.png"]


def test_wrong_names_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_pictures({"output": Path("out.PNG"), "report": None})
    for wrong, match in (
        ({"output": tmp_path}, "output: expected a file"),
        ({"output": Path("no/out.png")}, "output: no such folder"),
        ({"output": Path("out")}, "output: .*ends in one of"),
        ({"output": Path("out.pdf")}, "output: .*'out.pdf'"),
        (
            {"output": Path("out.png"), "report": tmp_path / "out.png"},
            "report: expected another file than output",
        ),
    ):
        with pytest.raises(ValueError, match=match):
            check_pictures(wrong)
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(ValueError, match="output: not allowed to write"):
        check_pictures({"output": Path("out.png")})
