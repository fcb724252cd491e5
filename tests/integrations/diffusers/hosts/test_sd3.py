"""SD3ControlledAttnProcessor against the stock processor, and plans against eager arithmetic."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.attention_processor import (
    FusedJointAttnProcessor2_0,
    JointAttnProcessor2_0,
    PAGJointAttnProcessor2_0,
    SD3IPAdapterJointAttnProcessor2_0,
)
from torch import Tensor

import flashbrush as fb
from flashbrush.integrations.diffusers import Layer, Part, Plan, SD3ControlledAttnProcessor, apply

from ...tiny import relative
from ..tiny_images import TEXT, sd3_call, tiny_sd3

IMAGE, HEADS, DIM = 16, 4, 8  # patches of 2 x 2 of 8 x 8 latents
TOLERANCE = 1e-5  # float32, relative to the largest output
MODELS = {
    "SD 3": {},
    "SD 3.5": {"qk_norm": "rms_norm"},
    "SD 3.5 medium": {"qk_norm": "rms_norm", "dual": (0, 1)},
    "layer norm": {"qk_norm": "layer_norm", "dual": (2,)},
}


@torch.no_grad()
def forward(model: SD3Transformer2DModel, call: dict, **more) -> Tensor:
    return model(**call, **more, return_dict=False)[0]


@pytest.mark.parametrize("name", MODELS)
def test_plain_equals_stock(name: str) -> None:
    model = tiny_sd3(**MODELS[name])
    call, before = sd3_call(), list(model.attn_processors.values())
    stock = forward(model, call)
    with apply(model) as handle:
        assert all(type(p) is SD3ControlledAttnProcessor for p in model.attn_processors.values())
        assert relative(forward(model, call), stock) <= TOLERANCE
        assert relative(forward(model, call, skip_layers=[1]), stock) > 1e-3
        assert handle.stats == []
    assert all(a is b for a, b in zip(model.attn_processors.values(), before, strict=True))
    assert torch.equal(forward(model, call), stock)


@pytest.mark.parametrize("kind", ["joint", "self"])
def test_the_tiny_model_depends_on_its_attention(kind: str) -> None:
    model = tiny_sd3(**MODELS["SD 3.5 medium"])
    call = sd3_call()
    stock = forward(model, call)

    class Uniform:
        def plan(self, layer: Layer, step) -> Plan:
            return Plan(query=torch.zeros_like)

    with apply(model, Uniform(), layers=kind):
        assert relative(forward(model, call), stock) > 1e-2


def test_fused_projections() -> None:
    model = tiny_sd3()
    call = sd3_call()
    stock = forward(model, call)
    model.fuse_qkv_projections()
    with apply(model):
        assert relative(forward(model, call), stock) <= TOLERANCE
    assert all(type(p) is FusedJointAttnProcessor2_0 for p in model.attn_processors.values())
    model.unfuse_qkv_projections()
    for block in model.transformer_blocks:
        block.attn.to_qkv.weight.data.fill_(math.nan)
    with apply(model):
        assert relative(forward(model, call), stock) <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits_err_no_more_than_stock(dtype: torch.dtype) -> None:
    model = tiny_sd3(**MODELS["SD 3.5 medium"])
    call = sd3_call()
    truth = forward(model, call)
    model.to(dtype)
    half = {n: t.to(dtype) for n, t in call.items()}
    stock = relative(forward(model, half).float(), truth)
    with apply(model):
        ours = forward(model, half)
    assert ours.dtype == dtype
    assert relative(ours.float(), truth) <= 1.5 * stock


def test_gradient() -> None:
    model = tiny_sd3(**MODELS["SD 3.5 medium"]).requires_grad_(False)
    call = sd3_call()
    call["hidden_states"].requires_grad_(True)

    def gradient() -> Tensor:
        (grad,) = torch.autograd.grad(model(**call).sample.square().sum(), call["hidden_states"])
        return grad

    stock = gradient()
    with apply(model):
        assert relative(gradient(), stock) <= 1e-4


def test_signature_is_the_stock_processor_s() -> None:
    stock = inspect.signature(JointAttnProcessor2_0.__call__).parameters
    mine = inspect.signature(SD3ControlledAttnProcessor.__call__).parameters
    assert list(mine) == [name for name in stock if name not in ("args", "kwargs")]


# Plans


def attention_module(qk_norm: str | None, last: bool) -> Any:
    blocks: Any = tiny_sd3(qk_norm=qk_norm, layers=2).transformer_blocks
    return blocks[1 if last else 0].attn


def split(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, DIM))


def norm(layer, x: Tensor) -> Tensor:
    return x if layer is None else layer(x)


def softmax(q: Tensor, k: Tensor) -> Tensor:
    """(batch, heads, rows, keys)"""
    return torch.softmax(torch.einsum("bmhd,bnhd->bhmn", q, k) / math.sqrt(DIM), -1)


@torch.no_grad()
@pytest.mark.parametrize("last", [False, True], ids=["", "last block"])
@pytest.mark.parametrize("qk_norm", [None, "rms_norm"])
def test_every_part_of_a_plan(qk_norm: str | None, last: bool) -> None:
    """One call with weights, groups, sources, extra keys, offsets and transforms, in the order [text ;
    image].
    """
    attn = attention_module(qk_norm, last)
    torch.manual_seed(3)
    image, text = torch.randn(2, IMAGE, 32), torch.randn(2, TEXT, 32)
    registers = torch.randn(2, 1, 3, HEADS, DIM)
    q_offset, k_offset = torch.randn(2, TEXT + IMAGE, 1, DIM), torch.randn(1, TEXT + IMAGE, HEADS, DIM)
    gate = torch.rand(2, TEXT + IMAGE)
    keys = fb.Segments(prompt=TEXT, picture=IMAGE, register=3)
    control = fb.Control(
        fb.Segments(prompt=TEXT, picture=IMAGE),
        keys,
        weight={("picture", "prompt"): 1.7},
        groups={"own": ["prompt", "picture"], "more": ["register"]},
        gates={"more": gate},
    )
    source = {"q": torch.tensor([0, 1]), "k": torch.tensor([1, 0]), "v": torch.tensor([1, 1])}
    plan = Plan(
        control,
        source=source,
        extra={"register": (registers[0], registers[1])},
        q_offset=q_offset,
        k_offset=k_offset,
        query=lambda q: q * 0.8,
        value=lambda v: v.roll(1, 1),
        scale=0.5 / math.sqrt(DIM),
    )
    processor = SD3ControlledAttnProcessor(plan, collect=True)
    mine = processor(attn, image, text)

    q = torch.cat(
        [norm(attn.norm_added_q, split(attn.add_q_proj(text))), norm(attn.norm_q, split(attn.to_q(image)))], 1
    )
    k = torch.cat(
        [norm(attn.norm_added_k, split(attn.add_k_proj(text))), norm(attn.norm_k, split(attn.to_k(image)))], 1
    )
    v = torch.cat([split(attn.add_v_proj(text)), split(attn.to_v(image))], 1).roll(1, 1)
    q, k, v = (q + q_offset) * 0.8 * 0.5, (k + k_offset)[source["k"]], v[source["v"]]
    prob = softmax(q, k)
    prob[:, :, TEXT:, :TEXT] *= 1.7
    extra_k, extra_v = (t.expand(2, -1, -1, -1) for t in registers)
    out = torch.einsum("bhmn,bnhd->bmhd", prob, v)
    out = out + gate[:, :, None, None] * torch.einsum("bhmn,bnhd->bmhd", softmax(q, extra_k), extra_v)
    out = out.flatten(2)
    expected = attn.to_out[0](out[:, TEXT:]), out[:, :TEXT] if last else attn.to_add_out(out[:, :TEXT])
    assert all(relative(a, b) <= TOLERANCE for a, b in zip(mine, expected, strict=True))
    ((items, stats),) = processor.stats
    assert items is None and stats.mass.shape == (2, HEADS, 2, 3)
    torch.testing.assert_close(stats.mass[..., 2].sum(2), torch.full((2, HEADS), float(TEXT + IMAGE)))


class Recorder:
    def __init__(self) -> None:
        self.asked: list[Layer] = []

    def plan(self, layer: Layer, step) -> Plan:
        self.asked.append(layer)
        return Plan(fb.Control(fb.Segments(all=layer.rows)))


def test_layers_and_statistics() -> None:
    model, method = tiny_sd3(**MODELS["SD 3.5 medium"]), Recorder()
    with apply(model, method, stats=True) as handle:
        forward(model, sd3_call(side=(8, 12)))
        masses = [record.stats.mass.sum() for record in handle.stats]
    assert [layer.kind for layer in method.asked] == ["joint", "self", "joint", "self", "joint"]
    assert [layer.text_len for layer in method.asked] == [TEXT, 0, TEXT, 0, TEXT]
    assert {
        (layer.grid, layer.image_len, layer.heads, layer.head_dim, layer.place) for layer in method.asked
    } == {((4, 6), 24, HEADS, DIM, None)}
    for layer, mass in zip(method.asked, masses, strict=True):
        assert layer.rows == layer.keys == 24 + layer.text_len
        torch.testing.assert_close(mass, torch.tensor(2.0 * HEADS * layer.rows))


def test_parts_of_a_batch() -> None:
    """Items 0 and 2 read the keys of the other two, both at once; the rest is as it was."""
    model = tiny_sd3(layers=1)
    call = sd3_call(batch=4)
    stock = forward(model, call)
    first, second = torch.tensor([1, 1]), torch.tensor([3, 3])

    class Readers:
        def plan(self, layer: Layer, step) -> Plan:
            return Plan(parts=[Part((2, 0), {"k": [first, second], "v": [first, second]})])

    seen = {}
    attn: Any = model.transformer_blocks[0].attn
    attn.to_out[0].register_forward_pre_hook(lambda module, args: seen.update(image=args[0].clone()))
    with apply(model, Readers()):
        out = forward(model, call)
    assert relative(out[[1, 3]], stock[[1, 3]]) <= TOLERANCE
    assert relative(out[[0, 2]], stock[[0, 2]]) > 1e-3
    inputs = {}
    attn.register_forward_pre_hook(lambda module, args, kwargs: inputs.update(kwargs), with_kwargs=True)
    forward(model, call)
    with torch.no_grad():
        x, text = inputs["hidden_states"], inputs["encoder_hidden_states"]
        q = split(attn.to_q(x))
        k = torch.cat([split(attn.add_k_proj(text)), split(attn.to_k(x))], 1)
        v = torch.cat([split(attn.add_v_proj(text)), split(attn.to_v(x))], 1)
        for item in (0, 2):
            prob = softmax(q[[item]], torch.cat([k[[1]], k[[3]]], 1))
            expected = torch.einsum("bhmn,bnhd->bmhd", prob, torch.cat([v[[1]], v[[3]]], 1)).flatten(2)
            with apply(model, Readers()):
                forward(model, call)
            assert relative(seen["image"][[item]], expected) <= TOLERANCE


class Weighted:
    """The text weighs `weight` in joint layers, the second half of the image in those of the image alone."""

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def plan(self, layer: Layer, step) -> Plan:
        first = layer.text_len or layer.image_len // 2
        tokens = fb.Segments(first=first, second=layer.rows - first)
        return Plan(fb.Control(tokens, weight={("second", "first"): self.weight}))


def test_compiled_blocks() -> None:
    """Joint blocks, those with a second attention, and the last one: a compilation each, which other numbers
    keep.
    """
    torch._dynamo.reset()
    model = tiny_sd3(**MODELS["SD 3.5 medium"], layers=5)
    call, compiled = sd3_call(), []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    expected = []
    for weight in (1.5, 0.3):
        with apply(model, Weighted(weight)):
            expected.append(forward(model, call))
    for block in model.transformer_blocks:
        block.compile(fullgraph=True, backend=backend)
    with apply(model, Weighted(1.5), stats=True) as handle:
        assert relative(forward(model, call), expected[0]) <= TOLERANCE
        assert len(compiled) == 3 and len(handle.stats) == 7
        handle.method = Weighted(0.3)
        assert relative(forward(model, call), expected[1]) <= TOLERANCE
        assert len(compiled) == 3
    torch._dynamo.reset()


# What it refuses


def ip_adapter(model: SD3Transformer2DModel) -> None:
    adapter = SD3IPAdapterJointAttnProcessor2_0(hidden_size=32, ip_hidden_states_dim=32, head_dim=8)
    model.transformer_blocks[1].attn.set_processor(adapter)


@pytest.mark.parametrize(
    ("prepare", "error", "match"),
    [
        (ip_adapter, TypeError, "layer 1 .*SD3IPAdapterJointAttnProcessor2_0"),
        (lambda model: model.set_attn_processor(PAGJointAttnProcessor2_0()), TypeError, "PAGJoint"),
        (apply, RuntimeError, "already has a flashbrush control"),
    ],
)
def test_refuses_processors(prepare, error: type[Exception], match: str) -> None:
    model = tiny_sd3()
    prepare(model)
    with pytest.raises(error, match=match):
        apply(model)


@pytest.mark.parametrize("name", ["SD 3.5", "SD 3.5 medium"])
def test_refuses_fused_projections_that_leave_norms_out(name: str) -> None:
    model = tiny_sd3(**MODELS[name])
    model.fuse_qkv_projections()
    with pytest.raises(TypeError, match="unfuse_qkv_projections"):
        apply(model)


def test_refuses_an_attention_mask() -> None:
    model = tiny_sd3()
    mask = torch.zeros(2, 1, 1, TEXT + IMAGE)
    with apply(model), pytest.raises(NotImplementedError, match="attention_mask"):
        forward(model, sd3_call(), joint_attention_kwargs={"attention_mask": mask})


def test_refuses_sizes_that_sd3_does_not_take() -> None:
    handle = apply(tiny_sd3(), Recorder())
    with pytest.raises(ValueError, match="latents"):
        handle.prepare(text_len=TEXT, image_len=IMAGE)
    handle.prepare(text_len=TEXT, latents=(8, 8), batch=2)
