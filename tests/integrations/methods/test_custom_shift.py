"""CustomShift against one attention over image, prompt, references and names, with a one-way mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flashbrush.integrations import CustomShift
from flashbrush.integrations.diffusers import apply
from flashbrush.integrations.methods.custom_shift import guide

from ..diffusers.tiny_images import sd3_call, tiny_sd3, tiny_unet, unet_call
from ..tiny import relative
from .eager import (
    LargestTensor,
    Site,
    attend,
    changed_layers,
    descend,
    plain,
    run,
    run_eagerly,
    sites_of,
    worst_layer,
)

TOLERANCE = 1e-5  # float32, relative to the largest output


class OneWay:
    """A batch [images ; references] run together: for each image one map over all of its tokens."""

    def __init__(self, references: int, items: tuple[int, ...]) -> None:
        self.references, self.items = references, items

    def __call__(self, site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, tokens, text = attend(q, k, v), q.shape[2], site.text_len
        if not text:
            return out
        count = 1 + self.references
        block = torch.arange(count * tokens) // tokens  # 0: image and prompt; k: reference k and its name
        name = torch.arange(count * tokens) % tokens < text
        allowed = (block[:, None] == block) | ((block[:, None] == 0) & (block > 0) & ~name)
        bias = torch.zeros(count * tokens, count * tokens).masked_fill(~allowed, -torch.inf)
        for item in self.items:
            index = [item, *range(len(q) - self.references, len(q))]
            joined = [t[index].transpose(0, 1).flatten(1, 2) for t in (q, k, v)]  # (heads, all tokens, dim)
            together = attend(*joined, bias).unflatten(1, (count, tokens)).transpose(0, 1)
            torch.testing.assert_close(together[1:], out[index[1:]], rtol=1e-4, atol=1e-5)
            out[item] = together[0]
        return out


def calls(batch: int = 3, references: int = 2, seed: int = 5) -> tuple[dict, dict]:
    """Arguments of the model for the image and for the references, which are clean."""
    generator = torch.Generator().manual_seed(seed)
    mine, theirs = sd3_call(batch=batch), sd3_call(batch=references)
    theirs = {n: torch.randn(t.shape, generator=generator) for n, t in theirs.items()}
    theirs["timestep"] = torch.zeros(references)
    return mine, theirs


def remember(method: CustomShift, model: Any, call: dict, which: slice = slice(None)) -> None:
    method.remember(
        model, *(call[n][which] for n in ("hidden_states", "encoder_hidden_states", "pooled_projections"))
    )


def run_together(model: Any, mine: dict, theirs: dict, items: tuple[int, ...]) -> Tensor:
    both = {n: torch.cat([mine[n], theirs[n]]) for n in mine}
    return run_eagerly(model, both, OneWay(len(theirs["timestep"]), items))[: len(mine["timestep"])]


@pytest.mark.parametrize(
    ("settings", "batch", "references", "items"),
    [
        ({}, 3, 2, None),
        ({}, 3, 1, None),
        ({"qk_norm": "rms_norm", "dual": (0,)}, 3, 3, None),
        ({}, 2, 2, (0,)),
        ({}, 1, 2, (0,)),
    ],
    ids=str,
)
def test_matches_one_attention_with_a_one_way_mask(
    settings: dict, batch: int, references: int, items
) -> None:
    model = tiny_sd3(**settings)
    mine, theirs = calls(batch, references)
    expected = run_together(model, mine, theirs, (1, 2) if items is None else items)
    method = CustomShift(items)
    with apply(model, method):
        remember(method, model, theirs)
        out = run(model, mine)
        assert set(changed_layers(model, mine)) == {
            site.name for site in sites_of(model) if site.name.endswith("attn")
        }
    assert relative(out, expected) <= TOLERANCE < 1e-2 < relative(out, run(model, mine))


def test_every_layer_matches_eager() -> None:
    model = tiny_sd3()
    mine, theirs = calls()
    keys: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        image_k, image_v = (t[:, :, site.text_len :].transpose(0, 1).flatten(1, 2) for t in (k, v))
        keys[site.name] = image_k, image_v
        return attend(q, k, v)

    run_eagerly(model, theirs, keep)

    def core(site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attend(q, k, v)
        more = [t.expand(2, -1, -1, -1) for t in keys[site.name]]
        out[1:] = attend(q[1:], torch.cat([k[1:], more[0]], 2), torch.cat([v[1:], more[1]], 2))
        return out

    method = CustomShift()
    with apply(model, method):
        remember(method, model, theirs)
        assert worst_layer(model, mine, core) <= TOLERANCE


def test_run_matches_references_run_at_every_step() -> None:
    """The references run once, not in every step."""
    model = tiny_sd3()
    mine, theirs = calls(1)
    mine = {n: t.expand(3, *t.shape[1:]).clone() for n, t in mine.items()}
    mine["encoder_hidden_states"][:2] = 0
    batches: list[int] = []

    def step(x: Tensor, i: int, form: str) -> Tensor:
        call = mine | {
            "hidden_states": x.expand(3, -1, -1, -1),
            "timestep": torch.full((3,), 900.0 - 300 * i),
        }
        out = run(model, call) if form == "mine" else run_together(model, call, theirs, (1, 2))
        return guide(*out.split(1), scale_references=0.8, scale_prompt=1.2)

    hook = model.register_forward_pre_hook(
        lambda m, a, kw: batches.append(len(kw["hidden_states"])), with_kwargs=True
    )
    method = CustomShift()
    with apply(model, method):
        remember(method, model, theirs)
        out = descend(lambda x, i: step(x, i, "mine"), mine["hidden_states"][:1])
    assert batches == [2, 3, 3, 3]
    hook.remove()
    assert relative(out, descend(lambda x, i: step(x, i, "eager"), mine["hidden_states"][:1])) <= TOLERANCE


def test_remember_adds_and_forget_drops() -> None:
    model = tiny_sd3()
    mine, theirs = calls()
    method, without = CustomShift(), run(model, mine)
    with apply(model, method):
        assert relative(run(model, mine), without) <= TOLERANCE  # without references it is plain
        remember(method, model, theirs)
        at_once = run(model, mine)
        method.forget()
        assert relative(run(model, mine), without) <= TOLERANCE
        remember(method, model, theirs, slice(0, 1))
        one = run(model, mine)
        remember(method, model, theirs, slice(1, 2))
        assert relative(run(model, mine), at_once) <= TOLERANCE < 1e-3 < relative(one, at_once)
        with pytest.raises(AttributeError):
            method.remember(model, theirs["hidden_states"], theirs["encoder_hidden_states"], 3)
        assert relative(run(model, mine), at_once) <= TOLERANCE
        method.items = (0, 1)
        assert relative(run(model, mine), at_once) > 1e-3


def test_guidance_matches_its_formula() -> None:
    neither, references, both = torch.randn(3, 2, 4, 8, 8).unbind()
    g_r, g_p = references - neither, both - references
    n_r, n_p = (g.flatten(1).square().sum(1).sqrt().reshape(2, 1, 1, 1) for g in (g_r, g_p))
    m = torch.minimum(n_r, n_p)
    for norm, base, expected in (
        ("unit", "neither", neither + 7 * g_r / n_r + 7 * g_p / n_p),
        ("least", "neither", neither + 7 * g_r * m / n_r + 7 * g_p * m / n_p),
        ("least", "references", references + 7 * g_r * m / n_r + 7 * g_p * m / n_p),
        ("none", "references", references + 7 * g_r + 7 * g_p),
    ):
        torch.testing.assert_close(guide(neither, references, both, norm=norm, base=base), expected)
    only = guide(neither, references, both, scale_references=1.0, scale_prompt=0.0, norm="none")
    torch.testing.assert_close(only, references)
    assert torch.isfinite(guide(neither, neither, neither)).all()
    for wrong in ({"norm": "l1"}, {"base": "both"}):
        with pytest.raises(ValueError, match="guide: "):
            guide(neither, references, both, **wrong)


def test_makes_no_attention_map() -> None:
    """4,096 tokens read as many of a reference."""
    small = tiny_sd3(layers=1)
    sizes = {"pos_embed_max_size": 64, "sample_size": 128, "num_attention_heads": 1, "attention_head_dim": 32}
    model, method = type(small)(**(dict(small.config) | sizes)).eval(), CustomShift((0,))
    call = sd3_call(batch=1, side=(128, 128))
    with apply(model, method), LargestTensor() as largest:
        remember(method, model, call)
        run(model, call)
    assert largest.elements < 4096**2


@pytest.mark.parametrize("items", [(), (0, 0), (-1,), ("0",)], ids=str)
def test_wrong_items_raise(items) -> None:
    with pytest.raises(ValueError, match=r"^items: "):
        CustomShift(items)


def test_call_that_does_not_fit_raises() -> None:
    model = tiny_sd3()
    mine, theirs = calls(2)
    method = CustomShift()
    with pytest.raises(RuntimeError, match="no layer was read"):
        remember(method, model, theirs)
    with apply(model, method):
        remember(method, model, theirs)
        with pytest.raises(ValueError, match="3 equal parts"):
            run(model, mine)
        method.items = (2,)
        with pytest.raises(ValueError, match="items below the batch of 2"):
            run(model, mine)
    unet = tiny_unet()
    with apply(unet, CustomShift()), pytest.raises(ValueError, match="joint attention of SD 3"):
        run(unet, unet_call(unet))
    assert relative(run_eagerly(model, mine, plain), run(model, mine)) <= TOLERANCE
