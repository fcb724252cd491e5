"""KV-Edit against an eager implementation with all keys, joined and masked row by row."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

import flashbrush as fb
from flashbrush.integrations import KVEdit
from flashbrush.integrations.diffusers import Layer, Step, apply
from flashbrush.integrations.methods import kv_edit

from ..tiny import COLUMNS, ROWS, TEXT, forward, relative, tiny_call, tiny_flux
from .eager import FluxCore, Rope, Site, attend, eagerly, rotate, sample_euler, worst_layer

TOLERANCE = 1e-5  # float32, relative to the largest output
TIMES = (0.8, 0.55, 0.3, 0.0)
MASK = torch.zeros(ROWS, COLUMNS, dtype=torch.bool)
MASK[1:4, 1:3] = MASK[4, 0] = True
MASK = MASK.flatten()
TOKENS = MASK.nonzero()[:, 0]


@dataclasses.dataclass
class EagerEdit(FluxCore):
    """An inversion keeps k before RoPE; an edit overwrites masked tokens, rotates all and adds the bias."""

    mask: Tensor
    scale: float = 1.0
    masked: bool = False
    editing: bool = False
    time: float = 0.0
    kept: dict = dataclasses.field(default_factory=dict)

    def attend(self, site: Site, q: Tensor, k: Tensor, v: Tensor, rope: Rope | None) -> Tensor:
        key = site.index, self.time
        if not self.editing:
            self.kept[key] = k[:, :, TEXT:].clone(), v[:, :, TEXT:].clone(), rope
            bias = torch.zeros(TEXT + len(self.mask), TEXT + len(self.mask))
            if self.masked:
                inside = torch.cat([torch.zeros(TEXT, dtype=torch.bool), self.mask])
                image = torch.arange(len(bias)) >= TEXT
                bias[(image & inside)[:, None] & (image & ~inside)] = -math.inf
                bias[(image & ~inside)[:, None] & (image & inside)] = -math.inf
            return attend(rotate(q, rope), rotate(k, rope), v, bias)
        image_k, image_v, all_ids = self.kept[key]
        image_k, image_v = image_k.clone(), image_v.clone()
        image_k[:, :, self.mask], image_v[:, :, self.mask] = k[:, :, TEXT:], v[:, :, TEXT:]
        joined_k = rotate(torch.cat([k[:, :, :TEXT], image_k], 2), all_ids)
        bias = torch.cat([torch.zeros(TEXT), torch.where(self.mask, 0.0, self.scale)])
        return attend(rotate(q, rope), joined_k, torch.cat([v[:, :, :TEXT], image_v], 2), bias)


def photo() -> Tensor:
    return torch.randn(1, ROWS * COLUMNS, 8, generator=torch.Generator().manual_seed(5))


def edit_call(call: dict[str, Tensor], tokens: Tensor = TOKENS) -> dict[str, Tensor]:
    """The call with another prompt and only the masked tokens."""
    text = torch.randn(1, TEXT, 16, generator=torch.Generator().manual_seed(6))
    return call | {
        "encoder_hidden_states": text,
        "img_ids": call["img_ids"][tokens],
        "hidden_states": call["hidden_states"][:, tokens],
    }


def latent_mask() -> Tensor:
    """A mask of the latents (image tokens, 8), which keeps a quarter of each masked token."""
    return MASK[:, None] & (torch.arange(8) % 4 != 3)


def ours(model, method: KVEdit, mask: Tensor = MASK) -> tuple[list[Tensor], list[Tensor]]:
    """(the inversion's latents by rising time, the edit's by falling one)"""
    call = tiny_call(model)
    with apply(model, method) as handle:
        up = list(sample_euler(model, call, photo(), TIMES[::-1]))
        method.phase = "edit"
        handle.reset()

        def before(step: int, latents: Tensor) -> Tensor:
            return kv_edit.reblend(
                latents, up[len(TIMES) - 1 - step], latent_mask() & mask[:, None], method.tokens
            )

        start = up[-1][:, method.tokens]
        down = list(sample_euler(model, edit_call(call, method.tokens), start, TIMES, before))
    return up, [*down, kv_edit.paste(photo(), down[-1], method.tokens)]


def theirs(model, core: EagerEdit) -> tuple[list[Tensor], list[Tensor]]:
    call, tokens = tiny_call(model), core.mask.nonzero()[:, 0]
    with eagerly(model, core):

        def upper(step: int, latents: Tensor) -> Tensor:
            core.time = TIMES[::-1][step + 1]
            return latents

        up = list(sample_euler(model, call, photo(), TIMES[::-1], upper))
        core.editing = True

        def before(step: int, latents: Tensor) -> Tensor:
            core.time = TIMES[step]
            latents, source = latents.clone(), up[::-1][step][:, tokens]
            kept = ~latent_mask()[tokens]
            latents[:, kept] = source[:, kept]
            return latents

        down = list(sample_euler(model, edit_call(call, tokens), up[-1][:, tokens], TIMES, before))
    final = photo()
    final[:, core.mask] = down[-1]
    return up, [*down, final]


KNOBS = {"released": {}, "stronger": {"attn_scale": 2.5}, "masked inversion": {"masked_inversion": True}}


@pytest.mark.parametrize("knobs", KNOBS)
def test_run_matches_eager(knobs: str) -> None:
    model, given = tiny_flux(), KNOBS[knobs]
    core = EagerEdit(MASK, given.get("attn_scale", 1.0), given.get("masked_inversion", False))
    for mine, expected in zip(ours(model, KVEdit(MASK, TIMES, **given)), theirs(model, core), strict=True):
        assert len(mine) == len(expected) >= len(TIMES)
        for a, b in zip(mine, expected, strict=True):
            assert relative(a, b) <= TOLERANCE


@pytest.mark.parametrize("masked", [False, True])
def test_every_layer_matches_eager(masked: bool) -> None:
    model = tiny_flux()
    call, core = tiny_call(model), EagerEdit(MASK, 0.7, masked, time=TIMES[-2])
    method = KVEdit(MASK, TIMES, attn_scale=0.7, masked_inversion=masked)
    with apply(model, method) as handle:
        assert worst_layer(model, call, core) <= TOLERANCE
        core.editing, method.phase = True, "edit"
        handle.set_step(2)
        assert worst_layer(model, edit_call(call), core) <= TOLERANCE


def test_edit_computes_text_and_masked_rows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """An edit attends with (text + masked) rows to (text + image) keys; kept keys are read in place."""
    seen: list[tuple[Tensor, list[Tensor]]] = []

    def spy(q, k, v, control=None, **options):
        seen.append((q, k if isinstance(k, list) else [k]))
        return fb.attention(q, k, v, control, **options)

    model = tiny_flux()
    call, method = tiny_call(model), KVEdit(MASK, TIMES)
    with apply(model, method) as handle:
        forward(model, call)
        method.phase = "edit"
        handle.set_step(2)
        monkeypatch.setattr("flashbrush.integrations.diffusers.protocol.plan_call.attention", spy)
        forward(model, edit_call(call))
    rows, image = TEXT + len(TOKENS), ROWS * COLUMNS
    assert [(q.shape[1], sum(t.shape[1] for t in k)) for q, k in seen] == [(rows, TEXT + image)] * 4
    for (_, keys), (k, _, _) in zip(seen, method.kept.values(), strict=True):
        assert keys[-1].data_ptr() == k.data_ptr() and keys[-1].shape[1] == image - len(TOKENS)


@pytest.mark.parametrize(
    "knob", [{"attn_scale": 0.5}, {"masked_inversion": True}, {"keep_dtype": torch.bfloat16}], ids=str
)
def test_each_knob_changes_the_output(knob: dict) -> None:
    model = tiny_flux()
    before = ours(model, KVEdit(MASK, TIMES))[1][-1]
    after = ours(model, KVEdit(MASK, TIMES, **knob))[1][-1]
    assert relative(after, before) > 10 * TOLERANCE
    assert torch.equal(after[:, ~MASK], photo()[:, ~MASK])


def test_keys_are_kept_in_the_given_dtype_and_device() -> None:
    model = tiny_flux()
    method = KVEdit(MASK, TIMES, keep_dtype=torch.bfloat16, keep_device="cpu")
    ours(model, method)
    assert len(method.kept) == 3 * 4 and {time for time, _ in method.kept} == set(TIMES[:-1])
    assert all(
        k.dtype == v.dtype == torch.bfloat16 and not k.requires_grad for k, v, _ in method.kept.values()
    )


def test_neutral_knobs_are_plain_attention() -> None:
    """With attn_scale 0, an edit of the inversion's own tokens at the same time is the plain model."""
    model = tiny_flux()
    call = tiny_call(model)
    plain = forward(model, call)
    with apply(model, method := KVEdit(MASK, TIMES, attn_scale=0)) as handle:
        assert relative(forward(model, call), plain) <= TOLERANCE
        method.phase = "edit"
        handle.set_step(2)
        gathered = {"hidden_states": call["hidden_states"][:, TOKENS], "img_ids": call["img_ids"][TOKENS]}
        out = forward(model, call | gathered)
        assert relative(out, plain[:, TOKENS]) <= TOLERANCE
        method.attn_scale = 1.0
        assert relative(forward(model, call | gathered), out) > 100 * TOLERANCE


def test_edit_of_all_tokens_is_plain_attention() -> None:
    model = tiny_flux()
    call, method = tiny_call(model), KVEdit(torch.ones_like(MASK), TIMES)
    plain = forward(model, call)
    with apply(model, method) as handle:
        forward(model, call)
        method.phase = "edit"
        handle.set_step(2)
        assert relative(forward(model, call), plain) <= TOLERANCE


def test_new_mask_reuses_the_inversion() -> None:
    model = tiny_flux()
    other = MASK.roll(5)
    expected = ours(model, KVEdit(other, TIMES))[1]
    method = KVEdit(MASK, TIMES)
    up = ours(model, method)[0]
    method.mask = other
    call = tiny_call(model)

    def before(step: int, latents: Tensor) -> Tensor:
        return kv_edit.reblend(
            latents, up[len(TIMES) - 1 - step], latent_mask() & other[:, None], method.tokens
        )

    with apply(model, method):
        start = up[-1][:, method.tokens]
        for mine, theirs in zip(
            sample_euler(model, edit_call(call, method.tokens), start, TIMES, before), expected, strict=False
        ):
            assert torch.equal(mine, theirs)


def test_replaced_method_keeps_nothing() -> None:
    """Kept keys are in the order of their mask."""
    model = tiny_flux()
    ours(model, method := KVEdit(MASK, TIMES))
    other = dataclasses.replace(method, mask=MASK.roll(5), phase="edit")
    assert method.kept and not other.kept


def test_batch_of_edits_matches_single_edits() -> None:
    model = tiny_flux()
    call, method = tiny_call(model), KVEdit(MASK, TIMES)
    with apply(model, method) as handle:
        forward(model, call)
        method.phase = "edit"
        handle.set_step(2)
        singles = [edit_call(call), edit_call(call) | {"encoder_hidden_states": torch.ones(1, TEXT, 16)}]
        alone = torch.cat([forward(model, single) for single in singles])
        names = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")
        joint = singles[0] | {name: torch.cat([single[name] for single in singles]) for name in names}
        assert relative(forward(model, joint), alone) <= TOLERANCE


# Functions beside the method


def test_cache_time_is_the_upper_end_of_the_interval() -> None:
    assert [kv_edit.cache_time(TIMES, i, "edit") for i in range(3)] == [0.8, 0.55, 0.3]
    assert [kv_edit.cache_time(TIMES, i, "invert") for i in range(3)] == [0.3, 0.55, 0.8]


# Errors


@pytest.mark.parametrize(
    ("knob", "value"),
    [
        ("mask", torch.zeros(24, dtype=torch.bool)),
        ("mask", torch.ones(24)),
        ("mask", torch.ones(2, 24).bool()),
        ("times", (0.3, 0.8)),
        ("times", (0.5,)),
        ("times", 3),
        ("phase", "both"),
        ("attn_scale", math.nan),
        ("attn_scale", "1"),
    ],
)
def test_wrong_knob_raises(knob: str, value) -> None:
    with pytest.raises(ValueError, match=f"^{knob}: "):
        KVEdit(**{"mask": MASK, "times": TIMES} | {knob: value})
    method = KVEdit(MASK, TIMES)
    with pytest.raises(ValueError, match=f"^{knob}: "):
        setattr(method, knob, value)
    assert getattr(method, knob) is not value


@pytest.mark.parametrize(
    ("phase", "tokens", "step", "match"),
    [
        ("invert", 23, 0, "^mask: 24 image tokens .* has 23"),
        ("edit", 24, 0, f"^mask: {len(TOKENS)} image tokens .* has 24"),
        ("edit", len(TOKENS), 1, "^phase: nothing is kept for time 0.55 and layer 0"),
        ("invert", 24, 3, "^times: they have 3 steps, got step 3"),
    ],
)
def test_call_that_does_not_fit_raises(phase, tokens: int, step: int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        KVEdit(MASK, TIMES, phase).plan(Layer(0, "double", None, 4, 32, TEXT, tokens), Step(step))


def test_mask_that_does_not_fit_kept_keys_raises() -> None:
    model = tiny_flux(double=1, single=1)
    for knobs, mask, match in (
        ({}, torch.ones(5).bool(), "24 tokens"),
        ({"masked_inversion": True}, ~MASK, "another mask"),
    ):
        method = KVEdit(MASK, TIMES, **knobs)
        with apply(model, method):
            forward(model, tiny_call(model))
        with pytest.raises(ValueError, match=f"^mask: .*{match}"):
            method.mask = mask
