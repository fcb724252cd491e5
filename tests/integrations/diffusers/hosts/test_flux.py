"""FLUX beyond the contract: quantisation, tensor parallelism, masks, pipelines."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import Tensor, nn

import flashbrush as fb
from flashbrush.integrations import InContextBrush
from flashbrush.integrations.diffusers import FluxControlledAttnProcessor, Plan, apply

from ...tiny import COLUMNS, ROWS, TEXT, forward, relative, tiny_call, tiny_flux

IMAGE = ROWS * COLUMNS
TOKENS = TEXT + IMAGE
HEADS, DIM = 4, 32
TOLERANCE = 1e-5  # float32, relative to the largest output


def test_fusing_projections_under_control_does_not_change_the_output() -> None:
    model = tiny_flux()
    call = tiny_call(model)
    with apply(model, InContextBrush()):
        expected = forward(model, call)
        model.fuse_qkv_projections()
        assert relative(forward(model, call), expected) <= TOLERANCE
        model.unfuse_qkv_projections()
        assert torch.equal(forward(model, call), expected)


def test_unknown_joint_attention_kwargs_warn_as_stock() -> None:
    model = tiny_flux(double=1, single=1)
    call = tiny_call(model)
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("diffusers.models.transformers.transformer_flux")
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.WARNING)  # an earlier test may have silenced diffusers' logger
    try:
        stock = forward(model, call, joint_attention_kwargs={"strength": 1.0})
        assert len(messages) == 2
        with apply(model):
            assert (
                relative(forward(model, call, joint_attention_kwargs={"strength": 1.0}), stock) <= TOLERANCE
            )
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert len(messages) == 4
    assert messages[2].replace("FluxControlledAttnProcessor", "FluxAttnProcessor") == messages[0]


@pytest.mark.filterwarnings("ignore")
def test_quantised_linears_equal_the_stock_model() -> None:
    model = tiny_flux()
    call = tiny_call(model)
    exact = forward(model, call)
    model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)
    stock = forward(model, call)
    assert not torch.equal(stock, exact)
    with apply(model):
        # A rounding difference of the attention may tip an activation into the next of 256 steps.
        assert relative(forward(model, call), stock) <= 1e-2
    with apply(model, InContextBrush()):
        assert relative(forward(model, call), stock) > 1e-2
    assert torch.equal(forward(model, call), stock)


def test_tensor_parallel_share_of_the_heads_equals_the_stock_processor() -> None:
    attn = attention_module("double")
    keep = 2 * DIM
    for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"):
        whole = getattr(attn, name)
        share = nn.Linear(whole.in_features, keep)
        share.weight.data, share.bias.data = whole.weight.data[:keep], whole.bias.data[:keep]
        setattr(attn, name, share)
    for out in (attn.to_out, attn):
        name = "0" if out is attn.to_out else "to_add_out"
        whole = getattr(out, name)
        share = nn.Linear(keep, whole.out_features)
        share.weight.data, share.bias.data = whole.weight.data[:, :keep], whole.bias.data
        setattr(out, name, share)
    image, text, rope = states()
    expected = FluxAttnProcessor()(attn, image, text, None, rope)
    mine = FluxControlledAttnProcessor()(attn, image, text, None, rope)
    assert all(relative(a, b) <= TOLERANCE for a, b in zip(mine, expected, strict=True))
    segments = fb.Segments(prompt=TEXT, target=IMAGE)
    weighted = FluxControlledAttnProcessor(Plan(fb.Control(segments, weight={("*", "prompt"): 1.0})))
    assert relative(weighted(attn, image, text, None, rope)[0], expected[0]) <= TOLERANCE
    derived = FluxControlledAttnProcessor(Plan(fb.Control(segments, head_gain=fb.HeadGain())))
    with pytest.raises(NotImplementedError, match="tensor parallelism"):
        derived(attn, image, text, None, rope)


# A controlled call under a mask


def attention_module(kind: str) -> Any:
    model: Any = tiny_flux(double=1, single=1)
    return (model.transformer_blocks if kind == "double" else model.single_transformer_blocks)[0].attn


def states(batch: int = 2) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Image (batch, IMAGE, channels), text (batch, TEXT, channels), RoPE (TOKENS, DIM) cos and sin."""
    model = tiny_flux(double=1, single=1)
    call = tiny_call(model)
    rope = model.pos_embed(torch.cat([call["txt_ids"], call["img_ids"]]))
    return torch.randn(batch, IMAGE, HEADS * DIM), torch.randn(batch, TEXT, HEADS * DIM), rope


@torch.no_grad()
def execute(kind: str, plan: Plan, mask: Tensor | None = None, **options) -> Tensor:
    """The attention's output before its projections, (batch, TOKENS, HEADS, DIM), by our processor."""
    torch.manual_seed(3)
    attn = attention_module(kind)
    image, text, rope = states()
    processor = FluxControlledAttnProcessor(plan, **options)
    if kind == "single":
        return processor(attn, torch.cat([text, image], 1), None, mask, rope).unflatten(-1, (HEADS, DIM))
    attn.to_out[0] = attn.to_add_out = nn.Identity()
    image, text = processor(attn, image, text, mask, rope)
    return torch.cat([text, image], 1).unflatten(-1, (HEADS, DIM))


@torch.no_grad()
def streams(kind: str) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """q, k, v (batch, TOKENS, HEADS, DIM) joined after the norms, before RoPE; and RoPE"""
    torch.manual_seed(3)
    attn = attention_module(kind)
    image, text, rope = states()

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (HEADS, DIM))

    if kind == "single":
        joint = torch.cat([text, image], 1)
        return (
            attn.norm_q(heads(attn.to_q(joint))),
            attn.norm_k(heads(attn.to_k(joint))),
            heads(attn.to_v(joint)),
            rope,
        )
    q = torch.cat([attn.norm_added_q(heads(attn.add_q_proj(text))), attn.norm_q(heads(attn.to_q(image)))], 1)
    k = torch.cat([attn.norm_added_k(heads(attn.add_k_proj(text))), attn.norm_k(heads(attn.to_k(image)))], 1)
    v = torch.cat([heads(attn.add_v_proj(text)), heads(attn.to_v(image))], 1)
    return q, k, v, rope


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = (t[:, None, ::2] for t in rope)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)


def softmax(q: Tensor, k: Tensor, add: Tensor | float = 0.0) -> Tensor:
    """(batch, heads, rows, keys)"""
    return torch.softmax(torch.einsum("bmhd,bnhd->bhmn", q, k) / math.sqrt(DIM) + add, -1)


def values(prob: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhmn,bnhd->bmhd", prob, v)


both = pytest.mark.parametrize("kind", ["double", "single"])


@both
def test_control_under_an_attention_mask_matches_eager(kind: str) -> None:
    q, k, v, rope = streams(kind)
    control = fb.Control(fb.Segments(prompt=TEXT, rest=IMAGE), weight={("rest", "prompt"): 1.7})
    mask = torch.ones(2, 1, 1, TOKENS, dtype=torch.bool)
    mask[1, ..., 2:TEXT] = False
    prob = softmax(rotate(q, rope), rotate(k, rope), torch.zeros(mask.shape).masked_fill(~mask, -math.inf))
    prob[:, :, TEXT:, :TEXT] *= 1.7
    assert relative(execute(kind, Plan(control), mask, backend="composed"), values(prob, v)) <= TOLERANCE


# Pipelines


def pipelines():
    """Fill and Kontext with random weights; prompts come as embeddings, so that no text encoder is needed."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        FluxFillPipeline,
        FluxKontextPipeline,
    )

    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        latent_channels=2,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
        scaling_factor=1.0,
    )
    for cls, in_channels in ((FluxFillPipeline, 2 * 8 + 4 * 4), (FluxKontextPipeline, 8)):
        transformer = tiny_flux(double=1, single=1, in_channels=in_channels, out_channels=8)
        parts = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
        if cls is FluxKontextPipeline:
            parts |= dict.fromkeys(("image_encoder", "feature_extractor"))
        pipe = cls(scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae, transformer=transformer, **parts)
        pipe.set_progress_bar_config(disable=True)
        yield pipe


def generate(pipe, steps: int = 2, **more) -> Tensor:
    size = {"height": 32, "width": 16}
    generator = torch.Generator().manual_seed(5)
    image = torch.rand(1, 3, 32, 16, generator=generator)
    inputs = {"image": image, "prompt_embeds": torch.randn(1, TEXT, 16, generator=generator)}
    inputs["pooled_prompt_embeds"] = torch.randn(1, 16, generator=generator)
    if "Fill" in type(pipe).__name__:
        inputs["mask_image"] = torch.ones(1, 1, 32, 16)
    else:
        inputs |= {"_auto_resize": False, "max_area": 512}
    out = pipe(**inputs, **size, num_inference_steps=steps, generator=generator, output_type="latent", **more)
    return out.images


def test_fill_and_kontext_pipelines_run_under_control() -> None:
    for pipe in pipelines():
        stock = generate(pipe)
        with apply(pipe.transformer):
            assert relative(generate(pipe), stock) <= TOLERANCE
        first = "Fill" in type(pipe).__name__
        with apply(pipe.transformer, InContextBrush(0, 0, 0, subject_first=first)):
            assert relative(generate(pipe), stock) <= TOLERANCE
        with apply(pipe.transformer, InContextBrush(subject_first=first), stats=True) as handle:
            assert relative(generate(pipe), stock) > 1e-3
            assert [(r.step, r.layer) for r in handle.stats] == [(0, 0), (0, 1), (1, 0), (1, 1)]
        assert torch.equal(generate(pipe), stock)
