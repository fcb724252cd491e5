"""AttentionMaps against maps written out by hand, in each host."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flashbrush.integrations import AttentionMaps, InContextBrush
from flashbrush.integrations.diffusers import apply, compose
from support.rounding import exact_and_error

from ..diffusers.tiny_images import SIDE, sd3_call, tiny_sd3, tiny_unet, unet_call
from ..tiny import COLUMNS, ROWS, TEXT, forward, in_double, relative, tiny_call, tiny_flux

TOLERANCE = 1e-5


def test_word_maps_of_a_unet_match_eager() -> None:
    model = tiny_unet()
    call = unet_call(model)
    maps = AttentionMaps(text={"cat": [1, 2], "dog": [4]}, layers=["cross"])

    def eager(model: Any, call: dict) -> list[Tensor]:
        """The output, then the maps."""
        found: list[Tensor] = []

        def record(attn: Any, args: Any, kwargs: Any) -> None:
            q, k = attn.to_q(args[0]), attn.to_k(kwargs["encoder_hidden_states"])
            q, k = (t.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for t in (q, k))
            prob = torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), -1)
            found.append(torch.stack([prob[..., [1, 2]].sum(-1), prob[..., 4]], 2))

        hooks = [
            module.register_forward_pre_hook(record, with_kwargs=True)
            for name, module in model.named_modules()
            if name.endswith("attn2")
        ]
        with torch.no_grad():
            out = model(**call, return_dict=False)[0]
        for hook in hooks:
            hook.remove()
        return [out, *found]

    wide = in_double(model, call)
    exact, rounding = exact_and_error(lambda: eager(*wide))
    with apply(model, maps), torch.no_grad():
        out = model(**call, return_dict=False)[0]
    got = [out, *(m.values for m in maps.maps)]
    for mine, truth, error in zip(got, exact, rounding, strict=True):  # the error grows with the layer
        assert relative(mine.double(), truth) <= 3 * error
    means = [t.mean(1).unflatten(-1, m.grid) for t, m in zip(exact[1:], maps.maps, strict=True)]
    resized = [F.interpolate(t, (SIDE, SIDE), mode="bilinear") for t in means]
    mean = torch.stack(list(maps.mean().values()), 1).double()
    assert relative(mean, torch.stack(resized).mean(0)) <= 3 * max(rounding)


@pytest.mark.parametrize("kind", ["double", "single"])
def test_maps_of_all_keys_of_flux_sum_to_one(kind: str) -> None:
    """Maps of all keys are the whole map, whose rows sum to one."""
    model = tiny_flux()
    call = tiny_call(model, batch=2)
    words = {f"word {n}": [n] for n in range(TEXT)}
    maps = AttentionMaps(text=words, image={"upper": range(12), "lower": range(12, 24)}, layers=[kind])
    with apply(model, maps) as handle:
        handle.grid = (ROWS, COLUMNS)
        forward(model, call)
    assert {m.kind for m in maps.maps} == {kind}
    for seen in maps.maps:
        assert seen.values.shape == (2, 4, TEXT + 2, ROWS * COLUMNS) and seen.grid == (ROWS, COLUMNS)
        torch.testing.assert_close(seen.values.sum(2), torch.ones(2, 4, ROWS * COLUMNS))
        assert float(seen.values.std(2).mean()) > 0.01


def test_composition_does_not_change_the_other_method_or_the_maps() -> None:
    model = tiny_flux()
    call = tiny_call(model)
    maps, alone = AttentionMaps(text={"word": [2]}, steps=(1, None)), AttentionMaps(text={"word": [2]})
    with apply(model, alone, layers=0) as handle:
        handle.grid = (ROWS, COLUMNS)
        forward(model, call)
    with apply(model, InContextBrush()):
        brushed = forward(model, call)
    with apply(model, compose(InContextBrush(), maps)) as handle:
        handle.grid = (ROWS, COLUMNS)
        forward(model, call)
        assert not maps.maps
        assert relative(forward(model, call), brushed) <= TOLERANCE
    assert len(maps.maps) == 4 and {m.step for m in maps.maps} == {1}
    # The first layer's input is the same with and without the brush.
    assert relative(maps.maps[0].values, alone.maps[0].values) <= TOLERANCE


def test_mean_skips_layers_without_the_name() -> None:
    model = tiny_unet()
    maps = AttentionMaps(text={"word": [0]}, image={"corner": [0, 1]})
    with apply(model, maps, layers=[0, 1]), torch.no_grad():
        model(**unet_call(model))
    first, second = maps.maps
    assert (first.kind, second.kind) == ("self", "cross")
    assert bool(first.values[:, :, 0].isnan().all()) and bool(second.values[:, :, 1].isnan().all())
    mean = maps.mean()
    assert relative(mean["word"], second.values[:, :, 0].mean(1).unflatten(-1, second.grid)) <= TOLERANCE
    assert relative(mean["corner"], first.values[:, :, 1].mean(1).unflatten(-1, first.grid)) <= TOLERANCE


def test_maps_of_all_keys_of_sd3_sum_to_one() -> None:
    model, call = tiny_sd3(), sd3_call()
    maps = AttentionMaps(text={"text": range(5)}, image={"image": range(16)})
    with apply(model, maps), torch.no_grad():
        model(**call)
    for seen in maps.maps:
        torch.testing.assert_close(seen.values.sum(2), torch.ones(2, 4, 16))


def test_wrong_knob_or_call_raises() -> None:
    for fields, match in (
        ({"text": {"cat": []}}, r"text\['cat'\]: expected positions"),
        ({"text": {"cat": [1]}, "image": {"cat": [1]}}, "image: expected other names"),
        ({"steps": 3}, "steps: expected"),
    ):
        with pytest.raises(ValueError, match=match):
            AttentionMaps(**fields)
    model = tiny_flux()
    with apply(model, AttentionMaps(text={"cat": [TEXT]})) as handle:
        handle.grid = (ROWS, COLUMNS)
        with pytest.raises(ValueError, match=r"text\['cat'\]: expected positions below the 7 text tokens"):
            forward(model, tiny_call(model))
    with apply(model, AttentionMaps(text={"cat": [0]})), pytest.raises(ValueError, match=r"set handle\.grid"):
        forward(model, tiny_call(model))
    with pytest.raises(RuntimeError, match="nothing was recorded"):
        AttentionMaps(text={"cat": [0]}).mean()
