"""key_probabilities() equals columns of the oracle's map; its gradient is that of the whole softmax."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

import flashbrush as fb
from flashbrush.bindings.core import recomputed_map
from support.oracle import probabilities
from support.oracle_calls import map_arguments, random_oracle_call


@pytest.mark.parametrize("seed", range(4100, 4120))
def test_equals_columns_of_the_probabilities(seed: int, monkeypatch) -> None:
    monkeypatch.setattr(recomputed_map, "BLOCK_ELEMENTS", 40)
    call = random_oracle_call(seed)
    call.mask = None
    q, k, lse, control, kwargs = map_arguments(call)
    total = sum(t.shape[1] for t in call.k)
    keys = torch.randint(0, total, (3,))
    truth = probabilities(call)[..., keys]
    for wanted in (keys, keys.int(), keys.tolist()):
        got = fb.key_probabilities(q, k, lse, wanted, control, **kwargs)
        torch.testing.assert_close(got, truth, rtol=1e-9, atol=1e-9)


def softmax_columns(q: Tensor, k: Tensor, keys: list[int], bias: Tensor) -> Tensor:
    s = torch.einsum("bmhd,bnhd->bhmn", q, k.repeat_interleave(2, 2)) / math.sqrt(q.shape[3]) + bias
    return torch.softmax(s, -1)[..., keys]


def test_gradient_is_that_of_the_whole_softmax() -> None:
    q, k = torch.randn(2, 5, 4, 8, dtype=torch.float64), torch.randn(2, 9, 2, 8, dtype=torch.float64)
    control = fb.Control(
        fb.Segments(a=2, b=3), fb.Segments(x=4, y=5), bias={("a", "y"): 0.75, ("b", "x"): -1.5}
    )
    bias = torch.zeros(5, 9, dtype=torch.float64)
    bias[:2, 4:], bias[2:, :4] = 0.75, -1.5
    lse = fb.attention(q, k, k, control, backend="reference", return_stats=True)[1].lse
    keys = [7, 0, 7]
    d = torch.randn(2, 4, 5, 3, dtype=torch.float64)
    results = []
    for function in (
        lambda q, k: fb.key_probabilities(q, k, lse, keys, control),
        lambda q, k: softmax_columns(q, k, keys, bias),
    ):
        leaves = [t.clone().requires_grad_() for t in (q, k)]
        out = function(*leaves)
        results.append((out.detach(), *torch.autograd.grad(out, leaves, d)))
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected)
    assert bool((results[0][2][:, [1, 2, 3, 5]].abs().amax(-1) > 1e-6).all())  # keys that were not asked for


def test_gradcheck_of_groups_lists_and_sources(monkeypatch) -> None:
    monkeypatch.setattr(recomputed_map, "BLOCK_ELEMENTS", 40)
    shapes = ((2, 4, 2, 3), (2, 2, 1, 3), (1, 3, 1, 3))
    q, a, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)
    control = fb.Control(
        fb.Segments(r=3, s=1),
        fb.Segments(x=2, y=3),
        groups={"g": ["y"], "h": ["x"]},
        bias={("s", "x"): -math.inf, ("r", "y"): torch.tensor([0.5, -0.5])},
        weight={("*", "x"): 5.0},
    )
    index = torch.tensor([1, 0, 1])
    source = {"q": index, "k": [index.flip(0), index * 0]}

    def columns(q, a, b):
        # gradcheck moves the inputs, and lse is a function of them
        moved = {**source, "v": source["k"]}
        stats = fb.attention(
            q, [a, b], [a, b], control, source=moved, backend="reference", return_stats=True
        )[1]
        return fb.key_probabilities(q, [a, b], stats.lse.detach(), [4, 1], control, source=source)

    assert gradcheck(columns, (q, a, b))


def test_gradient_of_a_loss_on_a_few_columns_in_16_bits() -> None:
    q, k = (torch.randn(1, n, 2, 64).bfloat16().requires_grad_() for n in (30, 40))
    lse = fb.attention(q, k, k, backend="composed", return_stats=True)[1].lse
    p = fb.key_probabilities(q, k, lse, range(3))
    assert p.dtype == torch.float32
    p.square().sum().backward()
    exact = [t.detach().double().requires_grad_() for t in (q, k)]
    s = torch.einsum("bmhd,bnhd->bhmn", *exact) / 8
    torch.softmax(s, -1)[..., :3].square().sum().backward()
    for mine, truth in zip((q, k), exact, strict=True):
        assert mine.grad is not None and truth.grad is not None and mine.grad.dtype == torch.bfloat16
        error = (mine.grad.double() - truth.grad).abs().max()
        assert error <= 2**-8 * truth.grad.abs().max()


def test_empty_calls_and_no_keys() -> None:
    q, k = torch.randn(2, 5, 2, 8, requires_grad=True), torch.randn(2, 9, 2, 8)
    lse = fb.attention(q, k, k, backend="reference", return_stats=True)[1].lse
    p = fb.key_probabilities(q, k, lse, [])
    assert p.shape == (2, 2, 5, 0)
    p.sum().backward()
    assert q.grad is not None and bool((q.grad == 0).all())


def test_bad_calls() -> None:
    q, k, lse = torch.randn(2, 5, 2, 8), torch.randn(2, 9, 2, 8), torch.zeros(2, 2, 5, 1)
    for keys, error, word in (
        ([9], ValueError, r"keys.*0\.\.8.*9"),
        ([-1], ValueError, r"keys.*-1"),
        (torch.tensor([0.0]), TypeError, "keys.*float32"),
        (torch.tensor([[0]]), TypeError, r"keys.*\(1, 1\)"),
        ("prompt", TypeError, "keys.*prompt"),
        ([True], TypeError, "keys"),
        (3, TypeError, "keys"),
    ):
        with pytest.raises(error, match=word):
            fb.key_probabilities(q, k, lse, keys)
    with pytest.raises(ValueError, match="lse"):
        fb.key_probabilities(q, k, lse[:1], [0])
