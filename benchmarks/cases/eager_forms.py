"""The controlled attentions as their authors compute them: the attention map in memory, in the model's dtype.

Tensors are (batch, heads, tokens, dim), as in the released code; formulas are the papers'.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def attention_map(q: Tensor, k: Tensor, temperature: float = 1.0) -> Tensor:
    """softmax(QK^T / (temperature sqrt(dim))), (batch, heads, rows, keys)."""
    return torch.softmax(q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 / temperature), -1)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(QK^T / sqrt(dim)) V."""
    return attention_map(q, k) @ v


def min_max_gain(mass: Tensor, span: float = 0.2, floor: float = 1.0) -> Tensor:
    """In-Context Brush's head gain (arXiv 2505.20271, Eqs. 6 to 8): floor to floor + span, (batch, heads).

    Args:
        mass: (batch, heads), the target's attention to the prompt, up to a factor that all heads share.
        span: gain of the head with the largest mass over that with the smallest.
        floor: gain of the head with the smallest mass.
    """
    low, high = mass.amin(1, keepdim=True), mass.amax(1, keepdim=True)
    return floor + span * (mass - low) / (high - low + torch.finfo(torch.float32).eps)


def in_context_brush(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt: slice,
    subject: slice,
    target: slice,
    alpha_prompt: float = 0.3,
    alpha_subject: float = 0.3,
    span: float = 0.2,
) -> Tensor:
    """In-Context Brush (arXiv 2505.20271), Eqs. 5 to 8, in one joint softmax over prompt, subject and target.

    Each row of the target adds alpha times what it reads of the prompt and of the subject. Then every row of
    a head is multiplied by the head's gain.

    Args:
        q: (batch, heads, tokens, dim).
        k: the same.
        v: the same.
        prompt: tokens of the prompt.
        subject: tokens of the subject's panel.
        target: tokens of the target's panel.
        alpha_prompt: 0.3 in the released code.
        alpha_subject: 0.3 in the released code.
        span: as in min_max_gain.
    """
    attention = attention_map(q, k)
    out = attention @ v
    out[:, :, target] += alpha_prompt * (attention[:, :, target, prompt] @ v[:, :, prompt])
    out[:, :, target] += alpha_subject * (attention[:, :, target, subject] @ v[:, :, subject])
    mass = attention[:, :, target, prompt].sum((-2, -1), dtype=torch.float32)  # (batch, heads)
    return out * min_max_gain(mass, span)[:, :, None, None].to(out.dtype)


def reweight(q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> Tensor:
    """Prompt-to-Prompt (arXiv 2208.01626), re-weighting: the map's columns times `weight` (keys,)."""
    return (attention_map(q, k) * weight) @ v


def contrast(
    q: Tensor, k: Tensor, v: Tensor, beta: float, clip: tuple[float, float] | None, temperature: float = 1.0
) -> Tensor:
    """SD-VICL (arXiv 2508.09949) and cross-image attention: clip(mean + beta (map - mean)) V.

    The mean is over a row's keys.
    """
    attention = attention_map(q, k, temperature)
    mean = attention.mean(-1, keepdim=True)
    attention = mean + beta * (attention - mean)
    return (attention if clip is None else attention.clamp(*clip)) @ v


def decoupled(q: Tensor, k: Tensor, v: Tensor, keys: Sequence[slice], gates: Sequence[float]) -> Tensor:
    """IP-Adapter (arXiv 2308.06721): a softmax over each run of keys, gated and added."""
    parts = [g * (attention_map(q, k[:, :, s]) @ v[:, :, s]) for s, g in zip(keys, gates, strict=True)]
    return torch.stack(parts).sum(0)
