"""The rounding model against float32 arithmetic in an order that is written out."""

from __future__ import annotations

import torch

from support.rounding import ROUNDING, exact_and_error, positive_sum


def test_sums_of_positive_terms() -> None:
    terms = torch.rand(4096, 1024)
    one_by_one, tiled = torch.zeros(4096), torch.zeros(4096)
    for first in range(0, 1024, 128):
        tile = torch.zeros(4096)
        for j in range(first, first + 128):
            one_by_one, tile = one_by_one + terms[:, j], tile + terms[:, j]
        tiled = tiled + tile
    exact = terms.double().sum(1)
    for got, lengths in ((one_by_one, (1024,)), (tiled, (128, 8))):
        measured = float((got.double() / exact - 1).square().mean().sqrt())
        assert 0.8 <= measured / (ROUNDING * positive_sum(*lengths) ** 0.5) <= 1.25


def test_a_chain_of_products() -> None:
    """Two matrix products, each added term by term, and a softmax between them."""
    a, b, c = torch.randn(64, 48), torch.randn(48, 96), torch.randn(96, 32)

    def product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(x.shape[0], y.shape[1])
        for k in range(x.shape[1]):
            out = out + x[:, k, None] * y[k]
        return out

    got = product(torch.softmax(product(a, b), 1), c)
    exact, (error,) = exact_and_error(lambda: [torch.softmax(a.double() @ b.double(), 1) @ c.double()])
    measured = float((got.double() - exact[0]).abs().max() / exact[0].abs().max())
    assert 0.3 <= measured / error <= 3


def test_copies_are_exact() -> None:
    x = torch.randn(5, 7).double()
    exact, (error,) = exact_and_error(lambda: [torch.cat((x.T.contiguous(), x.T)).view(-1)[3:]])
    assert error == 0.0 and exact[0].shape == (67,)
