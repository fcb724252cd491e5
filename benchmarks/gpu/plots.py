"""Plots of a GPU run: rate over tokens, and ratios as bars."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..timing.rows import Row
from .report import title

OURS = ("plain", "shift", "brush", "cuda_plain", "cuda_brush")
LINES = (
    *OURS,
    "cudnn",
    "flash",
    "efficient",
    "flash_attn_2",
    "flash_attn_3",
    "flash_attn_4",
    "composed",
    "eager",
)
BARS = {
    "forward": (
        "plain/vendor",
        "brush/vendor",
        "brush/plain",
        "brush/composed",
        "brush/eager",
        "cuda_plain/vendor",
        "cuda_brush/vendor",
        "cuda_brush/cuda_plain",
    ),
    "layer": ("plain/fastest stock", "controlled/fastest stock"),
    "backward": ("plain/vendor", "brush/vendor"),
    "features": ("groups/plain", "contrast/plain", "contrast_linear/plain", "quarter/plain"),
    "around": ("ours/torch",),
}


def write(rows: Sequence[Row], machine: Row, gemm: float | None, folder: Path) -> list[Path] | str:
    """Write tflops.png and ratios.png.

    Returns:
        Their paths, or why they are left out.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return "matplotlib is not installed"
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    paths = [folder / "tflops.png", folder / "ratios.png"]
    ratios: list[tuple[str, Any]] = [(str(r["section"]), r.get("ratios", {})) for r in rows]
    bars = sum(name in found for section, found in ratios for name in BARS.get(section, ()))
    for path, draw, height in zip(paths, (_rates, _ratios), (5.5, 1.5 + 0.17 * bars), strict=True):
        figure, axes = plt.subplots(figsize=(9, height), layout="constrained")
        draw(axes, rows, gemm)
        figure.suptitle(title(machine), fontsize=9)
        figure.savefig(path, dpi=110)
        plt.close(figure)
    return paths


def _rates(axes: Any, rows: Sequence[Row], gemm: float | None) -> None:
    """The shapes of head dim 128, which all have 24 heads and differ in their tokens."""
    forward: list[Any] = [r for r in rows if r["section"] == "forward" and r.get("tflops")]
    forward = [r for r in forward if r["shape"]["dim"] == 128]
    for name in LINES:
        points = sorted((r["shape"]["rows"], r["tflops"][name]) for r in forward if name in r["tflops"])
        if points:
            ours = name in OURS
            axes.plot(
                *zip(*points, strict=True),
                marker="o",
                linewidth=2.2 if ours else 1.1,
                linestyle="-" if ours else "--",
                label=f"ours, {name}" if ours else name,
            )
    if gemm:
        axes.axhline(gemm, color="gray", linewidth=0.8)
        axes.annotate("matrix product, 8192^3", (0.01, gemm), xycoords=("axes fraction", "data"), fontsize=8)
    axes.set(
        xscale="log", xlabel="tokens", ylabel="TFLOP/s", title="forward, bfloat16, 24 heads, head dim 128"
    )
    axes.set_ylim(bottom=0)
    if axes.lines:
        axes.legend(fontsize=8)


def _ratios(axes: Any, rows: Sequence[Row], gemm: float | None) -> None:
    """Medians, with quartiles as whiskers; below 1 ours takes less time."""
    bars = []
    for row in rows:
        r: Any = row
        for name in BARS.get(r["section"], ()):
            if name in r.get("ratios", {}):
                bars.append((f"{r['section']} {r['name']}: {name}", r["ratios"][name]))
    for i, (_, cell) in enumerate(bars):
        whisker = [[cell["median"] - cell["q1"]], [cell["q3"] - cell["median"]]]
        axes.barh(
            i,
            cell["median"],
            xerr=whisker,
            height=0.7,
            color="tab:green" if cell["median"] <= 1 else "tab:orange",
        )
    axes.set_yticks(range(len(bars)), [label for label, _ in bars], fontsize=6)
    axes.invert_yaxis()
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set(xlabel="time of ours over time of the other", title="ratios, medians of rounds")
