"""Running and measuring insertions: seeds, settings and batches."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("diffusers")
pytest.importorskip("skimage")
pytest.importorskip("sklearn")
from flashbrush.integrations.evaluation.insertion.evaluate import Setting, evaluate
from flashbrush.integrations.evaluation.insertion.items import held_out

PANEL = {"width": 64, "height": 64, "steps": 1}


def test_settings_share_their_seeds_and_change_the_picture(pipe) -> None:
    items = held_out(3)
    base = Setting()
    changed = [
        Setting(alpha_prompt=0.9),
        Setting(alpha_subject=0.9),
        Setting(gain_span=0.9),
        Setting(blend=False),
        Setting(alpha_subject=0.9, hole_only=True),
        Setting(grow=2),
        Setting(grow=-2),
    ]
    made = evaluate(
        pipe,
        items,
        [base, *changed],
        options=lambda _: PANEL,
        repeats=2,
        batch=2,
        paste_back=False,
        progress=False,
    )
    assert len(made) == 3 * 2 * 8
    by_key = {(o.setting, o.item.name, o.seed): o for o in made}
    seeds = {(o.item.name, o.seed) for o in made}
    assert seeds == {(item.name, seed + i) for i, item in enumerate(items) for seed in (0, 3)}
    assert {o.kind for o in made} == {"reference"}
    for setting in changed:
        assert any(
            by_key[(setting, *key)].picture.tobytes() != by_key[(base, *key)].picture.tobytes()
            for key in seeds
        ), setting
    alone = evaluate(
        pipe, items[1:2], [base], options=lambda _: PANEL, seed=4, paste_back=False, progress=False
    )
    near = np.asarray(alone[0].picture).astype(int) - np.asarray(by_key[base, items[1].name, 4].picture)
    assert np.abs(near).max() <= 2  # another batch size rounds sums differently
    row = alone[0].row()
    assert (
        row["item"] == items[1].name
        and row["seed"] == 4
        and {"pattern", "psnr_hole", "psnr_outside"} <= set(row)
    )


def test_items_are_batched_by_size(pipe) -> None:
    one, two = held_out(2)
    large = replace(
        two, image=two.image.resize((80, 64)), mask=two.mask.resize((80, 64)), truth=None, coverage=None
    )
    made = evaluate(pipe, [one, large], [Setting()], options=lambda _: {"steps": 1}, progress=False)
    assert [o.picture.size for o in made] == [(64, 64), (80, 64)]
    outside = np.asarray(large.mask) == 0
    assert (np.asarray(made[1].picture)[outside] == np.asarray(large.image)[outside]).all()


def test_masks_grow_and_shrink() -> None:
    mask = Image.new("L", (16, 16))
    mask.paste(255, (6, 6, 10, 10))
    assert Setting(grow=2).mask(mask).getbbox() == (4, 4, 12, 12)
    assert Setting(grow=-1).mask(mask).getbbox() == (7, 7, 9, 9)
    assert Setting().mask(mask) is mask
    with pytest.raises(ValueError, match="grow: nothing is left"):
        Setting(grow=-3).mask(mask)


def test_without_items_or_settings_it_raises(pipe) -> None:
    with pytest.raises(ValueError, match="expected items and settings, got 0 and 1"):
        evaluate(pipe, [], [Setting()], options=lambda _: PANEL)
