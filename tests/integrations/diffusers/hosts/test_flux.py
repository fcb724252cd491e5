"""FluxControlledAttnProcessor against the stock processor, and every part of a plan against eager arithmetic."""

from __future__ import annotations

import inspect
import logging
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import Tensor, nn

import flashbrush as fb
from flashbrush.integrations import InContextBrush
from flashbrush.integrations.diffusers import FluxControlledAttnProcessor, Layer, Plan, apply

from ...tiny import COLUMNS, ROWS, TEXT, forward, relative, tiny_call, tiny_flux

IMAGE = ROWS * COLUMNS
TOKENS = TEXT + IMAGE
HEADS, DIM = 4, 32
TOLERANCE = 1e-5  # float32, relative to the largest output


# The drop-in


@pytest.mark.parametrize("fused", [False, True], ids=["separate", "fused"])
@pytest.mark.parametrize("batch", [1, 3])
def test_plain_equals_stock(batch: int, fused: bool) -> None:
    model = tiny_flux()
    if fused:
        model.fuse_qkv_projections()
    call = tiny_call(model, batch=batch)
    stock = forward(model, call)
    with apply(model):
        assert relative(forward(model, call), stock) <= TOLERANCE
    assert torch.equal(forward(model, call), stock)


def test_projections_fused_and_taken_apart_under_control() -> None:
    model = tiny_flux()
    call = tiny_call(model)
    with apply(model, InContextBrush()):
        expected = forward(model, call)
        model.fuse_qkv_projections()
        assert relative(forward(model, call), expected) <= TOLERANCE
        model.unfuse_qkv_projections()
        assert torch.equal(forward(model, call), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits_err_no_more_than_stock(dtype: torch.dtype) -> None:
    model = tiny_flux()
    call = tiny_call(model)
    truth = forward(model, call)
    model.to(dtype)
    half = {n: t if n.endswith("ids") else t.to(dtype) for n, t in call.items()}
    stock = relative(forward(model, half).float(), truth)
    with apply(model):
        ours = forward(model, half)
    assert ours.dtype == dtype
    assert relative(ours.float(), truth) <= 1.5 * stock


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_autocast() -> None:
    model = tiny_flux()
    call = tiny_call(model)
    truth = forward(model, call)
    with torch.autocast("cpu", torch.bfloat16):
        stock = relative(forward(model, call).float(), truth)
        with apply(model):
            assert relative(forward(model, call).float(), truth) <= 1.5 * stock
        with apply(model, InContextBrush(0, 0, 0)):
            assert relative(forward(model, call).float(), truth) <= 1.5 * stock


@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_attention_mask(kind: str) -> None:
    model = tiny_flux()
    call = tiny_call(model, batch=2)
    mask = torch.ones(2, 1, 1, TOKENS, dtype=torch.bool)
    mask[0, ..., 3:TEXT] = False
    if kind == "additive":
        mask = torch.zeros(mask.shape).masked_fill(~mask, -2.0)
    extra = {"joint_attention_kwargs": {"attention_mask": mask}}
    stock = forward(model, call, **extra)
    assert relative(stock, forward(model, call)) > 1e-3
    with apply(model):
        assert relative(forward(model, call, **extra), stock) <= TOLERANCE
    with apply(model, InContextBrush(0, 0, 0), backend="composed"):
        assert relative(forward(model, call, **extra), stock) <= TOLERANCE


def test_signature_is_the_stock_processor_s() -> None:
    stock = inspect.signature(FluxAttnProcessor.__call__).parameters
    mine = inspect.signature(FluxControlledAttnProcessor.__call__).parameters
    assert list(mine) == list(stock)
    assert [p.default for p in mine.values()] == [p.default for p in stock.values()]


def test_unknown_joint_attention_kwargs_warn_as_stock() -> None:
    model = tiny_flux(double=1, single=1)
    call = tiny_call(model)
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("diffusers.models.transformers.transformer_flux")
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.WARNING)  # an earlier test may have quietened all of diffusers
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


def test_lora() -> None:
    from peft import LoraConfig

    model = tiny_flux()
    call = tiny_call(model)
    bare = forward(model, call)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_v_proj", "to_add_out"]
    with apply(model, InContextBrush()):
        controlled = forward(model, call)
        model.add_adapter(LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
        with_lora = forward(model, call)
        assert relative(with_lora, controlled) > 1e-3
        half = forward(model, call, joint_attention_kwargs={"scale": 0.5})
        assert relative(half, with_lora) > 1e-3
        model.disable_adapters()
        assert torch.equal(forward(model, call), controlled)
        model.enable_adapters()
    stock, stock_half = forward(model, call), forward(model, call, joint_attention_kwargs={"scale": 0.5})
    assert relative(stock, bare) > 1e-3
    with apply(model):
        assert relative(forward(model, call), stock) <= TOLERANCE
        assert relative(forward(model, call, joint_attention_kwargs={"scale": 0.5}), stock_half) <= TOLERANCE


@pytest.mark.filterwarnings("ignore")
def test_quantised_linears() -> None:
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


def test_a_tensor_parallel_rank_s_share_of_the_heads() -> None:
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


def test_context_parallelism_raises() -> None:
    processor = FluxControlledAttnProcessor()
    processor._parallel_config = SimpleNamespace(context_parallel_config=object())
    image, text, rope = states()
    with pytest.raises(NotImplementedError, match="context parallelism"):
        processor(attention_module("double"), image, text, None, rope)


# The parts of a plan


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
def test_an_empty_plan_is_plain(kind: str) -> None:
    q, k, v, rope = streams(kind)
    assert relative(execute(kind, Plan()), values(softmax(rotate(q, rope), rotate(k, rope)), v)) <= TOLERANCE


@both
def test_control(kind: str) -> None:
    q, k, v, rope = streams(kind)
    weight = torch.rand(2, HEADS) * 2
    segments = fb.Segments(prompt=TEXT, rest=IMAGE)
    control = fb.Control(segments, weight={("rest", "prompt"): weight}, bias={("prompt", "rest"): -math.inf})
    table = torch.ones(2, HEADS, TOKENS, TOKENS)
    table[:, :, TEXT:, :TEXT] = weight[:, :, None, None]
    bias = torch.zeros(TOKENS, TOKENS)
    bias[:TEXT, TEXT:] = -math.inf
    expected = values(softmax(rotate(q, rope), rotate(k, rope), bias) * table, v)
    assert relative(execute(kind, Plan(control)), expected) <= TOLERANCE


@both
def test_control_under_an_attention_mask(kind: str) -> None:
    q, k, v, rope = streams(kind)
    control = fb.Control(fb.Segments(prompt=TEXT, rest=IMAGE), weight={("rest", "prompt"): 1.7})
    mask = torch.ones(2, 1, 1, TOKENS, dtype=torch.bool)
    mask[1, ..., 2:TEXT] = False
    prob = softmax(rotate(q, rope), rotate(k, rope), torch.zeros(mask.shape).masked_fill(~mask, -math.inf))
    prob[:, :, TEXT:, :TEXT] *= 1.7
    assert relative(execute(kind, Plan(control), mask, backend="composed"), values(prob, v)) <= TOLERANCE


@both
def test_source(kind: str) -> None:
    q, k, v, rope = streams(kind)
    source = {"q": torch.tensor([1, 1]), "k": torch.tensor([0, 1]), "v": torch.tensor([1, 0])}
    q, k, v = q[source["q"]], k[source["k"]], v[source["v"]]
    expected = values(softmax(rotate(q, rope), rotate(k, rope)), v)
    assert relative(execute(kind, Plan(source=source)), expected) <= TOLERANCE


@both
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "by item"])
@pytest.mark.parametrize("place", ["first", "between", "last"])
def test_extra_keys(kind: str, shared: bool, place: str) -> None:
    q, k, v, rope = streams(kind)
    registers = torch.randn(2, 1 if shared else 2, 4, HEADS, DIM)
    order = {"prompt": TEXT, "rest": IMAGE}
    names = {"first": ["r", *order], "between": ["prompt", "r", "rest"], "last": [*order, "r"]}[place]
    keys = fb.Segments({name: 4 if name == "r" else order[name] for name in names})
    control = fb.Control(fb.Segments(order), keys, weight={("rest", "r"): 0.4})
    plan = Plan(control, extra={"r": (registers[0], registers[1])}, source={"v": torch.tensor([1, 0])})
    prob = softmax(rotate(q, rope), torch.cat([rotate(k, rope), registers[0].expand(2, -1, -1, -1)], 1))
    prob[:, :, TEXT:, TOKENS:] *= 0.4
    expected = values(prob, torch.cat([v[[1, 0]], registers[1].expand(2, -1, -1, -1)], 1))
    assert relative(execute(kind, plan), expected) <= TOLERANCE


def test_extra_keys_are_read_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict = {}

    def spy(q, k, v, control=None, **options):
        seen.update(k=k, v=v)
        return fb.attention(q, k, v, control, **options)

    monkeypatch.setattr("flashbrush.integrations.diffusers.protocol.plan_call.attention", spy)
    registers = torch.randn(2, 1, 4, HEADS, DIM)
    rows = fb.Segments(prompt=TEXT, rest=IMAGE)
    control = fb.Control(rows, fb.Segments(prompt=TEXT, rest=IMAGE, r=4))
    execute("double", Plan(control, extra={"r": (registers[0], registers[1])}))
    assert (
        seen["k"][2].data_ptr() == registers[0].data_ptr()
        and seen["v"][2].data_ptr() == registers[1].data_ptr()
    )
    prompt, rest = seen["k"][:2]
    assert rest.data_ptr() == prompt.data_ptr() + TEXT * prompt.stride(1) * prompt.element_size()


@both
def test_offsets_go_between_norm_and_rope(kind: str) -> None:
    q, k, v, rope = streams(kind)
    q_offset, k_offset = torch.randn(1, TOKENS, HEADS, DIM), torch.randn(TOKENS, 1, DIM)
    expected = values(softmax(rotate(q + q_offset, rope), rotate(k + k_offset, rope)), v)
    assert relative(execute(kind, Plan(q_offset=q_offset, k_offset=k_offset)), expected) <= TOLERANCE
    only_q = values(softmax(rotate(q + q_offset, rope), rotate(k, rope)), v)
    assert relative(execute(kind, Plan(q_offset=q_offset)), only_q) <= TOLERANCE


@both
def test_transforms_of_query_and_value(kind: str) -> None:
    q, k, v, rope = streams(kind)
    mixer = torch.randn(TOKENS, TOKENS) / TOKENS**0.5

    def mean(x: Tensor) -> Tensor:
        return x.mean(1, keepdim=True).expand_as(x)

    def mix(x: Tensor) -> Tensor:
        return torch.einsum("mn,bnhd->bmhd", mixer, x)

    expected = values(softmax(mean(rotate(q, rope)), rotate(k, rope)), mix(v))
    assert relative(execute(kind, Plan(query=mean, value=mix)), expected) <= TOLERANCE


def test_a_transform_that_changes_the_shape_raises() -> None:
    with pytest.raises(ValueError, match=r"Plan\.query"):
        execute("single", Plan(query=lambda q: q[:, :3]))
    with pytest.raises(ValueError, match=r"Plan\.value"):
        execute("single", Plan(value=lambda v: v.flatten(2)))


@both
@pytest.mark.parametrize("shared", [True, False])
def test_an_order_sorts_tokens_for_the_control_alone(kind: str, shared: bool) -> None:
    q, k, v, rope = streams(kind)
    marked = torch.rand(2, TOKENS) < 0.4
    marked[1] = marked[0] if shared else marked[1]
    segments, order, _ = fb.Segments.from_labels((marked[0] if shared else marked).int(), ["rest", "marked"])
    control = fb.Control(segments, weight={("marked", "rest"): 1.7}, bias={("rest", "marked"): 0.6})
    prob = softmax(
        rotate(q, rope), rotate(k, rope), 0.6 * (~marked[:, None, :, None] & marked[:, None, None, :])
    )
    prob = prob * (1 + 0.7 * (marked[:, None, :, None] & ~marked[:, None, None, :]))
    offset = torch.zeros(TOKENS, HEADS, DIM)
    assert relative(execute(kind, Plan(control, order=order, q_offset=offset)), values(prob, v)) <= TOLERANCE


def test_orders_that_do_not_fit_raise() -> None:
    with pytest.raises(ValueError, match=r"Plan\.order: .*shape"):
        Plan(order=torch.arange(TOKENS - 1)).check(Layer(0, "double", None, HEADS, DIM, TEXT, IMAGE, 2))
    with pytest.raises(NotImplementedError, match="order"):
        execute("single", Plan(order=torch.arange(TOKENS)), torch.ones(1, 1, 1, TOKENS).bool())


def test_extra_keys_under_a_mask_raise() -> None:
    control = fb.Control(fb.Segments(all=TOKENS), fb.Segments(all=TOKENS, r=4))
    registers = torch.randn(1, 4, HEADS, DIM)
    with pytest.raises(NotImplementedError, match="extra keys"):
        execute(
            "single", Plan(control, extra={"r": (registers, registers)}), torch.ones(1, 1, 1, TOKENS).bool()
        )


PAIR = (torch.zeros(1, 4, HEADS, DIM), torch.zeros(1, 4, HEADS, DIM))


@pytest.mark.parametrize(
    ("fields", "error", "match"),
    [
        ({"control": "weight"}, TypeError, r"Plan\.control"),
        ({"source": {"keys": torch.tensor([0])}}, ValueError, r"Plan\.source"),
        ({"source": {"k": [0]}}, TypeError, r"Plan\.source"),
        ({"extra": {"r": PAIR}}, ValueError, r"Plan\.extra"),
        ({"extra": {"r": PAIR}, "control": fb.Control(fb.Segments(all=TOKENS))}, ValueError, "all"),
        (
            {
                "extra": {"r": PAIR[0]},
                "control": fb.Control(fb.Segments(all=TOKENS), fb.Segments(all=TOKENS, r=4)),
            },
            TypeError,
            "pair",
        ),
        ({"q_offset": 1.0}, TypeError, r"Plan\.q_offset"),
        ({"k_offset": [1.0]}, TypeError, r"Plan\.k_offset"),
        ({"query": torch.zeros(1)}, TypeError, r"Plan\.query"),
        ({"order": [1, 0]}, TypeError, r"Plan\.order"),
        (
            {"order": torch.zeros(2, 3).long(), "source": {"q": torch.tensor([0, 1])}},
            ValueError,
            r"Plan\.order",
        ),
        ({"value": 2}, TypeError, r"Plan\.value"),
    ],
)
def test_malformed_plans(fields: dict, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        Plan(**fields)


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


def test_fill_and_kontext_pipelines() -> None:
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
