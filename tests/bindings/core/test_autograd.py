"""Derivatives that an operator lacks are refused; those that torch's operators give are right."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import flashbrush as fb

ROWS, HEADS, DIM = 6, 2, 8


def random_tensor(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float32)


def attention_of(backend: str) -> Callable[[Tensor], Tensor]:
    k, v = random_tensor(1, ROWS, HEADS, DIM), random_tensor(1, ROWS, HEADS, DIM)
    return lambda q: fb.attention(q, k, v, backend=backend)


def probabilities_of(q: Tensor) -> Tensor:
    lse = torch.zeros(1, HEADS, ROWS, 1)
    return fb.key_probabilities(q, q.detach(), lse, [0, 2])


def column_mass_of(q: Tensor) -> Tensor:
    return fb.column_mass(q, q.detach(), torch.zeros(1, HEADS, ROWS, 1))


REFUSED = {
    "reference": lambda: attention_of("reference"),
    "composed": lambda: attention_of("composed"),
    "cpu": lambda: attention_of("cpu"),
    "key_probabilities": lambda: probabilities_of,
    "column_mass": lambda: column_mass_of,
    "query_blur": lambda: lambda q: fb.query_blur(q, (2, 3), 1.0),
}


@pytest.mark.parametrize("name", REFUSED)
def test_forward_mode_is_refused(name: str) -> None:
    f, q, tangent = REFUSED[name](), random_tensor(1, ROWS, HEADS, DIM), random_tensor(1, ROWS, HEADS, DIM)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(f, (q,), (tangent,))
    with forward_ad.dual_level():
        f(q)  # allowed: the derivative asked for is of another tensor
        with pytest.raises(NotImplementedError, match="forward-mode"):
            f(forward_ad.make_dual(q, tangent))


def norm_rope(x: Tensor) -> Tensor:
    turn = torch.arange(ROWS * DIM).reshape(ROWS, DIM) / 10
    return fb.qk_norm_rope([(x, torch.linspace(0.5, 2, DIM), None)], turn.cos(), turn.sin(), eps=1e-6)


FORWARD = {
    "qk_norm_rope": norm_rope,
    "adain": lambda x: fb.adain(x, x.detach().flip(1) * 2 + 1),
    "blend_latents": lambda x: fb.blend_latents(
        x, x.detach() * 2, x.detach() - 1, torch.full_like(x.detach(), 0.3), 0.4
    ),
}


@pytest.mark.parametrize("name", FORWARD)
def test_forward_mode_agrees_with_reverse_mode(name: str) -> None:
    x, tangent = random_tensor(1, ROWS, HEADS, DIM), random_tensor(1, ROWS, HEADS, DIM)
    forward = torch.func.jvp(FORWARD[name], (x,), (tangent,))[1]
    x.requires_grad_()
    out, given = FORWARD[name](x), random_tensor(1, ROWS, HEADS, DIM)
    (gradient,) = torch.autograd.grad(out, x, given)
    torch.testing.assert_close((forward * given).sum(), (gradient * tangent).sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "f",
    [attention_of("cpu"), attention_of("composed"), norm_rope, probabilities_of],
    ids=["cpu", "composed", "qk_norm_rope", "key_probabilities"],
)
def test_gradient_of_a_gradient_is_refused(f: Callable[[Tensor], Tensor]) -> None:
    x = random_tensor(1, ROWS, HEADS, DIM).requires_grad_()
    (gradient,) = torch.autograd.grad(f(x).square().sum(), x, create_graph=True)
    for again in (
        lambda: gradient.square().sum().backward(retain_graph=True),
        lambda: torch.autograd.grad(gradient.square().sum(), x, retain_graph=True),
        lambda: torch.autograd.grad(f(x).sum() + gradient.square().sum(), x, retain_graph=True),
    ):
        with pytest.raises(RuntimeError, match="no gradient of a gradient"):
            again()


@pytest.mark.parametrize("what", ["scale", "mask", "probabilities"])
def test_argument_changed_before_backward_raises(what: str) -> None:
    q, (k, v) = (
        random_tensor(1, ROWS, HEADS, DIM).requires_grad_(),
        (random_tensor(1, ROWS, HEADS, DIM), random_tensor(1, ROWS, HEADS, DIM)),
    )
    scale, mask = torch.full((1,), 0.3), random_tensor(ROWS, ROWS)
    if what == "probabilities":
        out = fb.key_probabilities(q, k, torch.zeros(1, HEADS, ROWS, 1), [1], scale=scale)
    else:
        out = fb.attention(q, k, v, **({"scale": scale} if what == "scale" else {"mask": mask}))
    (mask if what == "mask" else scale).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("backend", ["cpu", "composed", "reference"])
def test_out_written_again_before_backward_raises(backend: str) -> None:
    q, k, v = (random_tensor(1, ROWS, HEADS, DIM) for _ in range(3))
    buffer, weight = torch.zeros_like(q), torch.ones_like(q, requires_grad=True)
    fb.attention(q, k, v, out=buffer, backend=backend)
    loss = (weight * buffer).sum()
    fb.attention(2 * q, k, v, out=buffer, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_reference_has_a_gradient_of_a_gradient() -> None:
    q = random_tensor(1, 3, 1, 4).double().requires_grad_()
    k, v = random_tensor(1, 3, 1, 4).double(), random_tensor(1, 3, 1, 4).double()
    assert torch.autograd.gradgradcheck(lambda q: fb.attention(q, k, v, backend="reference"), (q,))
