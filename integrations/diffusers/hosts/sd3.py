"""SD 3 and 3.5: the processor, and where the model's attention is."""

from __future__ import annotations

from typing import Any

from diffusers.models.attention_processor import FusedJointAttnProcessor2_0, JointAttnProcessor2_0
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from torch import Tensor, nn

from .host import Geometry, Site
from .processor import ControlledProcessor, Stream


class SD3ControlledAttnProcessor(ControlledProcessor):
    """Attention of an SD 3 block through flashbrush; a drop-in for diffusers' JointAttnProcessor2_0.

    Text and image have projections and norms of their own and attend jointly. Token order is [text ; image]
    here, though the model returns the image first. SD 3.5's second attention is of the image alone. There is
    no RoPE.

    Examples:
        >>> from flashbrush.integrations.diffusers import SD3ControlledAttnProcessor, apply
        >>> from diffusers import SD3Transformer2DModel
        >>> model = SD3Transformer2DModel(sample_size=8, in_channels=4, num_layers=1, attention_head_dim=8,
        ...     num_attention_heads=2, joint_attention_dim=8, caption_projection_dim=16,
        ...     pooled_projection_dim=8)
        >>> with apply(model):
        ...     isinstance(model.transformer_blocks[0].attn.processor, SD3ControlledAttnProcessor)
        True
    """

    dispatches = False
    fused = False

    def replace(self, attn: Any, original: Any) -> None:
        super().replace(attn, original)
        self.fused = isinstance(original, FusedJointAttnProcessor2_0)
        if self.fused and (attn.norm_q is not None or attn.add_q_proj is None):
            raise TypeError(
                "model: diffusers' fused projections leave out SD 3.5's norms and second attention; call "
                "unfuse_qkv_projections() first"
            )

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As JointAttnProcessor2_0.

        Args:
            attn: the attention module.
            hidden_states: the image (batch, image tokens, channels).
            encoder_hidden_states: the text (batch, text tokens, channels); None: the image alone.
            attention_mask: must be None.

        Returns:
            (image, text) after their output projections; in the last block the text is not projected, as
            nothing reads it. Without text: the image alone.

        Raises:
            NotImplementedError: an attention_mask, which the stock processor would ignore.
        """
        if attention_mask is not None:
            raise NotImplementedError("flashbrush: attention_mask, which diffusers' SD 3 processor ignores")
        text = encoder_hidden_states
        image = Stream(*_project(attn, self.hidden(hidden_states), self.fused), attn.norm_q, attn.norm_k)
        streams = [image]
        if text is not None:  # the order of tokens: [text ; image]
            streams = [
                Stream(*_project_text(attn, text, self.fused), attn.norm_added_q, attn.norm_added_k),
                image,
            ]
        out = self.attend(streams, attn.heads)
        text_len = 0 if text is None else text.shape[1]
        text_out, image_out = out.split_with_sizes([text_len, out.shape[1] - text_len], 1)
        image_out = attn.to_out[1](attn.to_out[0](image_out.contiguous()))
        if text is None:
            return image_out
        return image_out, text_out if attn.context_pre_only else attn.to_add_out(text_out.contiguous())


def _project(attn: Any, x: Tensor, fused: bool) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (batch, tokens, heads, head_dim) of the image, x (batch, tokens, channels)."""
    qkv = attn.to_qkv(x).chunk(3, -1) if fused else (attn.to_q(x), attn.to_k(x), attn.to_v(x))
    q, k, v = (t.unflatten(-1, (-1, attn.inner_dim // attn.heads)) for t in qkv)
    return q, k, v


def _project_text(attn: Any, x: Tensor, fused: bool) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (batch, tokens, heads, head_dim) of the text, x (batch, tokens, channels)."""
    if fused:
        qkv = attn.to_added_qkv(x).chunk(3, -1)
    else:
        qkv = (attn.add_q_proj(x), attn.add_k_proj(x), attn.add_v_proj(x))
    q, k, v = (t.unflatten(-1, (-1, attn.inner_dim // attn.heads)) for t in qkv)
    return q, k, v


class SD3Host:
    """The Host of SD3Transformer2DModel."""

    model_class = SD3Transformer2DModel
    processor_class = SD3ControlledAttnProcessor
    stock = (JointAttnProcessor2_0, FusedJointAttnProcessor2_0)
    takes_tokens = False

    @staticmethod
    def sites(model: nn.Module) -> list[Site]:
        sites = []
        for block in model.transformer_blocks:  # type: ignore[union-attr]
            sites.append(Site(block.attn, "joint"))
            if block.attn2 is not None:
                sites.append(Site(block.attn2, "self"))
        return sites

    @staticmethod
    def geometry(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Geometry:
        latents = args[0] if args else kwargs["hidden_states"]
        text = args[1] if len(args) > 1 else kwargs["encoder_hidden_states"]
        grids = SD3Host.grids(model, *latents.shape[-2:])
        return Geometry(text.shape[1], 0, latents.shape[0], latents.device, grids)

    @staticmethod
    def grids(model: nn.Module, rows: int, columns: int) -> tuple[tuple[int, int], ...]:
        patch: int = model.config.patch_size  # type: ignore[union-attr, assignment]
        return ((rows // patch, columns // patch),)
