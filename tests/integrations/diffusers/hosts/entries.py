"""One entry per host, for test_contract.py. A new host adds its entry here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.attention_processor import (
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    FusedJointAttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
    JointAttnProcessor2_0,
    PAGJointAttnProcessor2_0,
)
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxIPAdapterAttnProcessor
from torch import nn

from flashbrush.integrations.diffusers import (
    FluxControlledAttnProcessor,
    SD3ControlledAttnProcessor,
    UNetControlledAttnProcessor,
)

from ...tiny import COLUMNS, ROWS, TEXT as FLUX_TEXT, tiny_call, tiny_flux
from ..tiny_images import CONFIGS, SD15, SIDE, TEXT, sd3_call, tiny_sd3, tiny_unet, unet_call


@dataclass(frozen=True)
class Entry:
    """A host's tiny models, and what the contract expects of them.

    Attributes:
        model: builds the random model of most tests, in which every kind of layer occurs.
        call: (model, batch) -> arguments of model.forward.
        processor: our processor's class.
        stock: the stock processor that ours is a drop-in for.
        kinds: Layer.kind of the model's layers, in the order of the forward pass.
        text_len: text tokens of the call.
        image_lens: image tokens of each layer.
        sizes: handle.prepare() for the call, without the batch.
        other_sizes: the image's size in the form that the host does not take.
        image: the argument of forward that is the image.
        processor_kwargs: the argument of forward whose entries reach the processors.
        lora: modules that a LoRA is put on.
        foreign: puts a processor that ours cannot replace into the model.
        variants: further models, by name, for which plain attention must equal the stock model's.
        fusable: builds the model for tests of fused projections.
        fused: the processor of a model with fused projections.
        masked: (model, call) -> call with a mask that removes text tokens of item 0; None: the host refuses
            masks.
        compilations: the most that compiling each block may cause, however many blocks there are.
        whole: builds the smallest model, for compiling it whole.
    """

    model: Callable[[], Any]
    call: Callable[[Any, int], dict[str, Any]]
    processor: type
    stock: type
    kinds: list[str]
    text_len: int
    image_lens: list[int]
    sizes: dict[str, Any]
    other_sizes: dict[str, Any]
    image: str
    processor_kwargs: str
    lora: list[str]
    foreign: Callable[[Any], None]
    fusable: Callable[[], Any]
    fused: type
    masked: Callable[[Any, dict], dict] | None
    compilations: int
    whole: Callable[[], Any]
    variants: Mapping[str, Callable[[], Any]] = field(default_factory=dict)

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """The modules that hold attention modules, as compile_repeated_blocks compiles them."""
        return [
            module for module in model.modules() if any(hasattr(c, "processor") for c in module.children())
        ]


ONE_LEVEL = SD15 | {
    "block_out_channels": (32,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("UpBlock2D",),
}


def _flux_masked(model: Any, call: dict) -> dict:
    mask = torch.ones(call["hidden_states"].shape[0], 1, 1, FLUX_TEXT + ROWS * COLUMNS, dtype=torch.bool)
    mask[0, ..., 3:FLUX_TEXT] = False
    return call | {"joint_attention_kwargs": {"attention_mask": mask}}


def _unet_masked(model: Any, call: dict) -> dict:
    mask = torch.ones(call["sample"].shape[0], TEXT)
    mask[0, 3:] = 0
    return call | {"encoder_attention_mask": mask}


def _unet_foreign(model: Any) -> None:
    attn = model.mid_block.attentions[0].transformer_blocks[0].attn2
    attn.set_processor(IPAdapterAttnProcessor2_0(64, 12))


ENTRIES = {
    "flux": Entry(
        model=tiny_flux,
        call=lambda model, batch: tiny_call(model, batch=batch),
        processor=FluxControlledAttnProcessor,
        stock=FluxAttnProcessor,
        kinds=["double", "double", "single", "single"],
        text_len=FLUX_TEXT,
        image_lens=[ROWS * COLUMNS] * 4,
        sizes={"text_len": FLUX_TEXT, "image_len": ROWS * COLUMNS},
        other_sizes={"latents": (8, 8)},
        image="hidden_states",
        processor_kwargs="joint_attention_kwargs",
        lora=["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_v_proj", "to_add_out"],
        foreign=lambda model: model.set_attn_processor(FluxIPAdapterAttnProcessor(128, 16)),
        fusable=tiny_flux,
        fused=FluxAttnProcessor,
        masked=_flux_masked,
        compilations=4,
        whole=lambda: tiny_flux(double=1, single=1),
    ),
    "sd3": Entry(
        model=lambda: tiny_sd3(qk_norm="rms_norm", dual=(0, 1)),  # as SD 3.5 medium
        call=lambda model, batch: sd3_call(batch=batch),
        processor=SD3ControlledAttnProcessor,
        stock=JointAttnProcessor2_0,
        kinds=["joint", "self", "joint", "self", "joint"],
        text_len=TEXT,
        image_lens=[SIDE * SIDE // 4] * 5,
        sizes={"text_len": TEXT, "latents": (SIDE, SIDE)},
        other_sizes={"image_len": 16},
        image="hidden_states",
        processor_kwargs="joint_attention_kwargs",
        lora=["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_v_proj"],
        foreign=lambda model: model.set_attn_processor(PAGJointAttnProcessor2_0()),
        fusable=tiny_sd3,
        fused=FusedJointAttnProcessor2_0,
        masked=None,
        compilations=3,  # joint blocks, those with a second attention, and the last one
        whole=lambda: tiny_sd3(layers=2),
        variants={
            "SD 3": tiny_sd3,
            "SD 3.5": lambda: tiny_sd3(qk_norm="rms_norm"),
            "layer norm": lambda: tiny_sd3(qk_norm="layer_norm", dual=(2,)),
        },
    ),
    "unet": Entry(
        model=tiny_unet,
        call=lambda model, batch: unet_call(model, batch=batch),
        processor=UNetControlledAttnProcessor,
        stock=AttnProcessor2_0,
        kinds=["self", "cross"] * 7,
        text_len=TEXT,
        image_lens=[64] * 2 + [16] * 8 + [64] * 4,
        sizes={"text_len": TEXT, "latents": (SIDE, SIDE)},
        other_sizes={"image_len": 64},
        image="sample",
        processor_kwargs="cross_attention_kwargs",
        lora=["to_q", "to_k", "to_v", "to_out.0"],
        foreign=_unet_foreign,
        fusable=tiny_unet,
        fused=FusedAttnProcessor2_0,
        masked=_unet_masked,
        compilations=4,
        whole=lambda: tiny_unet(ONE_LEVEL),
        variants={name: lambda config=config: tiny_unet(config) for name, config in CONFIGS.items()},
    ),
}
