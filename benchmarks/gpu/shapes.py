"""The shapes that are measured on a GPU, and what each variant of a call asks for."""

from __future__ import annotations

from dataclasses import replace

from ...bindings import Contrast
from ..cases.shapes import BRUSH, BRUSH_GAIN, SHAPES, Shape, diptych
from ..cpu.peers import Case

GROUPS = {"text": ["prompt"], "image": ["subject", "target"]}


def _named(*shapes: Shape) -> dict[str, Shape]:
    return {shape.name: shape for shape in shapes}


def _items(shape: Shape, batch: int) -> Shape:
    return replace(shape, batch=batch)


# FLUX: 512 text tokens, 16 x 16 pixels to an image token. SD3: 77 + 256 text tokens. SD1.5's self-attention
# is that of a UNet at 64 x 64 and at 32 x 32 latents, its tokens cut as a diptych's.
GPU_SHAPES: dict[str, Shape] = _named(
    diptych("flux-1024", 24, 512, 2048, 128),
    SHAPES["flux-768-diptych"],
    diptych("flux-1024-diptych", 24, 512, 4096, 128),
    _items(diptych("sd15-64", 8, 128, 1984, 40), 8),
    _items(diptych("sd15-32", 8, 64, 480, 80), 8),
    _items(diptych("sd3-1024", 24, 333, 2048, 64), 2),
    diptych("tokens-16k", 24, 512, 7936, 128),
    diptych("tokens-64k", 24, 512, 32512, 128),
)
MAIN = "flux-768-diptych"
LAYERS = ("flux-768-diptych", "flux-1024-diptych")
LONG = ("tokens-16k", "tokens-64k")
# As a captured graph's replay too: where a launch takes about as long as its work.
SMALL = ("sd15-32", "sd15-64", "sd3-1024")

VARIANTS = ("plain", "shift", "brush", "groups", "contrast", "contrast_linear", "quarter")
# Ours by their names in the results, with their variants; the second ones run on the cuda backend, whatever
# the others do.
CUDA = {f"cuda_{name}": name for name in ("plain", "shift", "brush", "groups", "contrast_linear", "quarter")}
OWN = {**{name: name for name in VARIANTS}, **CUDA}


def dry(shape: Shape) -> Shape:
    """The same structure, name and kinds of segments, at a size that a CPU core does in milliseconds."""
    lengths = {"prompt": 11, "subject": 24, "target": 24}
    return replace(shape, batch=min(shape.batch, 2), heads=min(shape.heads, 2), rows=lengths, keys=lengths)


def variant(shape: Shape, name: str) -> Shape:
    """A diptych with one variant's control.

    shift: In-Context Brush's weights (arXiv 2505.20271, Eq. 5). brush: and its mass and gain (Eqs. 6 to 8).
        groups: text
    and image, each with a softmax of its own, gated (IP-Adapter, arXiv 2308.06721). contrast: of the map,
    clipped (SD-VICL, arXiv 2508.09949). contrast_linear: not clipped. quarter: brush's weights and gain, for
    the last quarter of the rows alone.

    Raises:
        ValueError: an unknown name.
    """
    bare = replace(shape, weight={}, head_gain=None)
    if name == "plain":
        return bare
    if name == "shift":
        return replace(bare, weight=BRUSH)
    if name == "brush":
        return replace(bare, weight=BRUSH, head_gain=BRUSH_GAIN)
    if name == "groups":
        return replace(bare, groups=GROUPS, gates={"image": 0.8})
    if name == "contrast":
        return replace(bare, contrast=Contrast(1.67, (0.0, 1.0)))
    if name == "contrast_linear":
        return replace(bare, contrast=Contrast(1.67, None))
    if name == "quarter":
        return replace(bare, weight=BRUSH, head_gain=BRUSH_GAIN, rows={"target": shape.n_rows // 4})
    raise ValueError(f"name: expected one of {', '.join(VARIANTS)}, got {name!r}")


def vary(case: Case, name: str) -> Case:
    """The same tensors under a variant's control; fewer rows are the last ones."""
    shape = variant(case.shape, name)
    if shape.rows == case.shape.rows:
        return Case(shape, case.dtype, case.q, case.k, case.v, shape.control())
    return Case(shape, case.dtype, case.q[:, -shape.n_rows :].contiguous(), case.k, case.v, shape.control())
