"""Handle: steps, statistics, methods and removal. What depends on the host is in hosts/test_contract.py."""

from __future__ import annotations

import warnings
from contextlib import nullcontext

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

import flashbrush as fb
from flashbrush.integrations import AttentionMaps, InContextBrush, PlugAndPlay
from flashbrush.integrations.diffusers import Handle, Layer, Plan, Step, apply, compose

from ..methods.eager import run
from ..tiny import COLUMNS, ROWS, TEXT, forward, relative, tiny_call, tiny_flux
from .tiny_images import tiny_unet, unet_call

TOLERANCE = 1e-5  # float32, relative to the largest output


class Weighted:
    """A method that weights the text over `rows` rows of image tokens, and records its calls."""

    def __init__(self) -> None:
        self.asked: list[tuple[Layer, Step]] = []
        self.rows = ROWS

    def plan(self, layer: Layer, step: Step) -> Plan:
        self.asked.append((layer, step))
        tokens = fb.Segments(text=TEXT, image=self.rows * COLUMNS)
        return Plan(fb.Control(tokens, weight={("image", "text"): 3.0}))


# Steps and planning


def test_the_grid_reaches_the_method() -> None:
    model, method = tiny_flux(), Weighted()
    with apply(model, method) as handle:
        handle.grid = (ROWS, COLUMNS)
        forward(model, tiny_call(model))
    assert {(layer.grid, layer.place) for layer, _ in method.asked} == {((ROWS, COLUMNS), None)}


def test_step_may_equal_the_count_at_the_end_of_a_run() -> None:
    model = tiny_flux()
    call = tiny_call(model)
    with apply(model, InContextBrush()) as handle:
        for i in range(3):
            forward(model, call)
            handle.set_step(i + 1, 3)
        assert handle.step == Step(3, 3)
        with pytest.raises(ValueError, match="0 to count=3, got 4"):
            handle.set_step(4, 3)


def test_step_that_cannot_be_planned_ahead_is_planned_with_its_call() -> None:
    """As where later steps have fewer tokens, whose keys were kept in the first."""
    model, method = tiny_flux(), Weighted()
    larger, smaller = tiny_call(model), tiny_call(model, rows=3)
    with apply(model, method) as handle:
        forward(model, larger)
        method.rows = 3
        handle.set_step(1)
        assert all(processor.state is None for processor in model.attn_processors.values())
        assert relative(forward(model, smaller), (after := forward(model, smaller))) == 0
        with pytest.raises(ValueError, match="tokens for layer"):
            forward(model, larger)
    assert relative(after, forward(model, smaller)) > 1e-3


def test_the_default_device_does_not_reach_a_method() -> None:
    """Under torch.set_default_device its tables would be there, and other tensors on the CPU."""
    model = tiny_flux()
    method = InContextBrush(hole=torch.arange(ROWS * COLUMNS) % 3 == 0)
    with apply(model, method) as handle:
        handle.set_step(0, 4, 1.0)
        expected = forward(model, tiny_call(model))
    with apply(model, InContextBrush(hole=method.hole)) as handle:
        handle.set_step(0, 4, 1.0)
        with torch.device("meta"):
            handle.prepare(text_len=TEXT, image_len=ROWS * COLUMNS)
        assert torch.equal(forward(model, tiny_call(model)), expected)


def test_a_knob_is_a_copy_of_the_callers_tensor() -> None:
    """A change in place changes nothing; assigning the tensor again does."""
    model = tiny_flux()
    hole = torch.zeros(ROWS * COLUMNS, dtype=torch.bool)
    hole[-3:] = True
    method = InContextBrush(hole=hole)
    with apply(model, method) as handle:
        first = forward(model, tiny_call(model))
        hole[-5:] = True
        assert method.hole is not None and int(method.hole.sum()) == 3
        assert torch.equal(forward(model, tiny_call(model)), first)
        method.hole = hole
        handle.reset()
        assert not torch.equal(forward(model, tiny_call(model)), first)


# Statistics


def test_a_layer_run_again_by_a_backward_pass_is_not_counted_twice() -> None:
    model = tiny_flux().train()
    call = tiny_call(model)
    model.enable_gradient_checkpointing()
    call["hidden_states"].requires_grad_()
    maps = AttentionMaps({"word": [1]}, layers="double")
    with apply(model, compose(InContextBrush(), maps), stats=True) as handle:
        handle.grid = ROWS, COLUMNS
        for passes in (1, 2):
            model(**call, return_dict=False)[0].square().sum().backward()
            assert [r.step for r in handle.stats] == [step for step in range(passes) for _ in range(4)]
            assert len(maps.maps) == 2 * passes


# Methods


def test_a_method_that_is_refused_leaves_the_one_before() -> None:
    model = tiny_unet()
    first = PlugAndPlay(layers=(0, None), feature=(1, 0))
    with apply(model, first) as handle:
        expected = run(model, unet_call(model, batch=4))
        for wrong, error in (
            (PlugAndPlay(feature=(9, 9)), ValueError),
            (InContextBrush, TypeError),
            (3, TypeError),
        ):
            with pytest.raises(error):
                handle.method = wrong
            handle.reset()
            assert handle.method is first and torch.equal(run(model, unet_call(model, batch=4)), expected)


# Removal


def test_an_error_within_the_context_restores_the_processors() -> None:
    model = tiny_flux()
    with pytest.raises(ZeroDivisionError), apply(model, InContextBrush()):
        raise ZeroDivisionError
    assert all(type(p) is FluxAttnProcessor for p in model.attn_processors.values())


def test_processors_put_back_by_unfusing_are_plain() -> None:
    """unfuse_qkv_projections() restores the processors from before fuse_qkv_projections(): ours."""
    model = tiny_unet()
    call = unet_call(model)
    stock = run(model, call)

    class Uniform:
        def plan(self, layer: Layer, step: Step) -> Plan:
            return Plan(query=torch.zeros_like)

    handle = apply(model, Uniform())
    assert relative(run(model, call), stock) > 1e-3
    model.fuse_qkv_projections()
    handle.remove()
    model.unfuse_qkv_projections()
    assert relative(run(model, call), stock) <= TOLERANCE
    with apply(model, Uniform()):
        assert relative(run(model, call), stock) > 1e-3
    assert not any("Controlled" in type(p).__name__ for p in model.attn_processors.values())


@pytest.mark.parametrize(("steps", "passes", "idle"), [(5, 2, True), (1, 2, False), (5, 0, False)])
@pytest.mark.parametrize("managed", [False, True])
def test_warns_when_a_method_never_planned(steps: int, passes: int, idle: bool, managed: bool) -> None:
    model = tiny_flux()
    call = tiny_call(model)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        handle = apply(model, InContextBrush(), steps=steps)
        with handle if managed else nullcontext():
            for _ in range(passes):
                forward(model, call)
        handle.remove()
    warned = [w for w in warned if "controlled nothing" in str(w.message)]
    assert len(warned) == idle
    assert not idle or ("InContextBrush" in str(warned[0].message) and warned[0].filename == __file__)


def test_the_model_is_restored_where_warnings_are_errors() -> None:
    model = tiny_flux()
    before = [layer.attn.processor for layer in model.transformer_blocks]
    handle = apply(model, InContextBrush(), steps=[7])
    forward(model, tiny_call(model))
    with warnings.catch_warnings(), pytest.raises(UserWarning, match="controlled nothing"):
        warnings.simplefilter("error")
        handle.remove()
    assert Handle.of(model) is None and [layer.attn.processor for layer in model.transformer_blocks] == before


def test_a_removed_handle_cannot_be_entered() -> None:
    handle = apply(tiny_flux(), InContextBrush())
    handle.remove()
    with pytest.raises(RuntimeError, match="removed"), handle:
        pass


# torch.compile


class Counting:
    """A torch.compile backend that counts its compilations and runs the graph as it is."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph, inputs):
        self.count += 1
        return graph.forward


@pytest.fixture
def compilations():
    torch._dynamo.reset()
    yield Counting()
    torch._dynamo.reset()


@pytest.mark.parametrize("first", ["compile", "apply"])
def test_compiled_blocks_match_eager_and_are_not_recompiled(first: str, compilations: Counting) -> None:
    model = tiny_flux(double=3, single=3)
    call = tiny_call(model)
    with apply(model, InContextBrush(0.3, 0.3)):
        expected = forward(model, call)
    with apply(model, InContextBrush(0.9, 0.1, gain_span=0.4)):
        changed = forward(model, call)
    if first == "compile":
        model.compile_repeated_blocks(fullgraph=True, backend=compilations)
    handle = apply(model, InContextBrush(0.3, 0.3))
    if first == "apply":
        model.compile_repeated_blocks(fullgraph=True, backend=compilations)
    assert relative(forward(model, call), expected) <= TOLERANCE
    assert 2 <= compilations.count <= 4
    before = compilations.count
    handle.method = InContextBrush(0.9, 0.1, gain_span=0.4)
    assert relative(forward(model, call), changed) <= TOLERANCE
    handle.set_step(7, 20, 0.3)
    forward(model, call)
    assert compilations.count == before
    handle.remove()


def test_model_compiled_in_place_before_apply_matches_eager(compilations: Counting) -> None:
    """model.compile() takes the hooks into the compiled region: they are called around it."""
    model = tiny_flux(double=1, single=1)
    call = tiny_call(model)
    with apply(model, InContextBrush()):
        expected = forward(model, call)
    model.compile(backend=compilations)
    with apply(model, InContextBrush()):
        assert relative(forward(model, call), expected) <= TOLERANCE


def test_another_batch_than_prepared_raises(compilations: Counting) -> None:
    model = tiny_flux(double=1, single=1)
    handle = apply(model, InContextBrush())
    compiled = torch.compile(model, backend=compilations)
    handle.prepare(text_len=TEXT, image_len=ROWS * COLUMNS, batch=2)
    out = forward(compiled, tiny_call(model, batch=2))
    with pytest.raises(RuntimeError, match="batch of 2, the call has 4"):
        forward(compiled, tiny_call(model, batch=4))
    handle.prepare(text_len=TEXT, image_len=ROWS * COLUMNS, batch=4)
    assert forward(compiled, tiny_call(model, batch=4)).shape[0] == 2 * out.shape[0]
    handle.remove()
