"""The vendor's attention with LSE: the best one that this device and this call have.

The CUDA branches have not been run on hardware yet.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor


def has_lse(device: torch.device) -> bool:
    return device.type in ("cpu", "cuda")


def attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Plain attention and its LSE.

    Args:
        q: (B, H, M, D), not empty.
        k: (B, Hkv, N, D), not empty.
        v: as k.
        scale: logit scale.
        mask: additive, q's dtype, broadcastable to (B, H, M, N). A row that it masks whole gives 0 and -inf.

    Returns:
        out (B, H, M, D) and lse (B, H, M), natural log.
    """
    if mask is not None:
        mask = mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    out, lse = _vendor(q, k, v, scale, mask)
    if mask is not None:
        # ATen's CPU operator reports lse 0 for a row without a key, others NaN.
        dead = (mask == -torch.inf).all(-1)
        out, lse = torch.where(dead[..., None], 0, out), torch.where(dead, -torch.inf, lse)
    return out, lse


def _vendor(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, attn_mask=mask, scale=scale
        )
    half = q.dtype in (torch.bfloat16, torch.float16)
    if half and mask is None and q.shape[3] % 8 == 0:
        if _cudnn_is_best(q.device) and q.shape[3] <= 128:
            k, v = _repeat_heads(q, k), _repeat_heads(q, v)
            out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
                q, k, v, None, True, scale=scale
            )
            return out, lse.reshape(q.shape[:3]).float()
        if _installed("flash_attn"):
            from flash_attn import flash_attn_func  # type: ignore[import-not-found]

            swapped = (t.transpose(1, 2) for t in (q, k, v))
            out, lse, _ = flash_attn_func(*swapped, softmax_scale=scale, return_attn_probs=True)
            return out.transpose(1, 2), lse
        if _installed("xformers"):
            from xformers.ops.fmha import memory_efficient_attention_partial  # type: ignore[import-not-found]

            k, v = _repeat_heads(q, k), _repeat_heads(q, v)
            out, lse = memory_efficient_attention_partial(
                *(t.transpose(1, 2) for t in (q, k, v)), scale=scale
            )
            return out.transpose(1, 2), lse[..., : q.shape[2]]
        k, v = _repeat_heads(q, k), _repeat_heads(q, v)
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)
        return out, lse
    k, v = _repeat_heads(q, k), _repeat_heads(q, v)
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, mask, True, scale=scale)
    return out, lse[..., : q.shape[2]]


def _repeat_heads(q: Tensor, t: Tensor) -> Tensor:
    return t if t.shape[1] == q.shape[1] else t.repeat_interleave(q.shape[1] // t.shape[1], 1)


@functools.cache
def _cudnn_is_best(device: torch.device) -> bool:
    return torch.backends.cudnn.is_available() and torch.cuda.get_device_capability(device) >= (9, 0)


@functools.cache
def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
