"""Plug-and-Play against an eager implementation of its formula."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from flashbrush.integrations import EditRoles, PlugAndPlay
from flashbrush.integrations.diffusers import Handle, Layer, Step, apply
from flashbrush.integrations.methods.plug_and_play import negative_prompt_share

from ..diffusers.tiny_images import SDXL, tiny_unet, unet_call
from ..tiny import forward as flux_forward, relative, tiny_call, tiny_flux
from .eager import Edit, editing, largest_tensor, probabilities, run, sample_ddim, worst_edit

TOLERANCE = 1e-5  # float32, relative to the largest output
PAIRS = ((0, 1), (2, 3))  # [source, edit] without and with the prompt
TINY = {"layers": (3, None), "steps": (0, None), "feature": (1, 0), "feature_steps": (0, None)}
UP = (6, 8, 10, 12)  # self-attention on the way up, the tiny UNet's blocks 3 to 6


def injected(pairs=PAIRS) -> Edit:
    def edit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        prob = probabilities(q, k)
        for source, target in pairs:
            prob[target] = prob[source]
        return prob @ v

    return edit


@contextmanager
def overwritten(model, place=(1, 0), pairs=PAIRS) -> Iterator[None]:
    """The residual block's features, before its shortcut, are the source's."""
    resnet = model.up_blocks[place[0]].resnets[place[1]]

    def overwrite(module, inputs, output: Tensor) -> Tensor:
        output = output.clone()
        for source, target in pairs:
            output[target] = output[source]
        return output

    hook = resnet.conv2.register_forward_hook(overwrite)
    try:
        yield
    finally:
        hook.remove()


def eager(model, call: dict, layers=UP, place=(1, 0), pairs=PAIRS) -> Tensor:
    with ExitStack() as stack:
        stack.enter_context(editing(model, dict.fromkeys(layers, injected(pairs))))
        if place is not None:
            stack.enter_context(overwritten(model, place, pairs))
        return run(model, call)


@pytest.mark.parametrize(
    ("knobs", "expected"),
    [
        ({}, {}),
        ({"feature": None}, {"place": None}),
        ({"feature": (0, 1)}, {"place": (0, 1)}),
        ({"layers": (2, 4)}, {"layers": (4, 6)}),
        ({"items": (EditRoles(1, 0), EditRoles(3, 2))}, {"pairs": ((1, 0), (3, 2))}),
        ({"items": EditRoles(3, 0)}, {"pairs": ((3, 0),)}),
    ],
    ids=str,
)
def test_matches_eager(knobs: dict, expected: dict) -> None:
    model = tiny_unet()
    call = unet_call(model, batch=4)
    theirs = eager(model, call, **expected)
    plain = run(model, call)
    with apply(model, PlugAndPlay(**(TINY | knobs))):
        out = run(model, call)
        edit = injected(expected.get("pairs", PAIRS))
        assert worst_edit(model, call, dict.fromkeys(expected.get("layers", UP), edit)) <= TOLERANCE
    assert relative(out, theirs) <= TOLERANCE
    assert relative(out, plain) > 1e-2
    assert relative(run(model, call), plain) == 0


def test_several_edits_on_sdxl_match_eager() -> None:
    model = tiny_unet(SDXL)
    call = unet_call(model, batch=6)
    pairs = ((0, 1), (0, 2), (3, 4), (3, 5))
    assert [(roles.source, roles.target) for roles in EditRoles.stacked(2)] == list(pairs)
    theirs = eager(model, call, layers=(8, 10, 12, 14), place=(1, 1), pairs=pairs)
    with apply(model, PlugAndPlay(**(TINY | {"layers": (4, None), "feature": (1, 1)}))):
        assert relative(run(model, call), theirs) <= TOLERANCE


def test_run_matches_eager() -> None:
    """Four steps of DDIM: maps in the first two, features in the first three."""
    model = tiny_unet()
    call = unet_call(model, batch=4)
    maps, features = ExitStack(), ExitStack()

    def start(step: int) -> None:
        if step == 0:
            maps.enter_context(editing(model, dict.fromkeys(UP, injected())))
            features.enter_context(overwritten(model))
        if step == 2:
            maps.close()
        if step == 3:
            features.close()

    expected = sample_ddim(model, call, 4, start)
    with apply(model, PlugAndPlay(**(TINY | {"steps": (0, 2), "feature_steps": (0, 3)}))):
        assert relative(sample_ddim(model, call, 4), expected) <= TOLERANCE
    assert relative(sample_ddim(model, call, 4), expected) > 1e-2


@pytest.mark.parametrize(
    "change",
    [
        {"layers": (5, None)},
        {"steps": (1, None)},
        {"feature": None},
        {"feature": (0, 0)},
        {"feature_steps": (1, None)},
        {"items": EditRoles(0, 1)},
    ],
    ids=str,
)
def test_each_knob_changes_the_output(change: dict) -> None:
    model = tiny_unet()
    call = unet_call(model, batch=4)
    with apply(model, PlugAndPlay(**TINY)) as handle:
        handle.set_step(0)
        before = run(model, call)
        handle.method = dataclasses.replace(PlugAndPlay(**TINY), **change)
        assert relative(run(model, call), before) > 1e-4
        for name in change:
            setattr(handle.method, name, TINY.get(name))
        assert relative(run(model, call), before) <= TOLERANCE


def test_edit_of_itself_is_plain_attention() -> None:
    model = tiny_unet()
    call = unet_call(model, batch=4)
    plain = run(model, call)
    with apply(model, PlugAndPlay(**TINY, items=EditRoles(1, 1))):
        assert relative(run(model, call), plain) <= TOLERANCE


def test_features_follow_apply_and_copies() -> None:
    """Features follow apply's steps and end with the handle; a copy of the model has its own."""
    model = tiny_unet()
    call = unet_call(model, batch=4)
    plain = run(model, call)
    method = PlugAndPlay(**(TINY | {"steps": (0, 0)}))
    expected = eager(model, call, layers=())
    with apply(model, method, steps=1):
        assert relative(run(model, call), plain) <= TOLERANCE
        copied = deepcopy(model)
        assert relative(run(model, call), expected) <= TOLERANCE
        method.feature = None
        copy: Any = Handle.of(copied)
        assert copy.step.index == 1
        assert relative(run(copied, call), expected) <= TOLERANCE
        assert relative(run(copied, call), plain) <= TOLERANCE


def test_default_layers_and_steps_are_the_released_ones() -> None:
    """SD 1.5 has 16 transformer blocks; the code's output blocks 4 to 11 are the last eight."""
    method = PlugAndPlay()
    places = ["down"] * 6 + ["mid"] + ["up"] * 9

    def planned(block: int, step: int) -> bool:
        layer = Layer(2 * block, "self", places[block], 8, 40, 0, 64, 4, (8, 8))
        return method.plan(layer, Step(step)) is not None

    assert [block for block in range(16) if planned(block, 0)] == list(range(8, 16))
    assert [step for step in range(50) if planned(8, step)] == list(range(26))


def test_makes_no_attention_map() -> None:
    """No tensor is larger than in a plain call; the eager form shows that a map would be."""
    model = tiny_unet()
    call = unet_call(model, batch=4, side=(32, 32))
    with editing(model, {12: injected()}):
        assert largest_tensor(model, call) >= 1024**2 * 16
    plain = largest_tensor(model, call)
    with apply(model, PlugAndPlay(**TINY)):
        assert largest_tensor(model, call) <= plain


def test_equal_knobs_share_one_plan() -> None:
    layer = Layer(20, "self", "up", 4, 8, 0, 64, 4, (8, 8))
    assert PlugAndPlay().plan(layer, Step(0)) is PlugAndPlay().plan(layer, Step(1))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [0.8, 0.6, 0.4, 0.2, 0.0]),
        ("constant", [0.8] * 5),
        ("exp", [0.8 * math.exp(-1.5 * i) for i in range(5)]),
    ],
)
def test_negative_prompt_share_follows_the_schedule(schedule: Any, expected: list[float]) -> None:
    assert [negative_prompt_share(i, 5, 0.8, schedule) for i in range(5)] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((5, 5), "^step: "),
        ((-1, 5), "^step: "),
        ((0, 5, 1.5), "^start: "),
        ((0, 5, 1.0, "cubic"), "^schedule: .*cubic"),
    ],
)
def test_wrong_share_raises(arguments: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        negative_prompt_share(*arguments)


@pytest.mark.parametrize(
    ("knob", "match"),
    [
        ({"layers": 3}, "^layers: "),
        ({"steps": (3, 1)}, "^steps: "),
        ({"feature_steps": (-1, 1)}, "^feature_steps: "),
        ({"feature": 4}, "^feature: "),
        ({"feature": (1, -1)}, "^feature: "),
        ({"items": ()}, "^items: "),
        ({"items": (0, 1)}, "^items: "),
    ],
    ids=str,
)
def test_wrong_knob_raises(knob: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        PlugAndPlay(**knob)


def test_call_that_does_not_fit_raises() -> None:
    model, flux = tiny_unet(), tiny_flux()
    with pytest.raises(ValueError, match=r"^feature: .*\(1, 4\)"):
        apply(model, PlugAndPlay(feature=(1, 4)))
    with apply(model, PlugAndPlay(**TINY)), pytest.raises(ValueError, match=r"^items: .*3 items"):
        run(model, unet_call(model, batch=3))
    with apply(flux, PlugAndPlay(feature=None)), pytest.raises(ValueError, match="'double'"):
        flux_forward(flux, tiny_call(flux, batch=4))
    for count in ("edits", "halves"):
        with pytest.raises(ValueError, match=f"^{count}: "):
            EditRoles.stacked(**{count: 0})


def test_steps_do_not_recompile() -> None:
    unet, compiled, first = tiny_unet(), [], 0
    resnet: Any = unet.get_submodule("up_blocks.0.resnets.0")

    def count(graph: torch.fx.GraphModule, _: list) -> Any:
        compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()
    call = unet_call(unet, batch=4)
    try:
        outs = []
        for compiles in (False, True):
            if compiles:
                resnet.compile(
                    backend=count
                )  # the block with the features; a whole model takes long to compile
            with apply(unet, PlugAndPlay((0, None), (0, 6), feature=(0, 0), feature_steps=(0, 8))) as handle:
                for i in range(10):
                    handle.set_step(i, 10)
                    outs.append(unet(**call).sample)
                    if i == 0:
                        first = len(compiled)
        assert 0 < len(compiled) <= 3 * first
        assert all(relative(a, b) <= TOLERANCE for a, b in zip(outs[:10], outs[10:], strict=True))
    finally:
        torch._dynamo.reset()
