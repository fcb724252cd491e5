"""Peak memory of one call, measured in a child process."""

from __future__ import annotations

import pytest
import torch

from flashbrush.benchmarks.cases.shapes import SHAPES
from flashbrush.benchmarks.timing import memory


@pytest.mark.skipif(not memory.measurable(), reason="the system does not report a process's high-water mark")
def test_the_eager_forms_map_is_counted() -> None:
    """The eager form holds two maps of (8, 1024, 1024), torch SDPA a few tiles; 2 MB are noise."""
    shape = SHAPES["h8-1024-d64"]
    found = {name: memory.peak(name, shape.name, torch.bfloat16, 1) for name in ("eager", "sdpa")}
    a_map = 2 * shape.heads * shape.n_rows * shape.n_keys
    assert found["eager"] is not None and found["sdpa"] is not None
    assert found["sdpa"].output == 2 * shape.heads * shape.n_rows * shape.dim
    assert 2 * a_map - 2e6 < found["eager"].peak < 3 * a_map + 2e6
    assert found["sdpa"].extra < 0.5 * a_map
