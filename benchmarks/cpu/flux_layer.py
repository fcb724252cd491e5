"""A FLUX layer between its projections: diffusers' processor, and ours plain and with In-Context Brush."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from ..cases.contestants import missing_for_layers
from ..cases.float64_check import compare
from ..cases.flux_layer import LayerInputs, Outputs, attention_module, eager_layer, stock_processor
from ..cases.shapes import Shape
from ..timing.host_clock import time_on_host
from ..timing.rounds import ratio
from ..timing.rows import Row, Settings, describe_shape, dtype_name, ratio_cells, seconds_cells, untimed

RATIOS = (("stock", "plain"), ("controlled", "stock"), ("plain", "stock"))


@torch.no_grad()
def measure(shape: Shape, dtype: torch.dtype, settings: Settings) -> Row:
    """The stock processor without control, and ours, plain and controlled.

    Raises:
        WrongResult: a result is wrong at a small size of the shape.
    """
    row: Row = {"section": "layer", "shape": describe_shape(shape), "dtype": dtype_name(dtype)}
    if reasons := missing_for_layers():
        return untimed(row, "layer", reasons)
    _check(LayerInputs.draw(shape.shrunk(), dtype, settings.seed))
    calls = _calls(LayerInputs.draw(shape, dtype, settings.seed))
    samples = time_on_host(calls, settings.repeats, seed=settings.seed)
    ratios = {f"{a}/{b}": ratio(samples, a, b) for a, b in RATIOS}
    return {**row, "seconds": seconds_cells(samples), "ratios": ratio_cells(ratios), "missing": {}}


def _calls(inputs: LayerInputs) -> dict[str, Callable[[], Outputs]]:
    """The layer's call by contestant."""
    from ...integrations.diffusers import FluxControlledAttnProcessor, Plan

    attn = attention_module(inputs)
    processors: dict[str, Any] = {
        "plain": FluxControlledAttnProcessor(backend="cpu"),
        "controlled": FluxControlledAttnProcessor(Plan(inputs.shape.control()), backend="cpu"),
    }
    ours = {
        name: functools.partial(processor, attn, *inputs.hidden_states, image_rotary_emb=inputs.rope)
        for name, processor in processors.items()
    }
    return {"stock": stock_processor(inputs), **ours}


def _check(inputs: LayerInputs) -> None:
    """Every contestant against float64: at most twice the eager layer's error in the dtype, plus an ulp."""
    dtype = inputs.image[0].dtype
    for name, call in _calls(inputs).items():
        controlled = name == "controlled"
        image, text = call()
        exact = eager_layer(inputs, torch.float64, controlled)
        # Where heads have nearly the same mass, a gain magnifies its rounding: 16 ulp of float32.
        more = (0.5 * torch.finfo(dtype).eps + 16 * torch.finfo(torch.float32).eps) * float(exact.abs().max())
        eager = eager_layer(inputs, dtype, controlled)
        where = f"FLUX layer, {name}, at {inputs.shape.name}, {dtype}"
        compare(where, torch.cat([text, image], 1), exact, eager, dtype, more=more)
