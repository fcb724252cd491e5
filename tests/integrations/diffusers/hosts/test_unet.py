"""UNets beyond the contract: every option of a layer, added keys, masks, families of models."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import (
    Attention,
    AttnAddedKVProcessor2_0,
    AttnProcessor,
    AttnProcessor2_0,
    CustomDiffusionAttnProcessor,
    IPAdapterAttnProcessor2_0,
    SlicedAttnProcessor,
)
from torch import Tensor

import flashbrush as fb
from flashbrush.integrations.diffusers import Layer, Plan, Step, UNetControlledAttnProcessor, apply

from ...tiny import relative
from ..tiny_images import ADDED, CONFIGS, SD2, SD15, SDXL, SIDE, TEXT, randomise, tiny_unet, unet_call

TOLERANCE = 1e-5  # float32, relative to the largest output


@torch.no_grad()
def forward(model: UNet2DConditionModel, call: dict, **more) -> Tensor:
    return model(**call, **more, return_dict=False)[0]


@pytest.mark.parametrize("processor", [AttnProcessor, AttnProcessor2_0])
@pytest.mark.parametrize("upcast", [False, True])
def test_upcast_attention_and_the_eager_processor_equal_the_stock_model(
    processor: type, upcast: bool
) -> None:
    model = tiny_unet(SD2, upcast_attention=upcast)
    model.set_attn_processor(processor())
    call = unet_call(model)
    stock = forward(model, call)
    with apply(model):
        assert relative(forward(model, call), stock) <= TOLERANCE
    assert all(type(p) is processor for p in model.attn_processors.values())


@pytest.mark.parametrize("config", ["SDXL", "without transformers"])
def test_fused_projections_equal_the_stock_model(config: str) -> None:
    model = tiny_unet(CONFIGS[config])
    call = unet_call(model)
    stock = forward(model, call)
    model.fuse_qkv_projections()
    fused = forward(model, call)
    with apply(model):
        assert relative(forward(model, call), fused) <= TOLERANCE
    # The stock model leaves the fused weights behind when it takes them apart; ours must not use them then.
    model.unfuse_qkv_projections()
    for module in model.modules():
        if isinstance(module, Attention):
            for name in ("to_qkv", "to_kv"):
                if hasattr(module, name):
                    getattr(module, name).weight.data.fill_(math.nan)
    with apply(model):
        assert relative(forward(model, call), stock) <= TOLERANCE


@pytest.mark.parametrize("config", ["SDXL", "added keys"])
def test_text_masks_equal_the_stock_model(config: str) -> None:
    model = tiny_unet(CONFIGS[config])
    call = unet_call(model)
    text = torch.ones(2, TEXT)
    text[0, 3:] = 0
    stock, bare = forward(model, call, encoder_attention_mask=text), forward(model, call)
    assert relative(stock, bare) > 1e-3
    with apply(model):
        assert relative(forward(model, call, encoder_attention_mask=text), stock) <= TOLERANCE
    with apply(model, Constant(1.0), backend="composed"):
        assert relative(forward(model, call, encoder_attention_mask=text), stock) <= TOLERANCE


def test_image_mask_equals_the_stock_model() -> None:
    """Only models of one resolution can take it."""
    model = tiny_unet(
        SD15
        | {
            "down_block_types": ("CrossAttnDownBlock2D",),
            "up_block_types": ("CrossAttnUpBlock2D",),
            "block_out_channels": (32,),
        }
    )
    call = unet_call(model)
    mask = torch.ones(2, SIDE * SIDE)
    mask[1, 20:] = 0
    stock = forward(model, call, attention_mask=mask)
    assert relative(stock, forward(model, call)) > 1e-3
    with apply(model):
        assert relative(forward(model, call, attention_mask=mask), stock) <= TOLERANCE
        model.set_attention_backend("native")
        assert relative(forward(model, call, attention_mask=mask), stock) <= TOLERANCE
        model.reset_attention_backend()


def attention_layer(**options) -> Attention:
    attn = Attention(query_dim=32, heads=4, dim_head=8, **options).eval()
    randomise(attn)
    return attn


CROSS = {"cross_attention_dim": 12}
LAYERS = {
    "self": {},
    "cross": CROSS,
    "biases": CROSS | {"bias": True, "out_bias": False},
    "group norm": {"norm_num_groups": 8},
    "group norm, cross": CROSS | {"norm_num_groups": 8},
    "spatial norm": {"spatial_norm_dim": 5, "norm_num_groups": 8},
    "norm of the text": CROSS | {"cross_attention_norm": "layer_norm"},
    "group norm of the text": CROSS
    | {"cross_attention_norm": "group_norm", "cross_attention_norm_num_groups": 4},
    "q and k norms": {"qk_norm": "layer_norm"},
    "q and k rms norms": CROSS | {"qk_norm": "rms_norm"},
    "residual": {"residual_connection": True, "rescale_output_factor": 1.7, "norm_num_groups": 8},
    "rescaled": CROSS | {"rescale_output_factor": 0.6},
}


@torch.no_grad()
@pytest.mark.parametrize("image", [False, True], ids=["tokens", "image"])
@pytest.mark.parametrize("case", LAYERS)
def test_every_option_of_a_layer_equals_the_stock_processor(case: str, image: bool) -> None:
    attn = attention_layer(**LAYERS[case])
    torch.manual_seed(2)
    if attn.spatial_norm is not None and not image:
        pytest.skip("a spatial norm is for images")
    x = torch.randn(2, 32, 4, 6) if image else torch.randn(2, 24, 32)
    text = torch.randn(2, 7, 12) if "cross_attention_dim" in LAYERS[case] else None
    more = {"temb": torch.randn(2, 5, 4, 6)} if attn.spatial_norm is not None else {}
    keys = 24 if text is None else 7
    masks = [None, torch.randn(2, 1, keys), torch.randn(2, 24, keys), torch.randn(2 * 4, 24, keys)]
    for mask in masks:
        stock = AttnProcessor2_0()(attn, x, text, mask, **more)
        mine = UNetControlledAttnProcessor()(attn, x, text, mask, **more)
        assert mine.shape == stock.shape and relative(mine, stock) <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("only", [False, True], ids=["text and image", "text only"])
@pytest.mark.parametrize("norm", [None, "layer_norm", "group_norm"])
def test_added_keys_equal_the_stock_processor(norm: str | None, only: bool) -> None:
    options = {
        "cross_attention_dim": 32,
        "added_kv_proj_dim": 16 if norm != "layer_norm" else 32,
        "norm_num_groups": 8,
        "cross_attention_norm": norm,
        "cross_attention_norm_num_groups": 4,
        "only_cross_attention": only,
        "bias": True,
    }
    attn = attention_layer(**options, processor=AttnAddedKVProcessor2_0())
    torch.manual_seed(2)
    x, text = torch.randn(2, 32, 4, 6), torch.randn(2, 7, options["added_kv_proj_dim"])
    masks = [None] if only else [None, torch.randn(2, 1, 7), torch.randn(2, 1, 7 + 24)]
    for mask in masks:
        # The stock processor pads a mask by the image's tokens whenever it is not as long as these.
        whole = mask is not None and mask.shape[-1] > 7
        stock = AttnAddedKVProcessor2_0()(attn, x, text, None if whole else mask)
        mine = UNetControlledAttnProcessor()(attn, x, text, torch.zeros_like(mask) if whole else mask)
        assert mine.shape == stock.shape and relative(mine, stock) <= TOLERANCE
    if norm is None and not only:
        own = attention_layer(**(options | {"added_kv_proj_dim": 32}), processor=AttnAddedKVProcessor2_0())
        assert relative(UNetControlledAttnProcessor()(own, x), AttnAddedKVProcessor2_0()(own, x)) <= TOLERANCE


def test_a_mask_of_another_shape_raises() -> None:
    attn, x = attention_layer(), torch.randn(2, 24, 32)
    for shape in ((2, 1, 23), (3, 1, 24), (2, 1, 1, 24)):
        with pytest.raises(ValueError, match="attention_mask"):
            UNetControlledAttnProcessor()(attn, x, None, torch.zeros(shape))


class Constant:
    """A method that weighs all keys of a layer by one number, which for 1 is plain attention through the
    tables.
    """

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def plan(self, layer: Layer, step) -> Plan:
        segments = fb.Segments(rows=layer.rows), fb.Segments(keys=layer.keys)
        return Plan(fb.Control(*segments, weight={("*", "*"): self.weight}))


# Layers


class Recorder:
    def __init__(self) -> None:
        self.asked: list[Layer] = []

    def plan(self, layer: Layer, step: Step) -> Plan:
        self.asked.append(layer)
        return Plan()


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("side", [(8, 8), (8, 12), (7, 10)], ids=str)
def test_layers_match_the_attention_calls_of_a_forward_pass(config: str, side: tuple[int, int]) -> None:
    if "added" in config and side[0] % 2:
        pytest.skip("those blocks take even sizes only")
    model, method = tiny_unet(CONFIGS[config]), Recorder()
    call = unet_call(model, side=side)
    seen: list[tuple] = []
    names = {id(module): name for name, module in model.named_modules()}
    hooks = []

    def note(module, args, kwargs) -> None:
        x, text = args[0], kwargs.get("encoder_hidden_states")
        x = x.flatten(2).transpose(1, 2) if x.dim() == 4 else x
        seen.append((names[id(module)].split("_")[0], x.shape[1], text is not None, x.shape[0]))

    for module in model.modules():
        if isinstance(module, Attention):
            hooks.append(module.register_forward_pre_hook(note, with_kwargs=True))
    with apply(model, method):
        forward(model, call)
    assert len(seen) == len(method.asked)
    for i, (layer, (place, tokens, with_text, batch)) in enumerate(zip(method.asked, seen, strict=True)):
        assert (layer.index, layer.place, layer.image_len, layer.batch) == (i, place, tokens, batch)
        assert (layer.kind != "self") is with_text and layer.text_len == TEXT * with_text
        assert layer.rows == tokens and layer.keys == (TEXT if with_text else 0) + tokens * (
            layer.kind != "cross"
        )
        assert layer.grid is not None and layer.grid[0] * layer.grid[1] == tokens


def test_padding_on_one_side_rounds_down() -> None:
    model, method = tiny_unet(downsample_padding=0), Recorder()
    with apply(model, method):
        forward(model, unet_call(model, side=(9, 7)))
    assert {layer.grid for layer in method.asked} == {(9, 7), (4, 3)}


@pytest.mark.parametrize(
    ("layers", "expected"),
    [("down", [0, 1, 2, 3]), (["mid", 0], [0, 4, 5]), ("up", list(range(6, 14)))],
    ids=["down", "mid and an index", "up"],
)
def test_layers_are_selected_by_place(layers: str | list[str | int], expected: list[int]) -> None:
    model, method = tiny_unet(), Recorder()
    with apply(model, method, layers=layers):
        forward(model, unet_call(model))
    assert [layer.index for layer in method.asked] == expected


# What it refuses


def ip_adapter(model: Any) -> None:
    model.mid_block.attentions[0].transformer_blocks[0].attn2.set_processor(IPAdapterAttnProcessor2_0(64, 12))


def trained(model: Any) -> None:
    layer = model.up_blocks[0].attentions[0].transformer_blocks[0].attn2
    layer.set_processor(CustomDiffusionAttnProcessor(hidden_size=64, cross_attention_dim=12))


def sliced(model: Any) -> None:
    model.set_attn_processor(SlicedAttnProcessor(2))


def unscaled(model: Any) -> None:
    model.mid_block.attentions[0].transformer_blocks[0].attn1.scale_qk = False


@pytest.mark.parametrize(
    ("prepare", "error", "match"),
    [
        (ip_adapter, TypeError, "layer 5 .*IPAdapterAttnProcessor2_0"),
        (trained, TypeError, "CustomDiffusionAttnProcessor"),
        (sliced, TypeError, "SlicedAttnProcessor"),
        (unscaled, NotImplementedError, "scale_qk"),
        (lambda model: model.set_attn_processor(AttnAddedKVProcessor2_0()), TypeError, "without added keys"),
    ],
)
def test_refuses_processors(prepare, error: type[Exception], match: str) -> None:
    model = tiny_unet()
    prepare(model)
    before = list(model.attn_processors.values())
    with pytest.raises(error, match=match):
        apply(model)
    assert all(a is b for a, b in zip(model.attn_processors.values(), before, strict=True))


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (SD15 | {"attention_type": "gated", "attention_head_dim": 8}, "GLIGEN"),
        (SD15 | {"dual_cross_attention": True}, "dual_cross_attention"),
        (SD15 | {"encoder_hid_dim_type": "image_proj", "encoder_hid_dim": 6}, "image_proj"),
        (
            {
                "block_out_channels": (32, 64),
                "down_block_types": ("KDownBlock2D", "KCrossAttnDownBlock2D"),
                "up_block_types": ("KCrossAttnUpBlock2D", "KUpBlock2D"),
                "mid_block_type": None,
                "attention_head_dim": 8,
            },
            "KDownBlock2D",
        ),
    ],
)
def test_refuses_models(config: dict, match: str) -> None:
    with pytest.raises(NotImplementedError, match=match):
        apply(tiny_unet(config))


def test_projections_fused_under_control_raise() -> None:
    model = tiny_unet(SDXL)
    apply(model)
    model.fuse_qkv_projections()
    with pytest.raises(RuntimeError, match="FusedAttnProcessor2_0"):
        forward(model, unet_call(model))


def test_a_plan_of_the_wrong_size_raises() -> None:
    model = tiny_unet(ADDED)

    class Wrong:
        def plan(self, layer: Layer, step) -> Plan:
            return Plan(fb.Control(fb.Segments(all=layer.rows)))

    with (
        apply(model, Wrong()),
        pytest.raises(ValueError, match=r"Plan\.control\.keys: 16 tokens for layer 0 \(added\)"),
    ):
        forward(model, unet_call(model))
