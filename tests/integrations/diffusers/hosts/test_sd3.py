"""SD 3 beyond the contract: its grid, skipped layers, and processors that are refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from diffusers import SD3Transformer2DModel
from diffusers.models.attention_processor import PAGJointAttnProcessor2_0, SD3IPAdapterJointAttnProcessor2_0

from flashbrush.integrations.diffusers import Layer, Plan, Step, apply

from ...methods.eager import run
from ...tiny import relative
from ..tiny_images import sd3_call, tiny_sd3


class Recorder:
    """A method that records the layers and leaves them plain."""

    def __init__(self) -> None:
        self.asked: list[Layer] = []

    def plan(self, layer: Layer, step: Step) -> Plan:
        self.asked.append(layer)
        return Plan()


def test_grid_counts_patches() -> None:
    model, method = tiny_sd3(qk_norm="rms_norm", dual=(0, 1)), Recorder()
    with apply(model, method):
        run(model, sd3_call(side=(8, 12)))
    assert {(layer.grid, layer.image_len) for layer in method.asked} == {((4, 6), 24)}


def test_skipped_layers_equal_the_stock_model() -> None:
    model = tiny_sd3()
    call = sd3_call()
    stock, skipped = run(model, call), run(model, call | {"skip_layers": [1]})
    with apply(model):
        assert relative(run(model, call | {"skip_layers": [1]}), skipped) <= 1e-5 < relative(skipped, stock)


def ip_adapter(model: SD3Transformer2DModel) -> None:
    adapter = SD3IPAdapterJointAttnProcessor2_0(hidden_size=32, ip_hidden_states_dim=32, head_dim=8)
    model.transformer_blocks[1].attn.set_processor(adapter)


@pytest.mark.parametrize(
    ("prepare", "match"),
    [
        (ip_adapter, "layer 1 .*SD3IPAdapterJointAttnProcessor2_0"),
        (lambda model: model.set_attn_processor(PAGJointAttnProcessor2_0()), "PAGJoint"),
    ],
    ids=["IP-Adapter", "PAG"],
)
def test_refuses_processors(prepare: Callable, match: str) -> None:
    model = tiny_sd3()
    prepare(model)
    with pytest.raises(TypeError, match=match):
        apply(model)


@pytest.mark.parametrize("dual", [(), (0, 1)], ids=["SD 3.5", "SD 3.5 medium"])
def test_refuses_fused_projections_that_leave_norms_out(dual: tuple[int, ...]) -> None:
    model = tiny_sd3(qk_norm="rms_norm", dual=dual)
    model.fuse_qkv_projections()
    with pytest.raises(TypeError, match=r"unfuse_qkv_projections\(\) first"):
        apply(model)
