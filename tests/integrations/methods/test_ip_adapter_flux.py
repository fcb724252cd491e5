"""IP-Adapters on FLUX against diffusers' own processor."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from flashbrush.integrations import ImagePrompt, InContextBrush, IPAdapter
from flashbrush.integrations.diffusers import Handle, apply, compose

from ..tiny import COLUMNS, ROWS, forward, relative, tiny_call, tiny_flux

TOLERANCE = 1e-5  # float32, relative to the largest output
EMBED, CHANNELS, INNER = 6, 16, 128


def adapter_state(seed: int) -> dict[str, dict[str, Tensor]]:
    """A published adapter's, with 4 tokens and biases, numbered by double blocks."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"weight": (INNER, CHANNELS), "bias": (INNER,)}
    adapter = {
        f"{i}.to_{w}_ip.{part}": torch.randn(shape, generator=generator) * CHANNELS**-0.5
        for i in range(2)
        for w in "kv"
        for part, shape in shapes.items()
    }
    shapes = {"proj.weight": (4 * CHANNELS, EMBED), "proj.bias": (4 * CHANNELS,)}
    shapes |= {"norm.weight": (CHANNELS,), "norm.bias": (CHANNELS,)}
    return {
        "image_proj": {n: torch.randn(s, generator=generator) for n, s in shapes.items()},
        "ip_adapter": adapter,
    }


class AdapterCase:
    """A tiny FLUX with the same adapters as diffusers' processors and as ImagePrompts; the batch is 2."""

    def __init__(self, images: tuple[int, ...] = (1,), **config: Any) -> None:
        self.model, self.twin = tiny_flux(**config), tiny_flux(**config)
        self.call = tiny_call(self.model, batch=2)
        self.states = [adapter_state(seed) for seed in range(len(images))]
        self.embeds = [torch.randn(2, n, EMBED, generator=torch.Generator().manual_seed(n)) for n in images]
        self.prompts = [
            ImagePrompt.load(self.model, s).showing(e) for s, e in zip(self.states, self.embeds, strict=True)
        ]
        self.twin._load_ip_adapter_weights(self.states, low_cpu_mem_usage=False)

    def diffusers(self, scale: Callable[[str], list[float]]) -> Tensor:
        for name, processor in self.twin.attn_processors.items():
            if hasattr(processor, "scale"):
                processor.scale = scale(name)  # type: ignore[union-attr]
        return forward(self.twin, self.call, joint_attention_kwargs={"ip_adapter_image_embeds": self.embeds})


@pytest.mark.parametrize(("images", "scale"), [((1,), [0.7]), ((1, 2), [1.0, 0.4])])
def test_matches_diffusers(images: tuple[int, ...], scale: list[float]) -> None:
    case = AdapterCase(images)
    plain = forward(case.model, case.call)
    with apply(case.model, IPAdapter(case.prompts, scale)):
        out = forward(case.model, case.call)
    assert relative(out, case.diffusers(lambda _: scale)) <= TOLERANCE < 1e-2 < relative(out, plain)
    assert torch.equal(forward(case.model, case.call), plain)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in case.model.modules())


def test_projections_fused_before_match_diffusers() -> None:
    case = AdapterCase()
    case.model.fuse_qkv_projections()
    with apply(case.model, IPAdapter(case.prompts)):
        assert relative(forward(case.model, case.call), case.diffusers(lambda _: [1.0])) <= TOLERANCE


def test_lora_loaded_and_deleted_under_control_matches_diffusers() -> None:
    peft = pytest.importorskip("peft")
    case = AdapterCase()
    with apply(case.model, IPAdapter(case.prompts)):
        before = forward(case.model, case.call)
        torch.manual_seed(0)
        case.model.add_adapter(
            peft.LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
        )
        adapted = forward(case.model, case.call)
        case.model.delete_adapters(["default"])
        after = forward(case.model, case.call)
    torch.manual_seed(0)
    case.twin.add_adapter(
        peft.LoraConfig(
            r=4, target_modules=r"(single_)?transformer_blocks\.\d+\.attn\.to_[qkv]", init_lora_weights=False
        )
    )
    assert relative(adapted, case.diffusers(lambda _: [1.0])) <= TOLERANCE < 1e-2 < relative(adapted, before)
    assert relative(after, before) <= TOLERANCE


def test_projections_fused_under_control_match_diffusers() -> None:
    case = AdapterCase()
    with apply(case.model, IPAdapter(case.prompts)):
        case.model.transformer_blocks[0].attn.fuse_projections()
        assert relative(forward(case.model, case.call), case.diffusers(lambda _: [1.0])) <= TOLERANCE
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in case.model.modules())


def test_prompts_of_another_dtype_are_cast() -> None:
    case = AdapterCase()
    expected = case.diffusers(lambda _: [1.0])
    model = case.model.to(torch.bfloat16)
    call = {k: v.to(torch.bfloat16) if k not in ("img_ids", "txt_ids") else v for k, v in case.call.items()}
    with apply(model, IPAdapter(case.prompts)):
        assert relative(forward(model, call).float(), expected) <= 0.1


def test_prompt_loads_for_a_model_on_meta() -> None:
    case = AdapterCase()
    on_meta = tiny_flux().to("meta")
    prompt = ImagePrompt.load(on_meta, case.states[0]).showing(case.embeds[0])
    with apply(case.model, IPAdapter([prompt])):
        assert relative(forward(case.model, case.call), case.diffusers(lambda _: [1.0])) <= TOLERANCE


def test_scale_that_fits_no_layer_raises() -> None:
    case = AdapterCase()
    with pytest.raises(ValueError, match=r"^scale: .*transformer_block\.1"):
        apply(case.model, IPAdapter(case.prompts, {"transformer_block.1": 1.0}))
    assert Handle.of(case.model) is None


@pytest.mark.parametrize("how", ["scale", "layers"])
def test_other_blocks_stay_plain(how: str) -> None:
    case, names = AdapterCase(), ["transformer_blocks.1"]
    scale, layers = ({names[0]: 0.8}, None) if how == "scale" else (0.8, [1])
    with apply(case.model, IPAdapter(case.prompts, scale), layers=layers):
        out = forward(case.model, case.call)
    assert relative(out, case.diffusers(lambda name: [0.8 * name.startswith(names[0])])) <= TOLERANCE


def test_other_steps_stay_plain() -> None:
    case = AdapterCase()
    plain = forward(case.model, case.call)
    with apply(case.model, IPAdapter(case.prompts), steps=1):
        outs = [forward(case.model, case.call) for _ in range(3)]
    assert relative(outs[0], plain) <= TOLERANCE and relative(outs[2], plain) <= TOLERANCE
    assert relative(outs[1], case.diffusers(lambda _: [1.0])) <= TOLERANCE


def test_failed_call_leaves_nothing_behind() -> None:
    case = AdapterCase()
    plain = forward(case.model, case.call)
    with apply(case.model, IPAdapter(case.prompts), steps=0):
        broken = case.model.transformer_blocks[0].ff.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            forward(case.model, case.call)
        broken.remove()
        Handle.of(case.model).set_step(1)  # type: ignore[union-attr]
        assert relative(forward(case.model, case.call), plain) <= TOLERANCE


def test_masks_use_the_grid_of_the_handle() -> None:
    case = AdapterCase()
    # Away from the mask's edge bicubic resizing leaves 0 and 1.
    mask = torch.zeros(1, 1, 64 * ROWS, COLUMNS)
    mask[:, :, 32 * ROWS :] = 1
    whole, none, half = (
        IPAdapter(case.prompts, 1.0, masks=[m]) for m in (torch.ones_like(mask), mask * 0, mask)
    )
    single = tiny_flux(double=1, single=0)
    prompt = ImagePrompt(case.prompts[0].weights, None, case.prompts[0].tokens, case.prompts[0].biases)
    outs = []
    for method in (whole, none, half):
        method.prompts = [prompt]
        with apply(single, method) as handle:
            with pytest.raises(ValueError, match=r"^masks: .*grid"):
                forward(single, case.call)
            handle.grid = ROWS, COLUMNS
            outs.append(forward(single, case.call))
    on, off, out = (o.unflatten(1, (ROWS, COLUMNS)) for o in outs)
    assert relative(on, off) > 1e-2
    assert relative(out[:, 4:], on[:, 4:]) <= TOLERANCE and relative(out[:, :2], off[:, :2]) <= TOLERANCE


def test_composition_with_another_method_matches_diffusers() -> None:
    case = AdapterCase()
    brush = InContextBrush(0.5, 0.5, 0.2)
    with apply(case.model, compose(brush, IPAdapter(case.prompts, 0.6))):
        both = forward(case.model, case.call)
    outs = []
    for method in (brush, IPAdapter(case.prompts, 0.6)):
        with apply(case.model, method):
            outs.append(forward(case.model, case.call))
    assert min(relative(both, out) for out in outs) > 1e-3
    with apply(case.model, compose(brush, IPAdapter(case.prompts, 0.0))):
        assert relative(forward(case.model, case.call), outs[0]) <= TOLERANCE


def test_deep_copy_has_its_own_method() -> None:
    case = AdapterCase()
    with apply(case.model, IPAdapter(case.prompts)):
        out = forward(case.model, case.call)
        twin = copy.deepcopy(case.model)
        handle = Handle.of(twin)
        assert handle is not None
        handle.method.scale = 0.0  # type: ignore[union-attr]
        assert relative(forward(twin, case.call), out) > 1e-2
        assert torch.equal(forward(case.model, case.call), out)


def test_gradients_are_equal_with_checkpointing() -> None:
    case = AdapterCase()
    grads = []
    for checkpointed in (False, True):
        if checkpointed:
            case.model.enable_gradient_checkpointing()
        case.model.train()
        x = case.call["hidden_states"].clone().requires_grad_()
        with apply(case.model, IPAdapter(case.prompts)):
            out = case.model(**case.call | {"hidden_states": x}, return_dict=False)[0]
            grads.append(torch.autograd.grad(out.square().sum(), x)[0])
    assert relative(grads[1], grads[0]) <= TOLERANCE


@pytest.mark.parametrize("form", ["published", "diffusers"])
def test_loads_from_a_file(form: str, tmp_path) -> None:
    case, tensors = AdapterCase(), {}
    for key, t in case.states[0]["image_proj"].items():
        tensors[f"{'ip_adapter_proj_model' if form == 'published' else 'image_proj'}.{key}"] = t
    for key, t in case.states[0]["ip_adapter"].items():
        number, which, part = key.split(".")
        name = f"double_blocks.{number}.processor.ip_adapter_double_stream_{which[3]}_proj.{part}"
        tensors[name if form == "published" else f"ip_adapter.{key}"] = t
    save_file(tensors, tmp_path / "adapter.safetensors")
    prompt = ImagePrompt.load(case.model, tmp_path / "adapter.safetensors").showing(case.embeds[0])
    for name, pair in case.prompts[0].weights.items():
        assert all(torch.equal(a, b) for a, b in zip(pair, prompt.weights[name], strict=True))
    with apply(case.model, IPAdapter([prompt])):
        assert relative(forward(case.model, case.call), case.diffusers(lambda _: [1.0])) <= TOLERANCE


def test_wrong_file_raises(tmp_path) -> None:
    model = tiny_flux()
    (tmp_path / "adapter.bin").write_bytes(b"a pickle")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        ImagePrompt.load(model, tmp_path / "adapter.bin")
    save_file({"lora.up": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"got lora\.up"):
        ImagePrompt.load(model, str(tmp_path / "other.safetensors"))
    with pytest.raises(FileNotFoundError):
        ImagePrompt.load(model, tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="expected image_proj and ip_adapter"):
        ImagePrompt.load(model, {"ip_adapter": {}})
