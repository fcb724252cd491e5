"""Cross-image attention against an eager implementation of its formula."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack

import pytest

from flashbrush.integrations import CrossImageAttention, TransferRoles
from flashbrush.integrations.diffusers import Layer, Step, apply

from ..diffusers.tiny_images import tiny_unet, unet_call
from ..tiny import forward as flux_forward, relative, tiny_call, tiny_flux
from .eager import Reader, Site, eagerly, reading, run, run_eagerly, sample_ddim, worst_layer

TOLERANCE = 1e-5  # float32, relative to the largest output
# The tiny UNet's layers on the way up: block 0 has 4 x 4 tokens, block 1 has 8 x 8.
BLOCKS = {4: "up_blocks.0", 8: "up_blocks.1"}
ALWAYS = {4: (0, None), 8: (0, None)}
APPEARANCE, STRUCTURE = (
    Reader(0, 0, (1,), (1,), 1.0, 1.67, (0.0, 1.0)),
    Reader(0, 0, (2,), (2,), 1.0, 1.67, (0.0, 1.0)),
)


def up(site: Site) -> bool:
    return site.is_self and site.name.startswith("up_blocks")


@pytest.mark.parametrize(
    ("knobs", "change"),
    [
        ({}, {}),
        ({"clip": None}, {"clip": None}),
        ({"contrast": 1.2}, {"beta": 1.2}),
        ({"contrast": 1.0}, {"beta": 1.0}),
        ({"clip": (0.0, 0.1)}, {"clip": (0.0, 0.1)}),
        ({"items": TransferRoles(2, 0, 1)}, {"item": 2, "query": 2, "keys": (0,), "values": (0,)}),
    ],
    ids=str,
)
def test_matches_eager(knobs: dict, change: dict) -> None:
    model = tiny_unet()
    call = unet_call(model, batch=3)
    readers = [dataclasses.replace(APPEARANCE, **change)]
    expected = run_eagerly(model, call, reading(*readers), up)
    with apply(model, CrossImageAttention(windows=ALWAYS, lag=0, structure_every=None, **knobs)):
        out = run(model, call)
        assert worst_layer(model, call, reading(*readers), up) <= TOLERANCE
    assert relative(out, expected) <= TOLERANCE
    plain = run(model, call)
    others = [n for n in range(3) if n != readers[0].item]
    assert relative(out[others], plain[others]) <= TOLERANCE
    assert relative(out[readers[0].item], plain[readers[0].item]) > 1e-3


def test_two_outputs_in_a_batch_match_eager() -> None:
    """Each half of a classifier-free guidance has its own three images."""
    model = tiny_unet()
    call = unet_call(model, batch=6)
    readers = [APPEARANCE, dataclasses.replace(APPEARANCE, item=3, query=3, keys=(4,), values=(4,))]
    expected = run_eagerly(model, call, reading(*readers), up)
    method = CrossImageAttention(windows=ALWAYS, lag=0, structure_every=None)
    method.items = (TransferRoles(), TransferRoles(3, 4, 5))
    with apply(model, method):
        assert relative(run(model, call), expected) <= TOLERANCE


def test_run_matches_eager() -> None:
    """Windows per resolution; every other early step reads the structure; the count lags one step."""
    model = tiny_unet()
    call = unet_call(model, batch=3)
    method = CrossImageAttention(windows={4: (1, 4), 8: (2, None)}, structure_every=2, structure_until=4)
    # For each step, whose count is one less: what blocks 0 and 1 read
    schedule = [
        (None, None),
        (None, None),
        (APPEARANCE, None),
        (STRUCTURE, STRUCTURE),
        (APPEARANCE, APPEARANCE),
        (None, APPEARANCE),
        (None, APPEARANCE),
    ]
    switch = ExitStack()

    def start(step: int) -> None:
        switch.close()
        for block, reader in zip(BLOCKS.values(), schedule[step], strict=True):
            if reader is not None:
                switch.enter_context(
                    eagerly(
                        model,
                        reading(reader),
                        lambda site, block=block: site.is_self and site.name.startswith(block),
                    )
                )

    expected = sample_ddim(model, call, len(schedule), start)
    switch.close()
    with apply(model, method):
        out = sample_ddim(model, call, len(schedule))
    assert relative(out, expected) <= TOLERANCE
    assert relative(sample_ddim(model, call, len(schedule))[0], expected[0]) > 1e-3


def reads(method: CrossImageAttention, tokens: int, step: int) -> int | None:
    """The item whose keys and values the output reads in an upsampling layer; None: its own."""
    side = round(tokens**0.5)
    plan = method.plan(Layer(9, "self", "up", 8, 40, 0, tokens, 3, (side, side)), Step(step))
    if plan is None:
        return None
    (part,) = plan.parts
    (k,), (v,) = part.indices("k"), part.indices("v")
    assert part.items == (0,) and k.tolist() == v.tolist() and part.indices("q")[0].tolist() == [0]
    return int(k)


def test_default_schedule_is_the_released_one() -> None:
    """The count lags one step, so layers of 32^2 and 64^2 tokens change from step 11 on."""
    method = CrossImageAttention()
    for tokens, end in ((32**2, 71), (64**2, 91)):
        seen = [reads(method, tokens, step) for step in range(100)]
        assert [i for i, item in enumerate(seen) if item is not None] == list(range(11, end))
        assert [i for i, item in enumerate(seen) if item == 2] == [11, 16, 21, 26, 31, 36]
    assert {reads(method, 16**2, step) for step in range(100)} == {None}


@pytest.mark.parametrize(
    "change",
    [
        {"contrast": 1.3},
        {"clip": None},
        {"windows": {4: (0, None)}},
        {"structure_every": None},
        {"structure_until": 0},
        {"lag": 1},
        {"places": ("up", "mid", "down")},
        {"items": TransferRoles(0, 2, 1)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_each_knob_changes_the_output(change: dict) -> None:
    model = tiny_unet()
    call = unet_call(model, batch=3)
    method = CrossImageAttention(windows=ALWAYS, lag=0)
    with apply(model, method) as handle:
        handle.set_step(0)
        before = run(model, call)
        handle.method = dataclasses.replace(method, **change)
        assert relative(run(model, call), before) > 1e-4


def test_neutral_knobs_are_plain_attention() -> None:
    model = tiny_unet()
    call = unet_call(model, batch=3)
    plain = run(model, call)
    method = CrossImageAttention(contrast=1.0, windows=ALWAYS, lag=0, items=TransferRoles(0, 0, 0))
    with apply(model, method, stats=True) as handle:
        assert relative(run(model, call), plain) <= TOLERANCE
        assert len(handle.stats) == 4


@pytest.mark.parametrize(
    ("knob", "match"),
    [
        ({"contrast": float("inf")}, r"^contrast: "),
        ({"clip": (2, 1)}, r"clip: "),
        ({"windows": {}}, r"^windows: "),
        ({"windows": (10, 70)}, r"^windows: "),
        ({"windows": {0: (10, 70)}}, r"^windows: "),
        ({"windows": {32: 10}}, r"^windows\[32\]: "),
        ({"windows": {32: (70, 10)}}, r"^windows\[32\]: "),
        ({"structure_every": 0}, r"^structure_every: "),
        ({"structure_every": True}, r"^structure_every: "),
        ({"structure_until": -1}, r"^structure_until: "),
        ({"structure_until": 1.5}, r"^structure_until: "),
        ({"lag": -1}, r"^lag: "),
        ({"places": "side"}, r"^places: .*side"),
        ({"items": None}, r"^items: "),
        ({"items": (0, 1, 2)}, r"^items: "),
    ],
    ids=str,
)
def test_wrong_knob_raises(knob: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        CrossImageAttention(**knob)


def test_call_that_does_not_fit_raises() -> None:
    model, flux = tiny_unet(), tiny_flux()
    with (
        apply(model, CrossImageAttention(windows=ALWAYS, lag=0)),
        pytest.raises(ValueError, match=r"source\['k'\]"),
    ):
        run(model, unet_call(model, batch=2))
    with apply(flux, CrossImageAttention()), pytest.raises(ValueError, match="'double'"):
        flux_forward(flux, tiny_call(flux, batch=3))
