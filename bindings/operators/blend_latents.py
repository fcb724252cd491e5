"""The registered blend_latents. The noise level is a tensor, or a number where there is none."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.planner import resolve
from .library import register


def _run(
    generated: Tensor,
    source: Tensor,
    noise: Tensor,
    mask: Tensor,
    sigma: Tensor | None,
    number: float,
    *,
    backend: str = "auto",
) -> Tensor:
    call = (generated, source, noise, mask, number if sigma is None else sigma)
    result = resolve("blend_latents", backend, generated.device, *call)(*call)
    out = torch.empty_like(generated)  # the layout that the fake promises
    return result if result.stride() == out.stride() else out.copy_(result)


def _fake(generated: Tensor, *_, **__) -> Tensor:
    return torch.empty_like(generated)


blend_latents = register(
    "blend_latents(Tensor generated, Tensor source, Tensor noise, Tensor mask, Tensor? sigma, float number, "
    '*, str backend="auto") -> Tensor',
    _run,
    _fake,
)
