"""apply() and its handle: putting control in place, selecting, steering, compiling, and leaving nothing
behind.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxIPAdapterAttnProcessor
from torch import nn

import flashbrush as fb
from flashbrush.integrations import AttentionMaps, InContextBrush, PlugAndPlay, SmoothedEnergy
from flashbrush.integrations.diffusers import Handle, Layer, Plan, Step, apply, compose

from ..methods.eager import run as run_unet
from ..tiny import COLUMNS, ROWS, TEXT, forward, relative, tiny_call, tiny_flux
from .tiny_images import tiny_unet, unet_call

TOLERANCE = 1e-5
LAYERS = ["double", "double", "single", "single"]


class Recorder:
    """A method that notes what it is asked and answers with the same control."""

    def __init__(self) -> None:
        self.asked: list[tuple[Layer, Step]] = []
        self.control = fb.Control(
            fb.Segments(text=TEXT, image=ROWS * COLUMNS), weight={("image", "text"): 3.0}
        )

    def plan(self, layer: Layer, step: Step) -> Plan:
        self.asked.append((layer, step))
        return Plan(self.control)


def test_restores_the_same_objects() -> None:
    model = tiny_flux()
    before, keys = list(model.attn_processors.values()), set(model.state_dict())
    call = tiny_call(model)
    stock = forward(model, call)
    handle = apply(model, InContextBrush())
    assert set(model.state_dict()) == keys and Handle.of(model) is handle
    assert relative(forward(model, call), stock) > 1e-3
    handle.remove()
    handle.remove()
    assert all(a is b for a, b in zip(model.attn_processors.values(), before, strict=True))
    assert not model._forward_hooks and not model._forward_pre_hooks and Handle.of(model) is None
    assert torch.equal(forward(model, call), stock)


def test_restores_after_an_error() -> None:
    model = tiny_flux()
    with pytest.raises(ZeroDivisionError), apply(model, InContextBrush()):
        raise ZeroDivisionError
    assert all(type(p) is FluxAttnProcessor for p in model.attn_processors.values())


def test_tells_the_method_what_it_promises() -> None:
    model, method = tiny_flux(), Recorder()
    with apply(model, method) as handle:
        handle.grid = (ROWS, COLUMNS)
        forward(model, tiny_call(model, batch=2))
        forward(model, tiny_call(model, batch=2))
        handle.set_step(5, 9, 0.25)
        forward(model, tiny_call(model, batch=2))
    layers, steps = zip(*method.asked[:8], strict=True)
    assert [layer.kind for layer in layers] == LAYERS * 2 and [layer.index for layer in layers] == [
        0,
        1,
        2,
        3,
    ] * 2
    assert [step.index for step in steps] == [0] * 4 + [1] * 4
    first = layers[0]
    assert (first.text_len, first.image_len, first.batch, first.heads, first.head_dim) == (
        TEXT,
        ROWS * COLUMNS,
        2,
        4,
        32,
    )
    assert first.grid == (ROWS, COLUMNS) and first.place is None
    assert method.asked[-1][1] == Step(5, 9, 0.25)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [("double", [0, 1]), ("single", [2, 3]), (3, [3]), ([0, "single"], [0, 2, 3]), (None, [0, 1, 2, 3])],
    ids=str,
)
def test_layer_selection(layers, expected: list[int]) -> None:
    model, method = tiny_flux(), Recorder()
    with apply(model, method, layers=layers, stats=True) as handle:
        forward(model, tiny_call(model))
        assert [layer.index for layer, _ in method.asked] == expected
        assert [record.layer for record in handle.stats] == expected
        assert [record.kind for record in handle.stats] == [LAYERS[i] for i in expected]


def test_step_selection_and_reset() -> None:
    model, method = tiny_flux(), Recorder()
    call = tiny_call(model)
    stock = forward(model, call)
    with apply(model, method, steps=[1], stats=True) as handle:
        assert relative(forward(model, call), stock) <= TOLERANCE
        assert relative(forward(model, call), stock) > 1e-3
        assert {record.step for record in handle.stats} == {1}
        handle.reset()
        assert handle.stats == [] and handle.step == Step(0)
        assert relative(forward(model, call), stock) <= TOLERANCE


@pytest.mark.parametrize(("steps", "passes", "idle"), [(5, 2, True), (1, 2, False), (5, 0, False)])
@pytest.mark.parametrize("managed", [False, True])
def test_control_that_never_came_to_pass_is_told(steps: int, passes: int, idle: bool, managed: bool) -> None:
    model = tiny_flux()
    call = tiny_call(model)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        handle = apply(model, InContextBrush(), steps=steps)
        with handle if managed else nullcontext():
            for _ in range(passes):
                forward(model, call)
        handle.remove()
    told = [w for w in told if "controlled nothing" in str(w.message)]
    assert len(told) == idle
    assert not idle or ("InContextBrush" in str(told[0].message) and told[0].filename == __file__)


def test_a_step_whose_call_has_other_shapes_is_planned_with_the_call() -> None:
    """As where the first step also brings tokens that later ones read from a cache."""
    model = tiny_flux()
    method = Recorder()
    larger, smaller = tiny_call(model), tiny_call(model, rows=3)
    with apply(model, method) as handle:
        forward(model, larger)
        method.control = fb.Control(
            fb.Segments(text=TEXT, image=3 * COLUMNS), weight={("image", "text"): 3.0}
        )
        handle.set_step(1)
        assert all(processor.state is None for processor in model.attn_processors.values())
        assert relative(forward(model, smaller), (after := forward(model, smaller))) == 0
        with pytest.raises(ValueError, match="tokens for layer"):
            forward(model, larger)
    assert relative(after, forward(model, smaller)) > 1e-3


def test_statistics() -> None:
    model, tokens = tiny_flux(), TEXT + ROWS * COLUMNS
    with apply(model, Recorder(), stats=("lse", "mass")) as handle:
        forward(model, tiny_call(model, batch=2))
        records = handle.stats
    assert len(records) == 4
    for record in records:
        assert record.stats.lse.shape == (2, 4, tokens, 1) and record.stats.gain.numel() == 0
        rows = record.stats.mass.sum(3)  # of each row segment: its number of rows
        torch.testing.assert_close(rows, torch.tensor([float(TEXT), float(ROWS * COLUMNS)]).expand(2, 4, 2))


def test_a_deep_copy_carries_its_own_control() -> None:
    model = tiny_flux()
    call = tiny_call(model)
    stock = forward(model, call)
    with apply(model, InContextBrush()) as handle:
        controlled = forward(model, call)
        twin = copy.deepcopy(model)
    own = Handle.of(twin)
    assert own is not None and own is not handle
    assert torch.equal(forward(twin, call), controlled) and torch.equal(forward(model, call), stock)
    own.remove()
    assert torch.equal(forward(twin, call), stock)


def test_pickles() -> None:
    model = tiny_flux()
    call = tiny_call(model)
    with apply(model, InContextBrush()):
        controlled = forward(model, call)
        twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(forward(twin, call), controlled)


@pytest.mark.parametrize("sequential", [False, True], ids=["model", "layer by layer"])
def test_offloading_hooks(sequential: bool) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = tiny_flux()
    call = tiny_call(model)
    with apply(model, InContextBrush()):
        expected = forward(model, call)
    if sequential:
        # Weights of every leaf are on "meta" until its hook brings them.
        accelerate.cpu_offload(model, torch.device("cpu"))
    else:
        model, _ = accelerate.cpu_offload_with_hook(model, torch.device("cpu"))
    with apply(model, InContextBrush()):
        assert relative(forward(model, call), expected) <= TOLERANCE


def test_a_set_attention_backend_keeps_plain_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    from flashbrush.integrations.diffusers.hosts import processor

    model, taken = tiny_flux(), []
    call = tiny_call(model)
    dispatch = processor.dispatch_attention_fn
    monkeypatch.setattr(
        processor, "dispatch_attention_fn", lambda *a, **k: (taken.append(k["backend"]), dispatch(*a, **k))[1]
    )
    with apply(model, InContextBrush(), layers="single"):
        model.set_attention_backend("native")
        forward(model, call)
        assert len(taken) == 2 and all(getattr(name, "value", name) == "native" for name in taken)
    assert all(p._attention_backend is not None for p in model.attn_processors.values())


def test_without_a_method_unselected_layers_stay_the_model_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from flashbrush.integrations.diffusers.hosts import processor

    model, ours = tiny_flux(), []
    monkeypatch.setattr(processor, "attention", lambda *a, **k: (ours.append(1), fb.attention(*a, **k))[1])
    with apply(model, layers="double"):
        forward(model, tiny_call(model))
    assert len(ours) == 2


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
def test_compiled_repeated_blocks(first: str, compilations: Counting) -> None:
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


def test_whole_model_compiled_before(compilations: Counting) -> None:
    model = tiny_flux()
    call = tiny_call(model)
    with apply(model, InContextBrush()):
        expected = forward(model, call)
    compiled = torch.compile(model, backend=compilations)
    with apply(compiled, InContextBrush()):
        assert relative(forward(compiled, call), expected) <= TOLERANCE
    model.compile(backend=compilations)
    with apply(model, InContextBrush()):
        assert relative(forward(model, call), expected) <= TOLERANCE


def context_parallel(model: nn.Module) -> None:
    model._parallel_config = SimpleNamespace(context_parallel_config=object(), tensor_parallel_config=None)


def ip_adapter(model: nn.Module) -> None:
    model.set_attn_processor(FluxIPAdapterAttnProcessor(hidden_size=128, cross_attention_dim=16))


@pytest.mark.parametrize(
    ("prepare", "arguments", "error", "match"),
    [
        (context_parallel, {}, NotImplementedError, "context parallelism"),
        (ip_adapter, {}, TypeError, "FluxIPAdapterAttnProcessor"),
        (apply, {}, RuntimeError, "already has a flashbrush control"),
        (None, {"method": InContextBrush}, TypeError, "the class InContextBrush"),
        (None, {"method": 3}, TypeError, "plan.*int"),
        (None, {"layers": "middle"}, ValueError, "layers.*double, single.*middle"),
        (None, {"layers": 4}, ValueError, r"layers.*0\.\.3, got 4"),
        (None, {"layers": []}, ValueError, "layers: expected at least one"),
        (None, {"steps": -1}, ValueError, "steps.*-1"),
        (None, {"stats": ["heat"]}, ValueError, "stats.*heat"),
        (None, {"backend": "fast"}, ValueError, "backend.*cpu.*fast"),
    ],
)
def test_refuses(prepare, arguments: dict, error: type[Exception], match: str) -> None:
    model = tiny_flux()
    if prepare is not None:
        prepare(model)
    with pytest.raises(error, match=match):
        apply(model, **{"method": InContextBrush(), **arguments})


@pytest.mark.parametrize(
    "model", [nn.Linear(2, 2), "a name", SimpleNamespace(transformer=1)], ids=["other", "str", "pipeline"]
)
def test_refuses_other_models(model) -> None:
    with pytest.raises(TypeError, match="model: expected"):
        apply(model)


def test_a_backward_pass_with_checkpointing_leaves_no_statistics() -> None:
    model = tiny_flux().train()
    call = tiny_call(model)
    model.enable_gradient_checkpointing()
    call["hidden_states"].requires_grad_()
    maps = AttentionMaps({"word": [1]}, layers="double")
    with apply(model, compose(InContextBrush(), maps), stats=True) as handle:
        handle.grid = ROWS, COLUMNS
        for passes in (1, 2):
            model(**call, return_dict=False)[0].square().sum().backward()
            assert [r.step for r in handle.stats] == [step for step in range(passes) for _ in LAYERS]
            assert len(maps.maps) == 2 * passes


@pytest.mark.parametrize("way", ["unfuse", "set"])
def test_processors_put_back_after_removal_are_plain(way: str) -> None:
    model, unet = tiny_flux(), tiny_unet()
    if way == "unfuse":
        model, call, run = unet, unet_call(unet), run_unet
    else:
        call, run = tiny_call(model, batch=2), forward
    stock = run(model, call)
    handle = apply(model, SmoothedEnergy(guided=False))
    handle.grid = ROWS, COLUMNS
    assert relative(run(model, call), stock) > 1e-3
    if way == "unfuse":
        model.fuse_qkv_projections()
        handle.remove()
        model.unfuse_qkv_projections()
    else:
        saved = model.attn_processors
        handle.remove()
        model.set_attn_processor(saved)
    assert relative(run(model, call), stock) <= TOLERANCE
    with apply(model, SmoothedEnergy(guided=False)) as handle:
        handle.grid = ROWS, COLUMNS
        assert relative(run(model, call), stock) > 1e-3
    assert not any("Controlled" in type(p).__name__ for p in model.attn_processors.values())


def test_a_step_for_the_end_of_the_run() -> None:
    model = tiny_flux()
    call = tiny_call(model)
    with apply(model, InContextBrush()) as handle:
        for i in range(3):
            forward(model, call)
            handle.set_step(i + 1, 3)
        assert handle.step == Step(3, 3)
        with pytest.raises(ValueError, match="0 to count=3, got 4"):
            handle.set_step(4, 3)


def test_another_batch_than_prepared_is_told(compilations: Counting) -> None:
    model = tiny_flux()
    handle = apply(model, InContextBrush())
    compiled = torch.compile(model, backend=compilations)
    handle.prepare(text_len=TEXT, image_len=ROWS * COLUMNS, batch=2)
    out = forward(compiled, tiny_call(model, batch=2))
    with pytest.raises(RuntimeError, match="batch of 2, the call has 4"):
        forward(compiled, tiny_call(model, batch=4))
    handle.prepare(text_len=TEXT, image_len=ROWS * COLUMNS, batch=4)
    assert forward(compiled, tiny_call(model, batch=4)).shape[0] == 2 * out.shape[0]
    handle.remove()


def test_extra_keys_are_of_the_layers_dtype() -> None:
    model = tiny_flux().bfloat16()
    call = {k: v.bfloat16() if not k.endswith("ids") else v for k, v in tiny_call(model).items()}
    keys = torch.randn(1, 3, 4, 32)
    outs = []
    for dtype in (torch.float32, torch.bfloat16):

        class Extra:
            def plan(self, layer: Layer, step: Step, dtype: torch.dtype = dtype) -> Plan:
                rows = fb.Segments(tokens=layer.rows)
                control = fb.Control(rows, fb.Segments(tokens=layer.rows, more=3))
                return Plan(control, extra={"more": (keys.to(dtype), keys.to(dtype))})

        with apply(model, Extra()):
            outs.append(forward(model, call))
    assert torch.equal(*outs)


def test_processors_replaced_under_control_raise() -> None:
    model = tiny_flux()
    handle = apply(model, InContextBrush())
    ip_adapter(model)
    with pytest.raises(RuntimeError, match="FluxIPAdapterAttnProcessor"):
        forward(model, tiny_call(model))
    handle.remove()
    assert all(type(p) is FluxIPAdapterAttnProcessor for p in model.attn_processors.values())


def test_a_derived_gain_over_tensor_parallel_ranks_raises() -> None:
    model = tiny_flux()
    model._parallel_config = SimpleNamespace(context_parallel_config=None, tensor_parallel_config=object())
    with apply(model, InContextBrush()), pytest.raises(NotImplementedError, match="derived head gain"):
        forward(model, tiny_call(model))


def test_a_removed_handle_is_not_entered_again() -> None:
    handle = apply(tiny_flux(), InContextBrush())
    handle.remove()
    with pytest.raises(RuntimeError, match="removed"), handle:
        pass


def test_what_is_restored_is_restored_though_warnings_are_errors() -> None:
    model = tiny_flux()
    before = [layer.attn.processor for layer in model.transformer_blocks]
    handle = apply(model, InContextBrush(), steps=[7])
    forward(model, tiny_call(model))
    with warnings.catch_warnings(), pytest.raises(UserWarning, match="controlled nothing"):
        warnings.simplefilter("error")
        handle.remove()
    assert Handle.of(model) is None and [layer.attn.processor for layer in model.transformer_blocks] == before


def test_another_method_that_is_refused_leaves_the_one_before() -> None:
    model = tiny_unet()
    first = PlugAndPlay(layers=(0, None), feature=(1, 0))
    with apply(model, first) as handle:
        expected = run_unet(model, unet_call(model, batch=4))
        for wrong, error in (
            (PlugAndPlay(feature=(9, 9)), ValueError),
            (InContextBrush, TypeError),
            (3, TypeError),
        ):
            with pytest.raises(error):
                handle.method = wrong
            handle.reset()
            assert handle.method is first and torch.equal(
                run_unet(model, unet_call(model, batch=4)), expected
            )


def test_one_of_several_methods_that_is_refused_takes_the_others_hooks_along() -> None:
    model = tiny_unet()
    hooks = lambda: sum(len(module._forward_hooks) for module in model.modules())  # noqa: E731
    before = hooks()
    with pytest.raises(ValueError, match="feature"):
        apply(model, compose(PlugAndPlay(layers=(0, None), feature=(1, 0)), PlugAndPlay(feature=(9, 9))))
    assert hooks() == before


def test_a_pipeline_in_place_of_its_model_is_told() -> None:
    with pytest.raises(TypeError, match="pass its unet"):
        apply(SimpleNamespace(unet=tiny_unet()))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="pass its transformer"):
        apply(SimpleNamespace(transformer=tiny_flux()))  # type: ignore[arg-type]


def test_a_knob_is_not_the_caller_s_tensor() -> None:
    """A change to the tensor in place reaches nobody, in place of some: a knob is assigned anew."""
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


def test_a_default_device_does_not_matter_to_a_method() -> None:
    """Under torch.set_default_device tables would be made there, beside others on the CPU."""
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
