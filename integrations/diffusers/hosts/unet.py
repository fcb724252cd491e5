"""The UNet of SD 1.5, SD 2, SDXL and DeepFloyd IF: the processor, and where the model's attention is."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from diffusers.models.attention_processor import (
    Attention,
    AttnAddedKVProcessor,
    AttnAddedKVProcessor2_0,
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
)
from diffusers.models.transformers.dual_transformer_2d import DualTransformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from .host import Geometry, Site
from .processor import ControlledProcessor, Stream

ADDED = (AttnAddedKVProcessor, AttnAddedKVProcessor2_0)
# Known blocks: their attention layers run in the order of their definition, at one resolution.
DOWN = (
    "DownBlock2D",
    "AttnDownBlock2D",
    "CrossAttnDownBlock2D",
    "ResnetDownsampleBlock2D",
    "SimpleCrossAttnDownBlock2D",
)
MID = ("UNetMidBlock2D", "UNetMidBlock2DCrossAttn", "UNetMidBlock2DSimpleCrossAttn")
UP = ("UpBlock2D", "AttnUpBlock2D", "CrossAttnUpBlock2D", "ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D")


class UNetControlledAttnProcessor(ControlledProcessor):
    """Attention of a UNet through flashbrush.

    A drop-in for diffusers' AttnProcessor2_0 and AttnAddedKVProcessor2_0. Logits and sums are always float32,
    so `upcast_attention` changes nothing.

    Examples:
        >>> from flashbrush.integrations.diffusers import UNetControlledAttnProcessor, apply
        >>> from diffusers import UNet2DConditionModel
        >>> model = UNet2DConditionModel(sample_size=8, block_out_channels=(8, 8), norm_num_groups=4,
        ...     down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), cross_attention_dim=8,
        ...     up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), layers_per_block=1, attention_head_dim=2)
        >>> with apply(model):
        ...     types = {type(processor) for processor in model.attn_processors.values()}
        >>> types == {UNetControlledAttnProcessor}
        True
    """

    dispatches = False
    fused = False

    def replace(self, attn: Any, original: Any) -> None:
        super().replace(attn, original)
        added = attn.added_kv_proj_dim is not None
        if added is not isinstance(original, ADDED):
            raise TypeError(
                f"model: a layer {'with' if added else 'without'} added keys has a "
                f"{type(original).__name__}, which is for layers {'without' if added else 'with'} them"
            )
        if not attn.scale_qk:
            raise NotImplementedError("model: attention without the scale 1/sqrt(head_dim) (scale_qk=False)")
        self.fused = isinstance(original, FusedAttnProcessor2_0)

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """As AttnProcessor2_0, or AttnAddedKVProcessor2_0 in a layer with added keys.

        Args:
            attn: the attention module; its spatial, group, cross, q and k norms, residual connection and
                rescaling are applied.
            hidden_states: (batch, tokens, channels) or (batch, channels, rows, columns); with added keys
                (batch, channels, rows, columns) or (batch, channels, tokens).
            encoder_hidden_states: (batch, text, channels); None: self-attention.
            attention_mask: additive, (batch, 1 or rows, keys) or (batch * heads, 1 or rows, keys); with added
                keys it may cover the text alone.
            temb: input of the spatial norm.

        Returns:
            A tensor of the shape of `hidden_states`.

        Raises:
            ValueError: a mask of another shape.
        """
        if attn.added_kv_proj_dim is not None:
            return self._attend_added(attn, hidden_states, encoder_hidden_states, attention_mask)
        residual, x = hidden_states, hidden_states
        if attn.spatial_norm is not None:
            x = attn.spatial_norm(x, temb)
        image = x.shape[2:] if x.dim() == 4 else None
        if image is not None:
            x = x.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        x = self.hidden(x)
        cross = encoder_hidden_states is not None
        context = _norm_cross(attn, encoder_hidden_states) if cross else x
        if self.fused and not cross:
            projected = attn.to_qkv(x).chunk(3, -1)
        elif self.fused:
            projected = (attn.to_q(x), *attn.to_kv(context).chunk(2, -1))
        else:
            projected = (attn.to_q(x), attn.to_k(context), attn.to_v(context))
        q, k, v = (_heads(attn, t) for t in projected)
        stream = Stream(q, k, v, attn.norm_q, attn.norm_k)
        x = self._attend_and_project(attn, [stream], attention_mask, cross=cross)
        if image is not None:
            x = x.transpose(1, 2).unflatten(2, image)
        if attn.residual_connection:
            x = x + residual
        return x if attn.rescale_output_factor == 1 else x / attn.rescale_output_factor

    def _attend_added(
        self, attn: Any, hidden_states: Tensor, text: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        """The image attends to [text ; image], or to the text alone."""
        x = hidden_states.flatten(2).transpose(1, 2)
        text = x if text is None else _norm_cross(attn, text)
        x = self.hidden(attn.group_norm(x.transpose(1, 2)).transpose(1, 2))
        query = _heads(attn, attn.to_q(x))
        key, value = _heads(attn, attn.add_k_proj(text)), _heads(attn, attn.add_v_proj(text))
        if attn.only_cross_attention:
            streams = [Stream(query, key, value, attn.norm_q, attn.norm_k)]
        else:  # the order of keys: [text ; image]
            own_key, own_value = _heads(attn, attn.to_k(x)), _heads(attn, attn.to_v(x))
            streams = [
                Stream(None, key, value, None, attn.norm_k),
                Stream(query, own_key, own_value, attn.norm_q, attn.norm_k),
            ]
        x = self._attend_and_project(attn, streams, mask)
        return x.transpose(1, 2).reshape(hidden_states.shape) + hidden_states

    def _attend_and_project(
        self, attn: Any, streams: list[Stream], mask: Tensor | None, cross: bool = False
    ) -> Tensor:
        """(batch, rows, channels) after the output projection."""
        out = self.attend(streams, attn.heads, mask=_mask(attn, mask, streams), cross=cross)
        return attn.to_out[1](attn.to_out[0](out))


def _heads(attn: Any, x: Tensor) -> Tensor:
    """(batch, tokens, heads, head_dim)"""
    return x.unflatten(-1, (-1, attn.inner_dim // attn.heads))


def _norm_cross(attn: Any, text: Tensor) -> Tensor:
    return text if attn.norm_cross is None else attn.norm_encoder_hidden_states(text)


def _mask(attn: Any, mask: Tensor | None, streams: list[Stream]) -> Tensor | None:
    """(batch, 1 or heads, 1 or rows, keys), without a copy per head."""
    if mask is None:
        return None
    batch, given = streams[0].value.shape[0], tuple(mask.shape)
    rows = sum(s.query.shape[1] for s in streams if s.query is not None)
    keys = sum(s.key.shape[1] for s in streams)
    if attn.added_kv_proj_dim is not None and mask.shape[-1] == keys - rows:
        mask = F.pad(mask, (0, rows))
    if mask.dim() == 2:
        mask = mask[:, None]
    if mask.dim() != 3 or mask.shape[0] not in (batch, batch * attn.heads) or mask.shape[2] != keys:
        raise ValueError(f"attention_mask: expected shape ({batch}, 1, {keys}), got {given}")
    return mask[:, None] if mask.shape[0] == batch else mask.unflatten(0, (batch, -1))


class UNetHost:
    """The Host of UNet2DConditionModel."""

    model_class = UNet2DConditionModel
    processor_class = UNetControlledAttnProcessor
    stock = (AttnProcessor2_0, AttnProcessor, FusedAttnProcessor2_0, *ADDED)
    takes_tokens = False

    @staticmethod
    def sites(model: nn.Module) -> list[Site]:
        config: Any = model.config
        if config.attention_type != "default":
            raise NotImplementedError(f"model: a UNet with attention_type={config.attention_type!r} (GLIGEN)")
        if config.encoder_hid_dim_type not in (None, "text_proj"):
            raise NotImplementedError(
                f"model: a UNet with encoder_hid_dim_type={config.encoder_hid_dim_type!r}, whose inputs do "
                "not give the number of text tokens"
            )
        level, sites = 0, []
        for block in model.down_blocks:  # type: ignore[union-attr]
            sites += _block_sites(block, "down", DOWN, level)
            level += block.downsamplers is not None
        if (middle := model.mid_block) is not None:
            sites += _block_sites(middle, "mid", MID, level)  # type: ignore[arg-type]
        for block in model.up_blocks:  # type: ignore[union-attr]
            sites += _block_sites(block, "up", UP, level)
            level -= block.upsamplers is not None
        return sites

    @staticmethod
    def geometry(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Geometry:
        latents = args[0] if args else kwargs["sample"]
        text = args[2] if len(args) > 2 else kwargs["encoder_hidden_states"]
        grids = UNetHost.grids(model, *latents.shape[-2:])
        return Geometry(0 if text is None else text.shape[1], 0, latents.shape[0], latents.device, grids)

    @staticmethod
    def grids(model: nn.Module, rows: int, columns: int) -> tuple[tuple[int, int], ...]:
        grids = [(rows, columns)]
        for block in model.down_blocks:  # type: ignore[union-attr]
            for sampler in block.downsamplers or ():
                # A convolution padded on both sides rounds up; pooling and padding on one side round down.
                up = int(getattr(sampler, "padding", 0) != 0 and getattr(sampler, "use_conv", False))
                grids.append(((grids[-1][0] + up) // 2, (grids[-1][1] + up) // 2))
        return tuple(grids)


def _block_sites(block: nn.Module, place: str, known: tuple[str, ...], level: int) -> list[Site]:
    if type(block).__name__ not in known:
        raise NotImplementedError(f"model: a UNet with a {type(block).__name__}; expected {', '.join(known)}")
    sites = []
    for module in block.modules():
        if isinstance(module, DualTransformer2DModel):
            raise NotImplementedError(
                "model: a UNet with dual_cross_attention, which splits the text between two layers"
            )
        if isinstance(module, Attention):
            added = module.added_kv_proj_dim is not None and not module.only_cross_attention
            kind = "added" if added else "cross" if module.is_cross_attention else "self"
            sites.append(Site(module, kind, place, level))
    return sites
