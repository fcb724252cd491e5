"""SD-VICL against an eager implementation of its formula."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flashbrush as fb
from flashbrush.integrations import InContextRoles, VisualInContext
from flashbrush.integrations.diffusers import Layer, Step, apply
from support.rounding import exact_and_error

from ..diffusers.tiny_images import SDXL, tiny_sd3, tiny_unet, unet_call
from ..tiny import forward as flux_forward, in_double, relative, tiny_call, tiny_flux
from .eager import (
    Reader,
    Site,
    changed,
    eagerly,
    reading,
    run,
    run_eagerly,
    run_layers,
    sample_ddim,
    worst_layer,
)

TOLERANCE = 1e-5  # float32, relative to the largest output
# The tiny UNet's attention layers in the order of the forward pass, self and cross in turn.
UP_16, UP_64 = (6, 8), (10, 12)  # self-attention on the way up, by tokens


def up(site: Site) -> bool:
    return site.is_self and site.name.startswith("up_blocks")


def eager(roles: InContextRoles, temperature: float = 0.4, beta: float = 1.67, clip=(0.0, 1.0)) -> Reader:
    images, truths = zip(*roles.prompts, strict=True)
    return Reader(roles.prediction, roles.query, images, truths, temperature, beta, clip)


# The formula

ONE, THREE = InContextRoles(((0, 1),), 2, 3), InContextRoles(((0, 1), (2, 3), (4, 5)), 6, 7)
SWAP = InContextRoles.stacked()
KNOBS = {
    "paper": {},
    "unclipped": {"clip": None},
    "hotter": {"temperature": 1.6},
    "weaker contrast": {"contrast": 1.2},
    "no contrast": {"contrast": 1.0},
    "other bounds": {"clip": (0.01, 0.2)},
    "bounds without contrast": {"contrast": 1.0, "clip": (0.0, 0.1)},
}


@pytest.mark.parametrize("knobs", KNOBS)
@pytest.mark.parametrize("roles", [ONE, THREE], ids=["one pair", "three pairs"])
def test_every_layer_matches_eager(roles: InContextRoles, knobs: str) -> None:
    model = tiny_unet()
    call = unet_call(model, batch=roles.prediction + 1)
    settings = {{"contrast": "beta"}.get(name, name): value for name, value in KNOBS[knobs].items()}
    core = reading(eager(roles, **settings))
    expected = run_eagerly(model, call, core, up)
    with apply(model, VisualInContext(**KNOBS[knobs])):
        out = run(model, call)
        assert worst_layer(model, call, core, up) <= TOLERANCE
    assert relative(out, expected) <= TOLERANCE


@pytest.mark.parametrize("clip", [(0.0, 1.0), None], ids=["clipped", "unclipped"])
@pytest.mark.parametrize("roles", [ONE, THREE], ids=["one pair", "three pairs"])
def test_run_matches_eager(roles: InContextRoles, clip) -> None:
    """Six steps of DDIM, of which the method controls three."""
    model = tiny_unet()
    call = unet_call(model, batch=roles.prediction + 1)
    core, switch = reading(eager(roles, clip=clip)), ExitStack()

    def start(step: int) -> None:
        if step == 1:
            switch.enter_context(eagerly(model, core, up))
        elif step == 4:
            switch.close()

    expected = sample_ddim(model, call, 6, start)
    with apply(model, VisualInContext(clip=clip, steps=(1, 4))):
        out = sample_ddim(model, call, 6)
    assert relative(out, expected) <= TOLERANCE
    assert relative(sample_ddim(model, call, 6)[roles.prediction], expected[roles.prediction]) > 1e-2


BATCHES = {
    "swap guidance": (InContextRoles.stacked(1), 5),
    "three pairs, swap guidance": (InContextRoles.stacked(3), 9),
    "both halves of the guidance": (InContextRoles.stacked(2, repeats=2), 14),
    "without the plain branch": (InContextRoles.stacked(1, plain=False, repeats=2), 8),
    "another order": ((InContextRoles(((5, 0), (3, 1)), 4, 2),), 6),
    "two queries of one pair": ((InContextRoles(((0, 1),), 2, 5), InContextRoles(((0, 1),), 3, 4)), 6),
    "prediction first": ((InContextRoles(((1, 2),), 3, 0),), 4),
    "a prediction in the middle": ((InContextRoles(((0, 1),), 4, 2),), 5),
    "all items": ((InContextRoles(((0, 1),), 1, 0), InContextRoles(((1, 0),), 0, 1)), 2),
}


@pytest.mark.parametrize("batch", BATCHES)
def test_batch_layouts_match_eager(batch: str) -> None:
    roles, items = BATCHES[batch]
    model = tiny_unet()
    call = unet_call(model, batch=items)
    core, wide = reading(*map(eager, roles)), in_double(model, call)
    (exact,), (rounding,) = exact_and_error(lambda: [run_eagerly(*wide, core, up)])
    with apply(model, VisualInContext(items=roles)):
        out = run(model, call)
    # How far a whole model in float32 strays depends on the batch: "all items" has the largest error.
    assert relative(out.double(), exact) <= 3 * rounding
    plain = run(model, call)
    predictions = [r.prediction for r in roles]
    others = [n for n in range(items) if n not in predictions]
    assert not others or relative(out[others], plain[others]) <= TOLERANCE
    assert min(relative(out[[n]], plain[[n]]) for n in predictions) > 1e-3


def test_stacked_roles_follow_the_batch() -> None:
    assert InContextRoles.stacked() == (InContextRoles(((0, 1),), 2, 4),)
    assert InContextRoles.stacked(2, plain=False) == (InContextRoles(((0, 1), (2, 3)), 4, 5),)
    assert InContextRoles.stacked(1, repeats=2) == (
        InContextRoles(((0, 1),), 2, 4),
        InContextRoles(((5, 6),), 7, 9),
    )


def test_prediction_does_not_read_itself() -> None:
    """In controlled layers D's output does not depend on D's own tokens."""
    model = tiny_unet(SDXL)
    call = unet_call(model, batch=4)
    with apply(model, VisualInContext()):
        first = run_layers(model, call)[1]
        call["sample"][3] += torch.randn_like(call["sample"][3])
        second = run_layers(model, call)[1]
    up_self = [8, 10, 12, 14]
    assert torch.equal(first[8][3], second[8][3]) and relative(first[0][3], second[0][3]) > 1e-3
    assert all(relative(first[i][:3], second[i][:3]) <= TOLERANCE for i in up_self)


def test_sdxl_and_bfloat16_match_eager() -> None:
    model = tiny_unet(SDXL)
    call = unet_call(model, batch=5)
    method = VisualInContext(items=SWAP)
    expected = run_eagerly(model, call, reading(eager(*SWAP)), up)
    with apply(model, method):
        assert relative(run(model, call), expected) <= TOLERANCE
        model.to(torch.bfloat16)
        added = {n: t.bfloat16() for n, t in call["added_cond_kwargs"].items()}
        half = {
            n: t.bfloat16() if isinstance(t, Tensor) and t.is_floating_point() else t for n, t in call.items()
        }
        half["added_cond_kwargs"] = added
        ours = run(model, half)
    theirs = run_eagerly(model, half, reading(eager(*SWAP)), up)
    assert ours.dtype == torch.bfloat16
    assert relative(ours.float(), expected) <= 1.5 * relative(theirs.float(), expected)


# The knobs


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 0.7},
        {"contrast": 1.3},
        {"clip": None},
        {"clip": (0.0, 0.3)},
        {"places": ("up", "mid")},
        {"resolutions": (8,)},
        {"steps": (1, None)},
        {"items": InContextRoles(((1, 0),), 2, 3)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_each_knob_changes_the_output(change: dict) -> None:
    model = tiny_unet()
    call = unet_call(model, batch=4)
    method = VisualInContext()
    with apply(model, method) as handle:
        handle.set_step(0)
        before = run(model, call)
        handle.method = dataclasses.replace(method, **change)
        assert relative(run(model, call), before) > 1e-4
        for name in change:
            setattr(handle.method, name, getattr(VisualInContext(), name))
        assert torch.equal(run(model, call), before)


def test_neutral_knobs_are_plain_attention() -> None:
    """D reads itself, with temperature and contrast 1."""
    model = tiny_unet()
    call = unet_call(model, batch=4)
    plain = run(model, call)
    itself = InContextRoles(((3, 3),), 3, 3)
    with apply(
        model, VisualInContext(temperature=1.0, contrast=1.0, items=itself, places=("down", "mid", "up"))
    ):
        assert relative(run(model, call), plain) <= TOLERANCE


@pytest.mark.parametrize(
    ("knobs", "first", "never"),
    [
        ({}, 6, range(6)),
        ({"resolutions": (8,)}, 10, range(10)),
        ({"resolutions": [(8, 8)]}, 10, range(10)),
        ({"resolutions": (4,)}, 6, range(6)),
        ({"places": "mid"}, 4, range(4)),
        ({"places": ("down", "up"), "resolutions": (8,)}, 0, ()),
    ],
    ids=str,
)
def test_only_chosen_layers_change(knobs: dict, first: int, never) -> None:
    model = tiny_unet()
    call = unet_call(model, batch=4)
    plain = run_layers(model, call)[1]
    with apply(model, VisualInContext(**knobs), stats=True) as handle:
        layers = run_layers(model, call)[1]
        touched = [record.layer for record in handle.stats]
    # A changed layer changes the input of all later ones.
    assert changed(layers, plain)[0] == first and not set(changed(layers, plain)) & set(never)
    side = (knobs.get("resolutions") or [None])[0]
    tokens = {None: UP_16 + UP_64, 8: UP_64, (8, 8): UP_64, 4: UP_16}[side]
    places = {"up": tokens, "mid": (4,), ("down", "up"): (0, *tokens)}[knobs.get("places", "up")]
    assert touched == list(places)


def test_resolution_may_be_a_grid_that_is_not_square() -> None:
    model = tiny_unet()
    call = unet_call(model, batch=4, side=(4, 16))
    for resolutions, touched in (([(4, 16)], UP_64), ([(16, 4)], ()), ([(2, 8)], UP_16)):
        with apply(model, VisualInContext(resolutions=resolutions), stats=True) as handle:
            run(model, call)
            assert tuple(record.layer for record in handle.stats) == touched


@pytest.mark.parametrize(
    ("window", "controlled"), [((0, None), [0, 1, 2, 3]), ((1, 3), [1, 2]), ((2, None), [2, 3])]
)
def test_only_steps_in_the_window_are_controlled(window: tuple, controlled: list[int]) -> None:
    model = tiny_unet()
    call = unet_call(model, batch=4)
    plain = run(model, call)
    with apply(model, VisualInContext(steps=window)) as handle:
        counted = [i for i in range(4) if relative(run(model, call), plain) > 1e-3]
        set_by_handle = []
        for i in range(4):
            handle.set_step(i, 4)
            set_by_handle += [i] if relative(run(model, call), plain) > 1e-3 else []
    assert counted == set_by_handle == controlled


# Cost, statistics and gradients


def test_keys_are_read_in_place_and_no_map_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator reads K and V in place, as the projections made them; the C++ backend takes every call."""
    calls = []

    def spy(q, k, v, control=None, **options):
        calls.append((q, k, v, control, options))
        return fb.attention(q, k, v, control, **options)

    monkeypatch.setattr("flashbrush.integrations.diffusers.protocol.plan_call.attention", spy)
    model = tiny_unet()
    call = unet_call(model, batch=9)
    projected: dict[str, Tensor] = {}
    up_blocks: Any = model.up_blocks
    first = up_blocks[0].attentions[0].transformer_blocks[0].attn1
    for name in ("to_k", "to_v"):
        layer = getattr(first, name)
        layer.register_forward_hook(
            lambda module, inputs, output, name=name: projected.update({name: output})
        )
    with apply(model, VisualInContext(items=InContextRoles.stacked(3)), backend="cpu", layers=6):
        run(model, call)
    (rest, part) = [c for c in calls if c[4].get("out") is not None]
    assert rest[0].shape[0] == 8 and rest[3] is None
    q, keys, values, control, options = part
    assert isinstance(keys, list) and len(keys) == 3 and control.keys.total == 3 * q.shape[1]
    assert {t.data_ptr() for t in keys} == {projected["to_k"].data_ptr()}
    assert {t.data_ptr() for t in values} == {projected["to_v"].data_ptr()}
    assert [i.tolist() for i in options["source"]["k"]] == [[0], [2], [4]]
    assert [i.tolist() for i in options["source"]["v"]] == [[1], [3], [5]]
    assert options["source"]["q"].tolist() == [6] and options["out"].shape[0] == 1


@pytest.mark.slow
@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's peak of resident memory"
)
def test_process_needs_no_memory_for_a_map() -> None:
    """Three pairs at 4,096 tokens, whose map of one head is 192 MiB.

    Slow: test_flux_memory.py measures the same operator in the same way; contrast's two sweeps over joined
    keys are new here.
    """
    forms = ("plain", "clipped", "unclipped", "eager")
    # glibc returns at once what is freed.
    limits = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    # Not from the root, whose `integrations` is the package's.
    path = os.pathsep.join(p for p in sys.path if p and not Path(p, "integrations", "__init__.py").exists())
    done = subprocess.run(
        [sys.executable, "-m", "integrations.methods.peak_memory", *forms],
        cwd=Path(__file__).parents[2],
        text=True,
        env=os.environ | limits | {"PYTHONPATH": path},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    plain, clipped, unclipped, eager = map(int, done.stdout.split())
    the_map = 4 * 4096 * 3 * 4096
    assert clipped - plain <= 0.02 * the_map
    assert unclipped - plain <= 0.02 * the_map
    assert eager - plain > the_map  # the measurement would see a map


def test_equal_knobs_share_one_plan() -> None:
    layer = Layer(3, "self", "up", 4, 8, 0, 64, 4, (8, 8))
    assert VisualInContext().plan(layer, Step(0)) is VisualInContext().plan(layer, Step(1))


def test_statistics_have_the_mass_of_each_pair() -> None:
    """Statistics hold the mass of each pair before the contrast."""
    model = tiny_unet()
    call = unet_call(model, batch=8)
    with apply(model, VisualInContext(), stats=("mass", "lse")) as handle:
        run(model, call)
        records = handle.stats
    assert [record.layer for record in records] == [*UP_16, *UP_64]
    for record in records:
        tokens = 16 if record.layer in UP_16 else 64
        assert record.items == (7,) and record.stats.lse.shape == (1, 4, tokens, 1)
        assert record.stats.mass.shape == (1, 4, 1, 3) and float(record.stats.mass.std()) > 0
        torch.testing.assert_close(record.stats.mass.sum(3), torch.full((1, 4, 1), float(tokens)))


def test_compiled_model_matches_eager() -> None:
    torch._dynamo.reset()
    model = tiny_unet()
    call = unet_call(model, batch=5)
    method = VisualInContext(items=SWAP)
    expected = run_eagerly(model, call, reading(eager(*SWAP)), up)
    compiled = torch.compile(model, backend="eager")
    with apply(compiled, method), torch.no_grad():
        assert relative(compiled(**call).sample, expected) <= TOLERANCE
    torch._dynamo.reset()


def test_plan_made_in_inference_mode_has_gradients() -> None:
    model = tiny_unet().requires_grad_(False)
    call = unet_call(model, batch=4)
    with apply(model, VisualInContext(temperature=0.37), backend="reference"):
        with torch.inference_mode():
            model(**call)
        call["sample"].requires_grad_(True)
        model(**call).sample[3].square().sum().backward()
    assert all(float(call["sample"].grad[n].abs().max()) > 0 for n in range(4))


def test_gradients_exist_on_the_reference_backend_only() -> None:
    model = tiny_unet().requires_grad_(False)
    call = unet_call(model, batch=4)
    roles = ONE

    def gradient(context) -> Tensor:
        call["sample"].requires_grad_(True)
        with context:
            loss = model(**call).sample[roles.prediction].square().sum()
        (grad,) = torch.autograd.grad(loss, call["sample"])
        return grad

    mine = gradient(apply(model, VisualInContext(), backend="reference"))
    # The prediction depends on its own latents in plain layers, on the others' in controlled ones.
    assert all(float(mine[n].abs().max()) > 0 for n in range(4))
    step = torch.zeros_like(mine)
    step[1] = torch.randn(step[1].shape, generator=torch.Generator().manual_seed(4)) * 1e-2
    expected = []
    for sign in (1, -1):
        moved = call | {"sample": (call["sample"] + sign * step).detach()}
        expected.append(run_eagerly(model, moved, reading(eager(roles)), up)[3].square().sum())
    torch.testing.assert_close((mine * step).sum(), (expected[0] - expected[1]) / 2, rtol=2e-2, atol=0)
    with pytest.raises(TypeError, match="contrast"):
        gradient(apply(model, VisualInContext()))


# Errors


@pytest.mark.parametrize(
    ("knob", "match"),
    [
        ({"temperature": 0}, "^temperature: "),
        ({"temperature": float("inf")}, "^temperature: "),
        ({"temperature": True}, "^temperature: "),
        ({"contrast": float("nan")}, "^contrast: "),
        ({"contrast": "strong"}, "^contrast: "),
        ({"clip": (1, 0)}, "clip: "),
        ({"clip": 1.0}, "clip: "),
        ({"places": "side"}, "^places: .*side"),
        ({"places": ()}, "^places: "),
        ({"places": 3}, "^places: "),
        ({"resolutions": ()}, "^resolutions: "),
        ({"resolutions": (0,)}, "^resolutions: "),
        ({"resolutions": "64"}, "^resolutions: "),
        ({"resolutions": ((8, 8, 8),)}, "^resolutions: "),
        ({"steps": (3, 2)}, "^steps: "),
        ({"steps": (-1, 2)}, "^steps: "),
        ({"steps": 4}, "^steps: "),
        ({"items": ()}, "^items: "),
        ({"items": 3}, "^items: "),
        ({"items": ((0, 1), 2, 3)}, "^items: "),
        ({"items": (ONE, THREE)}, "^items: .*equally many pairs"),
    ],
    ids=str,
)
def test_wrong_knob_raises(knob: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        VisualInContext(**knob)
    method = VisualInContext()
    ((name, value),) = knob.items()
    with pytest.raises(ValueError, match=match):
        setattr(method, name, value)
    assert method == VisualInContext()


@pytest.mark.parametrize("prompts", [(), (0, 1), ((0, 1, 2),)], ids=str)
def test_wrong_pairs_raise(prompts: tuple) -> None:
    with pytest.raises(ValueError, match=r"^prompts: "):
        InContextRoles(prompts, 2, 3)


@pytest.mark.parametrize("count", ["prompts", "repeats"])
def test_wrong_stack_raises(count: str) -> None:
    with pytest.raises(ValueError, match=f"^{count}: "):
        InContextRoles.stacked(**{count: 0})


@pytest.mark.parametrize(
    ("items", "batch", "match"),
    [
        (None, 5, "5 items"),
        (None, 2, "2 items"),
        (ONE, 3, "items below the batch of 3"),
        (InContextRoles(((0, 9),), 1, 2), 4, r"Part\.source\['v'\].*0\.\.3"),
        ((ONE, ONE), 4, "different batch items"),
    ],
)
def test_batch_that_does_not_fit_raises(items, batch: int, match: str) -> None:
    model = tiny_unet()
    with apply(model, VisualInContext(items=items)), pytest.raises(ValueError, match=match):
        run(model, unet_call(model, batch=batch))


def test_model_without_unet_self_attention_raises() -> None:
    flux = tiny_flux()
    with apply(flux, VisualInContext()), pytest.raises(ValueError, match="'double'"):
        flux_forward(flux, tiny_call(flux, batch=4))
    from ..diffusers.tiny_images import ADDED, sd3_call

    for model, call in (
        (tiny_sd3(), sd3_call(batch=4)),
        (unet := tiny_unet(ADDED), unet_call(unet, batch=4)),
    ):
        with apply(model, VisualInContext()), pytest.raises(ValueError, match="self-attention of a UNet"):
            model(**call)
