"""flashbrush info: backends, versions and devices."""

from __future__ import annotations

from ..command import flashbrush


def test_info_lists_backends_versions_and_devices(capsys) -> None:
    code, out, _ = flashbrush(capsys, "info")
    assert code == 0
    for word in ("cpu", "triton", "composed", "reference", "torch", "diffusers", "threads"):
        assert word in out
