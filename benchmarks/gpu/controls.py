"""The controls that our calls are timed with on a GPU, and the names of those calls in the results."""

from __future__ import annotations

from dataclasses import replace

from ...bindings import Contrast
from ..cases.inputs import Case
from ..cases.shapes import BRUSH, BRUSH_GAIN, Shape

GROUPS = {"text": ["prompt"], "image": ["subject", "target"]}
CONTROLS = ("plain", "shift", "brush", "groups", "contrast", "contrast_linear", "quarter")
# Our calls by name: on the setup's backend under the control's name, on the cuda backend as cuda_<control>.
CUDA = {f"cuda_{name}": name for name in ("plain", "shift", "brush", "groups", "contrast_linear", "quarter")}
OURS = {**{name: name for name in CONTROLS}, **CUDA}


def with_control(shape: Shape, name: str) -> Shape:
    """A diptych with one of CONTROLS.

    plain: none. shift: In-Context Brush's weights (arXiv 2505.20271, Eq. 5). brush: its weights, mass and
    gain (Eqs. 5 to 8). groups: text and image, each with a softmax of its own, gated (IP-Adapter, arXiv
    2308.06721). contrast: of the map, clipped (SD-VICL, arXiv 2508.09949). contrast_linear: not clipped.
    quarter: brush, for the last quarter of the rows alone.

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
    raise ValueError(f"name: expected one of {', '.join(CONTROLS)}, got {name!r}")


def case_with_control(case: Case, name: str) -> Case:
    """The same tensors under one of CONTROLS; where it asks for fewer rows, the last ones."""
    shape = with_control(case.shape, name)
    if shape.rows == case.shape.rows:
        return Case(shape, case.dtype, case.q, case.k, case.v, shape.control())
    return Case(shape, case.dtype, case.q[:, -shape.n_rows :].contiguous(), case.k, case.v, shape.control())
