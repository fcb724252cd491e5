"""blend_latents(): exact at the ends of sigma and mask, linear between, and hidden values do not leak."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from flashbrush.bindings.blend_latents import blend_latents

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def random_latents(
    dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (2, 6, 8)
) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(shape, dtype=torch.float64).to(dtype) for _ in range(3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sigma_kind", ["number", "tensor", "per item"])
@pytest.mark.parametrize("mask_kind", ["bool", "float"])
def test_sigma_0_and_1_are_bitwise(dtype: torch.dtype, sigma_kind: str, mask_kind: str) -> None:
    generated, source, noise = random_latents(dtype)
    mask = torch.rand(2, 6, 1) < 0.5
    given = mask if mask_kind == "bool" else mask.to(dtype)
    for level, known in ((0.0, source), (1.0, noise)):
        sigma = {"number": level, "tensor": torch.tensor(level), "per item": torch.full((2,), level)}[
            sigma_kind
        ]
        assert torch.equal(
            blend_latents(generated, source, noise, given, sigma), torch.where(mask, generated, known)
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_interpolates_linearly(dtype: torch.dtype) -> None:
    generated, source, noise = random_latents(dtype)
    mask = torch.rand(2, 6, 1).to(dtype)
    mask[:, 0], mask[:, 1] = 0, 1
    wide = [t.double() for t in (generated, source, noise, mask)]
    for sigma in (0.25, torch.tensor([0.125, 0.75])):
        level = sigma.double().reshape(2, 1, 1) if isinstance(sigma, torch.Tensor) else sigma
        expected = wide[3] * wide[0] + (1 - wide[3]) * ((1 - level) * wide[1] + level * wide[2])
        got = blend_latents(generated, source, noise, mask, sigma)
        assert got.dtype == dtype
        # The known part and the mixture are each rounded to the dtype once.
        error = 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(got.double(), expected, rtol=error, atol=error)


@pytest.mark.parametrize("sigma", [0.0, torch.tensor(0.0), torch.zeros(2), 0.5])
def test_hidden_values_do_not_leak_through_the_mask(sigma: float | torch.Tensor) -> None:
    generated, source, noise = random_latents()
    mask = torch.zeros(2, 6, 1)
    mask[:, 3:] = 1
    generated[:, :3], source[:, 3:], noise[:, 3:] = math.nan, math.nan, math.inf
    if not isinstance(sigma, float) or sigma == 0:
        noise[:, :3] = math.nan
    assert blend_latents(generated, source, noise, mask, sigma).isfinite().all()


def test_blending_at_every_step_ends_in_the_source() -> None:
    """Whatever step the sampler takes, blending returns to (1 - sigma) source + sigma noise."""
    _, source, noise = random_latents()
    mask = torch.zeros(2, 6, 1, dtype=torch.bool)
    sigmas = torch.linspace(1, 0, 5)
    latents = noise
    for now, after in itertools.pairwise(sigmas):
        latents = latents + (after - now) * torch.randn_like(latents)
        latents = blend_latents(latents, source, noise, mask, after)
        torch.testing.assert_close(latents, source + after * (noise - source))
    assert torch.equal(latents, source)


def test_broadcasts_into_a_new_tensor() -> None:
    generated, source, noise = random_latents()
    mask = torch.zeros(1, 6, 1, dtype=torch.bool)
    got = blend_latents(generated, source[:1], noise[:1], mask, 0)
    assert torch.equal(got, source[:1].expand(2, 6, 8))
    got.zero_()
    assert source.abs().sum() > 0


def test_compiles_without_a_graph_break() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(blend_latents, fullgraph=True, backend="aot_eager")
    generated, source, noise = random_latents()
    mask = torch.rand(2, 6, 1)
    for sigma in (torch.tensor(0.5), torch.tensor(0.25)):
        torch.testing.assert_close(
            compiled(generated, source, noise, mask, sigma),
            blend_latents(generated, source, noise, mask, sigma),
        )


BAD = [
    ("generated", TypeError, {"generated": torch.zeros(2, 6, 8, dtype=torch.int32)}),
    ("generated", TypeError, {"generated": [1.0]}),
    ("generated", ValueError, {"generated": torch.tensor(1.0)}),
    ("source", TypeError, {"source": torch.zeros(2, 6, 8, dtype=torch.bfloat16)}),
    ("source", ValueError, {"source": torch.zeros(2, 6, 7)}),
    ("noise", ValueError, {"noise": torch.zeros(3, 6, 8)}),
    ("noise", TypeError, {"noise": torch.zeros(2, 6, 8, device="meta")}),
    ("mask", TypeError, {"mask": torch.zeros(2, 6, 1, dtype=torch.int64)}),
    ("mask", TypeError, {"mask": 1.0}),
    ("mask", ValueError, {"mask": torch.zeros(2, 5, 1)}),
    ("mask", ValueError, {"mask": torch.zeros(1, 2, 6, 1)}),
    ("mask", ValueError, {"mask": torch.full((2, 6, 1), 1.5)}),
    ("mask", ValueError, {"mask": torch.full((2, 6, 1), math.nan)}),
    ("sigma", ValueError, {"sigma": 1.5}),
    ("sigma", ValueError, {"sigma": math.nan}),
    ("sigma", TypeError, {"sigma": "0.5"}),
    ("sigma", TypeError, {"sigma": torch.tensor(1)}),
    ("sigma", ValueError, {"sigma": torch.full((3,), 0.5)}),
    ("sigma", ValueError, {"sigma": torch.tensor([0.5, -0.5])}),
]


@pytest.mark.parametrize(
    ("argument", "error", "changed"), BAD, ids=[f"{i}-{b[0]}" for i, b in enumerate(BAD)]
)
def test_bad_calls_name_the_argument(argument: str, error: type[Exception], changed: dict) -> None:
    generated, source, noise = random_latents()
    call = {
        "generated": generated,
        "source": source,
        "noise": noise,
        "mask": torch.ones(2, 6, 1),
        "sigma": 0.5,
    }
    with pytest.raises(error, match=rf"^{argument}: expected .*got "):
        blend_latents(**{**call, **changed})
