"""apply(): its arguments, what it refuses, and which attention serves plain calls."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
from torch import nn

import flashbrush as fb
from flashbrush.integrations import InContextBrush
from flashbrush.integrations.diffusers import Layer, Plan, Step, apply
from flashbrush.integrations.diffusers.hosts import processor

from ..tiny import COLUMNS, ROWS, TEXT, forward, relative, tiny_call, tiny_flux
from .tiny_images import tiny_unet

TOLERANCE = 1e-5  # float32, relative to the largest output
KINDS = ["double", "double", "single", "single"]


class Recorder:
    """A method that records its calls and weights the text in every layer."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        tokens = fb.Segments(text=TEXT, image=ROWS * COLUMNS)
        self.control = fb.Control(tokens, weight={("image", "text"): 3.0})

    def plan(self, layer: Layer, step: Step) -> Plan:
        self.asked.append(layer.index)
        return Plan(self.control)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [("double", [0, 1]), ("single", [2, 3]), (3, [3]), ([0, "single"], [0, 2, 3]), (None, [0, 1, 2, 3])],
    ids=str,
)
def test_only_selected_layers_are_controlled(
    layers: str | int | list[str | int] | None, expected: list[int]
) -> None:
    model, method = tiny_flux(), Recorder()
    with apply(model, method, layers=layers, stats=True) as handle:
        forward(model, tiny_call(model))
        assert method.asked == expected
        assert [(record.layer, record.kind) for record in handle.stats] == [(i, KINDS[i]) for i in expected]


def test_only_selected_steps_are_controlled() -> None:
    model = tiny_flux()
    call = tiny_call(model)
    stock = forward(model, call)
    with apply(model, Recorder(), steps=[1], stats=True) as handle:
        assert not handle.controls_step and relative(forward(model, call), stock) <= TOLERANCE
        assert handle.controls_step and relative(forward(model, call), stock) > 1e-3
        assert {record.step for record in handle.stats} == {1}
        handle.reset()
        assert handle.stats == [] and handle.step == Step(0)
        assert relative(forward(model, call), stock) <= TOLERANCE


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"method": InContextBrush}, TypeError, "the class InContextBrush"),
        ({"method": 3}, TypeError, "plan.*int"),
        ({"layers": "middle"}, ValueError, "layers.*double, single.*middle"),
        ({"layers": 4}, ValueError, r"layers.*0\.\.3, got 4"),
        ({"layers": []}, ValueError, "layers: expected at least one"),
        ({"steps": -1}, ValueError, "steps.*-1"),
        ({"stats": ["heat"]}, ValueError, "stats.*heat"),
        ({"backend": "fast"}, ValueError, "backend.*cpu.*fast"),
    ],
    ids=str,
)
def test_refuses_arguments(arguments: dict, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        apply(tiny_flux(), **{"method": InContextBrush(), **arguments})


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (nn.Linear, "model: expected one of FluxTransformer2DModel"),
        (str, "model: expected"),
        (lambda: SimpleNamespace(transformer=1), "pass its transformer"),
        (lambda: SimpleNamespace(transformer=tiny_flux()), "pass its transformer"),
        (lambda: SimpleNamespace(unet=tiny_unet()), "pass its unet"),
    ],
    ids=["another module", "a name", "a pipeline", "a FLUX pipeline", "a UNet pipeline"],
)
def test_refuses_models(model: Callable, match: str) -> None:
    with pytest.raises(TypeError, match=match):
        apply(model(2, 2) if model is nn.Linear else model())


def test_a_derived_gain_over_tensor_parallel_ranks_raises() -> None:
    model = tiny_flux()
    model._parallel_config = SimpleNamespace(context_parallel_config=None, tensor_parallel_config=object())
    with apply(model, InContextBrush()), pytest.raises(NotImplementedError, match="derived head gain"):
        forward(model, tiny_call(model))


# Plain calls


def test_plain_calls_use_the_attention_backend_that_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    model, used = tiny_flux(), []
    call = tiny_call(model)
    dispatch = processor.dispatch_attention_fn
    monkeypatch.setattr(
        processor, "dispatch_attention_fn", lambda *a, **k: (used.append(k["backend"]), dispatch(*a, **k))[1]
    )
    with apply(model, InContextBrush(), layers="single"):
        model.set_attention_backend("native")
        forward(model, call)
        assert len(used) == 2 and all(getattr(name, "value", name) == "native" for name in used)
    assert all(p._attention_backend is not None for p in model.attn_processors.values())


def test_warns_that_plain_calls_keep_to_a_set_attention_backend() -> None:
    model = tiny_flux()
    model.set_attention_backend("native")
    with pytest.warns(UserWarning, match="'native', and plain calls use it") as warned:
        apply(model)
    assert warned[0].filename == __file__


def test_without_a_method_unselected_layers_stay_diffusers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ours = tiny_flux(), []
    monkeypatch.setattr(processor, "attention", lambda *a, **k: (ours.append(1), fb.attention(*a, **k))[1])
    with apply(model, layers="double"):
        forward(model, tiny_call(model))
    assert len(ours) == 2
