"""IP-Adapter (arXiv 2308.06721): images as prompts, each in a softmax of its own beside the text's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...bindings import Control, Segments
from ..diffusers.hosts.registry import find_host
from ..diffusers.protocol.layer import Layer, Step
from ..diffusers.protocol.plan import Plan
from .shared.image_branch import ImageBranch
from .shared.image_prompt import ImagePrompt, softmax_groups
from .shared.ip_adapter_knobs import AdapterMasks, LayerScales, Scale, check_adapters, check_layers, scale_at
from .shared.knobs import Several


@dataclass(eq=False)
class IPAdapter:
    """Decoupled cross-attention, all adapters and images in one launch. At image token i, in each head:

        o_i = softmax(q_i K_text^T) V_text + sum_a scale_a mask_a(i) softmax(q_i K_a^T) V_a

    in a UNet's cross-attention. In FLUX's double blocks the sum is added to the image after the block, with
    the queries before RoPE. A mask is resized bicubically to the layer's grid, which may take it
    outside of 0 to 1, as in diffusers. Several images of an adapter without masks share a softmax. A knob may
    be set at any time; keys and values of `prompts` are made once.

    Args:
        prompts: the adapters with their images.
        scale: one for all adapters, or one for each: a number, or {layer: number} to scale layers
            differently, as InstantStyle does. Such a layer is "down", "mid", "up", a Layer.index or the
            beginning of a layer's name in the model; the last entry that fits counts, and the scale is 0
            where none fits. 1 in diffusers. To scale one image, multiply its mask.
        masks: for each adapter None, or (1 or batch, images, rows, columns) as
            IPAdapterMaskProcessor.preprocess makes them. FLUX's grid is Handle.grid.

    Raises:
        ValueError: a wrong knob, by name; other numbers of adapters or images; from apply(), a scale that
            fits no layer. When the model is called: another model, a grid that is not known (FLUX without
            ``handle.grid``).

    Examples:
        >>> import torch
        >>> from diffusers import StableDiffusionPipeline
        >>> from flashbrush.integrations import ImagePrompt, IPAdapter
        >>> from flashbrush.integrations.diffusers import apply
        >>> pipe = StableDiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
        >>> cross = {n: m for n, m in pipe.unet.named_modules() if n.endswith("attn2")}
        >>> weights = {n: (m.to_k.weight, m.to_v.weight) for n, m in cross.items()}
        >>> prompt = ImagePrompt(weights)  # or ImagePrompt.load(), of a published file
        >>> prompt = prompt.showing(tokens=torch.randn(1, 1, 4, pipe.unet.config.cross_attention_dim))
        >>> with apply(pipe.unet, IPAdapter([prompt], scale={"up": 0.8})):
        ...     images = pipe("a cat", num_inference_steps=2).images
    """

    prompts: Sequence[ImagePrompt] = Several(ImagePrompt)
    scale: Scale | Sequence[Scale] = LayerScales(1.0)
    masks: Sequence[Tensor | None] | None = AdapterMasks()

    def __post_init__(self) -> None:
        self._names: list[str] = []  # of the model's layers
        self._branches: list[ImageBranch] = []  # of FLUX's double blocks

    def _knob_changes(self, name: str, value: Any) -> None:
        knobs: dict[str, Any] = {n: getattr(self, n, None) for n in ("prompts", "scale", "masks")}
        check_adapters(name, **knobs | {name: value})
        self._plans: dict[Layer, Plan | None] = {}
        if name == "prompts":
            # {(adapter, layer): (k, v)}
            self._kept: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def attach(self, model: nn.Module) -> list:
        """Find the names of the model's layers, and register hooks on FLUX's double blocks.

        Raises:
            ValueError: a scale that fits no layer.
        """
        names = {id(module): name for name, module in model.named_modules()}
        sites = find_host(model).sites(model)
        self._names, self._kept, self._plans = [names[id(site.attn)] for site in sites], {}, {}
        check_layers(self.scale, sites, self._names)  # type: ignore[arg-type]
        doubles = model.transformer_blocks if sites[0].kind == "double" else ()
        self._branches = [ImageBranch(block) for block in doubles]  # type: ignore[union-attr]
        return list(self._branches)

    def plan(self, layer: Layer, step: Step) -> Plan | None:
        if layer.kind in ("joint", "added"):
            raise ValueError(
                f"IPAdapter: expected cross-attention or FLUX; layer {layer.index} is {layer.kind!r}"
            )
        if layer.kind in ("self", "single"):
            return None
        if layer not in self._plans:
            self._plans[layer] = self._plan(layer)
        plan = self._plans[layer]
        if layer.kind != "double":
            return plan
        branch = self._branches[layer.index]
        branch.prompts = None
        if plan is not None and plan.control is not None:
            pairs: list[Any] = list((plan.extra or {}).values())
            device = pairs[0][0].device
            branch.prompts = plan.control.to(device), [k for k, _ in pairs], [v for _, v in pairs]
        return None  # the block's own attention is plain

    @torch.inference_mode(False)
    @torch.no_grad()
    def _plan(self, layer: Layer) -> Plan | None:
        groups = {}
        for a, prompt in enumerate(self.prompts):
            scale = scale_at(self.scale, a, layer, self._names[layer.index])  # type: ignore[arg-type]
            mask = None if self.masks is None else self.masks[a]
            if scale:
                groups |= softmax_groups(f"ip_{a}", self._keys(a, layer, prompt), scale, mask, layer.grid)
        if not groups:
            return None
        extra = {name: pair for name, (pair, _) in groups.items()}
        own = {} if layer.kind == "double" else {"text": layer.text_len}
        keys = Segments(own | {name: k.shape[1] for name, (k, _) in extra.items()})
        gates = {name: gate for name, (_, gate) in groups.items()}
        rows, alone = Segments(image=layer.image_len), {name: [name] for name in keys}
        control = Control(rows, keys, groups=alone, gates=gates)
        return Plan(control, extra=extra)

    def _keys(self, a: int, layer: Layer, prompt: ImagePrompt) -> tuple[Tensor, Tensor]:
        if (a, layer.index) not in self._kept:
            self._kept[a, layer.index] = prompt.project(self._names[layer.index], layer.heads)
        return self._kept[a, layer.index]
