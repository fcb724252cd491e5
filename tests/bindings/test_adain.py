"""adain(): inside the mask x gets the style's mean and variance; outside it is unchanged."""

from __future__ import annotations

import pytest
import torch

from flashbrush.bindings.adain import adain


def adain_by_loops(
    x: torch.Tensor, style: torch.Tensor, inside: torch.Tensor, style_inside: torch.Tensor
) -> torch.Tensor:
    """Loops over items and channels in float64."""
    out = x.double().clone()
    for n in range(x.shape[0]):
        m = n if style.shape[0] > 1 else 0
        for c in range(x.shape[1]):
            a, b = x[n, c].double()[inside[n, 0]], style[m, c].double()[style_inside[m, 0]]
            spread = [((t - t.mean()).square().sum() / (len(t) - 1) + 1e-5).sqrt() for t in (a, b)]
            out[n, c][inside[n, 0]] = (a - a.mean()) / spread[0] * spread[1] + b.mean()
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("masked", ["none", "both", "x", "style"])
@pytest.mark.parametrize("items", [1, 2])
def test_equals_loops(dtype: torch.dtype, masked: str, items: int) -> None:
    x = (torch.randn(2, 3, 5, 7, dtype=torch.float64) * 2 + 1).to(dtype)
    style = (torch.randn(items, 3, 4, 6, dtype=torch.float64) / 3 - 2).to(dtype)
    inside, style_inside = (
        torch.ones(2, 1, 5, 7, dtype=torch.bool),
        torch.ones(items, 1, 4, 6, dtype=torch.bool),
    )
    masks = {}
    if masked in ("both", "x"):
        inside = masks["mask"] = torch.rand(2, 1, 5, 7) < 0.5
    if masked in ("both", "style"):
        style_inside = masks["style_mask"] = torch.rand(items, 1, 4, 6) < 0.5
    got = adain(x, style, **masks)
    expected = adain_by_loops(x, style, inside, style_inside)
    assert got.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), expected, rtol=16 * eps, atol=16 * eps)
    outside = ~inside.expand_as(x)
    assert torch.equal(got[outside], x[outside])


def test_variance_is_unbiased_and_eps_is_inside_the_root() -> None:
    """The biased and unbiased deviations of two elements differ by sqrt(2); a constant style shows eps."""
    x = torch.tensor([-1.0, 1.0], dtype=torch.float64).reshape(1, 1, 2)
    flat = torch.full((1, 1, 2), 5.0, dtype=torch.float64)
    step = torch.tensor(1e-5, dtype=torch.float64).sqrt() / torch.tensor(2 + 1e-5, dtype=torch.float64).sqrt()
    torch.testing.assert_close(adain(x, flat), 5 + x * step)


def test_values_outside_a_mask_are_not_read() -> None:
    x, style = torch.randn(1, 2, 4, 4), torch.randn(1, 2, 4, 4)
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    mask[..., :2] = True
    clean = adain(x, style, mask, mask)
    with_nan = torch.where(mask, x, torch.nan), torch.where(mask, style, torch.nan)
    assert torch.equal(adain(*with_nan, mask, mask)[..., :2], clean[..., :2])


def test_style_of_x_itself_changes_nothing() -> None:
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(adain(x, x), x)


GOOD = {"x": torch.randn(2, 3, 4, 5), "style": torch.randn(2, 3, 4, 5)}
BAD = [
    ("x", TypeError, {"x": torch.zeros(2, 3, 4, 5, dtype=torch.int32)}),
    ("x", ValueError, {"x": torch.zeros(2, 3)}),
    ("x", ValueError, {"x": torch.zeros(2, 3, 1, 1)}),
    ("style", TypeError, {"style": GOOD["style"].bfloat16()}),
    ("style", TypeError, {"style": "picture"}),
    ("style", TypeError, {"style": GOOD["style"].to("meta")}),
    ("style", ValueError, {"style": torch.zeros(3, 3, 4, 5)}),
    ("style", ValueError, {"style": torch.zeros(2, 4, 4, 5)}),
    ("mask", TypeError, {"mask": torch.ones(2, 1, 4, 5)}),
    ("mask", ValueError, {"mask": torch.ones(2, 3, 4, 5, dtype=torch.bool)}),
    ("mask", ValueError, {"mask": torch.ones(2, 1, 5, 4, dtype=torch.bool)}),
    ("mask", ValueError, {"mask": torch.zeros(2, 1, 4, 5, dtype=torch.bool)}),
    ("style_mask", ValueError, {"style_mask": torch.ones(3, 1, 4, 5, dtype=torch.bool)}),
]


@pytest.mark.parametrize(
    ("argument", "error", "changed"), BAD, ids=[f"{i}-{b[0]}" for i, b in enumerate(BAD)]
)
def test_bad_calls_name_the_argument(argument: str, error: type[Exception], changed: dict) -> None:
    with pytest.raises(error, match=rf"^{argument}: expected .*got "):
        adain(**{**GOOD, **changed})
