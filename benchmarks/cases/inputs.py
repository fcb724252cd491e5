"""Random inputs: one sampler of normal tensors, and the q, k, v of a shape."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from ...bindings import Control
from .shapes import Shape


class Sampler:
    """Normal tensors of one seeded generator.

    Args:
        seed: of the generator.
        dtype: of the tensors; they are drawn in float32 and rounded.
        device: where they are drawn.
    """

    def __init__(self, seed: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        self.dtype, self.device = dtype, torch.device(device)
        self.generator = torch.Generator(device).manual_seed(seed)

    def float32(self, *size: int) -> Tensor:
        return torch.randn(*size, generator=self.generator, device=self.device)

    def normal(self, *size: int) -> Tensor:
        """In the sampler's dtype."""
        return self.float32(*size).to(self.dtype)

    def uniform(self, *size: int) -> Tensor:
        """float32 in [0, 1)."""
        return torch.rand(*size, generator=self.generator, device=self.device)


@dataclass(frozen=True, eq=False)
class Case:
    """Inputs of one shape; q, k and v are (batch, tokens, heads, dim), contiguous."""

    shape: Shape
    dtype: torch.dtype
    q: Tensor
    k: Tensor
    v: Tensor
    control: Control

    def heads_first(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v as (batch, heads, tokens, dim), contiguous: the fastest layout for torch's kernels."""
        return self._heads_first

    @functools.cached_property
    def _heads_first(self) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (t.transpose(1, 2).contiguous() for t in (self.q, self.k, self.v))
        return q, k, v


def draw_case(shape: Shape, dtype: torch.dtype, seed: int = 0, device: torch.device | str = "cpu") -> Case:
    """Random q, k, v of a shape.

    Heads differ in how much they attend to the first key segment, so that a derived head gain is not the same
    for all of them.
    """
    sampler = Sampler(seed, dtype, device)
    q = sampler.float32(shape.batch, shape.n_rows, shape.heads, shape.dim)
    k, v = (sampler.float32(shape.batch, shape.n_keys, shape.heads, shape.dim) for _ in "kv")
    first = next(iter(shape.keys.values()))
    # Adds up to scale * |direction|^2 = 1 to a logit, from -1 in the first head to 1 in the last.
    direction = torch.ones(shape.dim, device=device) * shape.dim**-0.25
    q += direction
    k[:, :first] += torch.linspace(-1, 1, shape.heads, device=device)[:, None] * direction
    return Case(shape, dtype, q.to(dtype), k.to(dtype), v.to(dtype), shape.control())
