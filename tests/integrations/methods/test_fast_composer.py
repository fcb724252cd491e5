"""FastComposer's loss, fusion and schedule against eager implementations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flashbrush.integrations import FastComposer
from flashbrush.integrations.diffusers import Step, apply
from flashbrush.integrations.methods.fast_composer import Fusion, condition

from ..diffusers.tiny_images import sd3_call, tiny_sd3, tiny_unet, unet_call
from ..tiny import relative
from .eager import LargestTensor, Site, attend, eagerly, run

TOLERANCE = 1e-5  # float32, relative to the largest value
TOKENS = torch.tensor([[1, 3], [2, -1]])
# The tiny UNet's stages in order: down 8 x 8, down 4 x 4, middle, up 4 x 4, up 8 x 8
INNER = ("down_blocks.1", "mid_block", "up_blocks.0")


def masks(side: int = 32) -> Tensor:
    x = torch.linspace(0, 1, side)
    left, top = (x < 0.4).float().expand(side, side), (x > 0.55).float()[:, None].expand(side, side)
    return torch.stack([torch.stack([left, top]), torch.stack([top, left])])


class EagerLocalisation:
    """Plain attention that keeps the maps of cross-attention."""

    def __init__(self) -> None:
        self.maps: dict[str, Tensor] = {}

    def __call__(self, site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if site.cross:
            self.maps[site.name] = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1)
        return attend(q, k, v)

    def loss(self, prefixes: tuple[str, ...], tokens: Tensor = TOKENS, weight: float = 1e-3) -> Tensor:
        of_layers = []
        for name, maps in self.maps.items():
            if not name.startswith(prefixes):
                continue
            side, terms = int(maps.shape[2] ** 0.5), []
            small = F.interpolate(masks(), (side, side), mode="bilinear", antialias=True).flatten(2)
            for n in range(2):
                for s in range(2):
                    if tokens[n, s] >= 0:
                        column, fg = maps[n, :, :, tokens[n, s]], small[n, s]
                        bg = 1 - fg
                        terms += list((column * bg).sum(1) / bg.sum() - (column * fg).sum(1) / fg.sum())
            of_layers.append(torch.stack(terms).mean())
        return weight * torch.stack(of_layers).mean()


def unet() -> tuple[Any, dict]:
    model = tiny_unet()
    return model, unet_call(model)


@pytest.mark.parametrize(
    ("stages", "prefixes"),
    [
        (5, ("down", "mid", "up")),
        (3, INNER),
        (1, ("mid",)),
        (4, ("down", "mid", "up")),
        (None, ("down", "mid", "up")),
    ],
)
def test_loss_matches_eager(stages, prefixes) -> None:
    model, call = unet()
    core, method = EagerLocalisation(), FastComposer(TOKENS, masks(), stages=stages)
    with torch.no_grad(), eagerly(model, core):
        expected = model(**call).sample
    with apply(model, method):
        out = run(model, call)
    assert relative(out, expected) <= TOLERANCE  # the attention is plain
    assert relative(method.loss(), core.loss(prefixes)) <= TOLERANCE


def test_gradient_matches_eager() -> None:
    """In the keys' projections, and through the whole softmax in earlier layers, where roundings add up."""
    model, call = unet()
    core, method = EagerLocalisation(), FastComposer(TOKENS, masks(), weight=1.0, stages=3)
    wanted = [
        model.get_submodule(f"{block}.attentions.0.transformer_blocks.0.attn2").to_k.weight for block in INNER
    ]
    wanted += [model.conv_in.weight]
    with eagerly(model, core):
        model(**call)
        expected = torch.autograd.grad(core.loss(INNER, weight=1.0), wanted)
    with apply(model, method):
        model(**call)
        mine = torch.autograd.grad(method.loss(), wanted)
    assert all(
        relative(a, b) <= 5 * TOLERANCE and float(b.abs().max()) > 1e-3
        for a, b in zip(mine, expected, strict=True)
    )


def test_training_matches_eager_and_lowers_the_loss() -> None:
    """Four steps of gradient descent on the text's embeddings."""
    model, call = unet()
    model.requires_grad_(False)
    method, losses = FastComposer(TOKENS, masks(), weight=1.0), {}
    for form in ("mine", "eager"):
        text, losses[form] = call["encoder_hidden_states"].clone(), []
        for _ in range(4):
            text.requires_grad_(True)
            core = EagerLocalisation()
            with apply(model, method) if form == "mine" else eagerly(model, core):
                model(**(call | {"encoder_hidden_states": text}))
                loss = method.loss() if form == "mine" else core.loss(("down", "mid", "up"), weight=1.0)
                (gradient,) = torch.autograd.grad(loss, text)
            losses[form].append(loss.detach())
            text = (text - gradient).detach()
    mine, theirs = (torch.stack(losses[form]) for form in ("mine", "eager"))
    assert relative(mine, theirs) <= TOLERANCE and float(mine[-1]) < float(mine[0])


def test_each_knob_changes_the_loss() -> None:
    model, call = unet()
    method, seen = FastComposer(TOKENS, masks()), []
    with apply(model, method):
        for change in (
            {},
            {"weight": 2e-3},
            {"tokens": TOKENS.flip(0)},
            {"masks": masks().flip(1)},
            {"stages": 1},
        ):
            for name, value in change.items():
                setattr(method, name, value)
            run(model, call)
            seen.append(float(method.loss()))
        assert seen[1] == pytest.approx(2 * seen[0]) and len({round(abs(x), 9) for x in seen}) == 5
        method.weight = 0.0
        run(model, call)
        assert float(method.loss()) == 0
        method.weight, method.tokens = 1.0, torch.full((2, 2), -1)
        run(model, call)
        assert float(method.loss()) == 0


def test_makes_no_attention_map() -> None:
    model = tiny_unet(attention_head_dim=1)
    call = unet_call(model, batch=1, side=(64, 64), text=1024)
    with apply(model, FastComposer(TOKENS[:1], masks()[:1], stages=None)), LargestTensor() as largest:
        run(model, call)
    assert largest.elements < 4096 * 1024


def test_fusion_matches_eager() -> None:
    torch.manual_seed(0)
    fusion = Fusion(6)
    with torch.no_grad():
        for parameter in fusion.parameters():
            parameter.copy_(torch.randn_like(parameter))
    text, images = torch.randn(2, 5, 6), torch.randn(2, 2, 6)
    out = fusion(text, images, TOKENS)

    def mlp(module: Any, x: Tensor) -> Tensor:
        norm, first, _, second = module
        x = F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias) @ first.weight.T + first.bias
        return F.gelu(x) @ second.weight.T + second.bias

    expected = text.clone()
    for n, s in ((0, 0), (0, 1), (1, 0)):
        e = text[n, TOKENS[n, s]]
        x = mlp(fusion.mlp1, torch.cat([e, images[n, s]])) + e
        x = x + mlp(fusion.mlp2, x)
        expected[n, TOKENS[n, s]] = F.layer_norm(x, (6,), fusion.layer_norm.weight, fusion.layer_norm.bias)
    torch.testing.assert_close(out, expected)
    assert torch.equal(out[1, [0, 1, 3, 4]], text[1, [0, 1, 3, 4]])
    assert all(
        p.grad is not None for p in fusion.parameters() if out.sum().backward(retain_graph=True) is None
    )


def test_condition_switches_to_the_subject_after_its_share() -> None:
    text, augmented = torch.zeros(1), torch.ones(1)
    chosen = [float(condition(Step(i, 10), text, augmented)) for i in range(10)]
    assert chosen == [0, 0, 0, 0, 1, 1, 1, 1, 1, 1]
    assert [float(condition(Step(i, 4), text, augmented, 0.5)) for i in range(4)] == [0, 0, 0, 1]
    assert [float(condition(Step(i, 4), text, augmented, 1.0)) for i in range(2)] == [0, 1]
    for step, alpha in ((Step(0), 0.7), (Step(0, 4), 1.2)):
        with pytest.raises(ValueError, match="condition: "):
            condition(step, text, augmented, alpha)


@pytest.mark.parametrize(
    ("knob", "match"),
    [
        ({"tokens": TOKENS.float()}, "^tokens: "),
        ({"tokens": TOKENS[0]}, "^tokens: "),
        ({"masks": masks()[0]}, "^masks: "),
        ({"masks": 2 * masks()}, "^masks: "),
        ({"weight": -1.0}, "^weight: "),
        ({"stages": 0}, "^stages: "),
    ],
)
def test_wrong_knob_raises(knob: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        FastComposer(**({"tokens": TOKENS, "masks": masks()} | knob))


def test_call_that_does_not_fit_raises() -> None:
    model, call = unet()
    with apply(model, FastComposer(TOKENS[:1], masks())), pytest.raises(ValueError, match=r"^tokens: "):
        run(model, call)
    twice = FastComposer(TOKENS.repeat(2, 1), masks().repeat(2, 1, 1, 1))
    with apply(model, twice), pytest.raises(ValueError, match=r"^tokens: "):
        run(model, call)
    sd3 = tiny_sd3()
    with apply(sd3, FastComposer(TOKENS, masks())), pytest.raises(ValueError, match="'joint'"):
        run(sd3, sd3_call())
    with pytest.raises(RuntimeError, match="no layer was read"):
        FastComposer(TOKENS, masks()).loss()
