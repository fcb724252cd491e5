"""Attention over segments of tokens, beside the same computed with the attention map in memory.

python examples/tensors.py
"""

from __future__ import annotations

import torch
from torch import Tensor

import flashbrush as fb

TOKENS = fb.Segments(prompt=64, subject=96, target=96)
WEIGHTS = {("target", "prompt"): 1.3, ("target", "subject"): 1.4}


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The control's formula with the map (batch, heads, rows, keys): weights act after the softmax."""
    p = torch.softmax(torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5, -1)
    for (rows, keys), weight in WEIGHTS.items():
        p[:, :, TOKENS.slice(rows), TOKENS.slice(keys)] *= weight
    return torch.einsum("bhij,bjhd->bihd", p, v)


def main() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, TOKENS.total, 4, 64) for _ in range(3))  # batch, tokens, heads, dim

    out, stats = fb.attention(q, k, v, fb.Control(TOKENS, weight=WEIGHTS), return_stats=True)
    print(f"largest difference to the eager form: {(out - eager(q, k, v)).abs().max():.1e}")

    share = stats.mass[0, :, TOKENS.names.index("target")] / 96  # (heads, key segments)
    for head, shares in enumerate(share.tolist()):
        words = ", ".join(f"{x:.2f} to {name}" for name, x in zip(TOKENS.names, shares, strict=True))
        print(f"head {head}: the target's rows give {words}")

    # -inf removes a pair of segments: its keys are never read.
    blind = fb.Control(TOKENS, bias={("target", "subject"): float("-inf")})
    _, stats = fb.attention(q, k, v, blind, return_stats=True)
    print("mass of the removed pair:", stats.mass[0, 0, 2, 1].item())

    # The same control with gradients: they flow to q, k and v.
    q.requires_grad_()
    fb.attention(q, k, v, blind).square().mean().backward()
    print("gradient of q:", tuple(q.grad.shape))


if __name__ == "__main__":
    main()
