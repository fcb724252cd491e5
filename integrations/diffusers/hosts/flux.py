"""FLUX.1 (dev, Fill, Kontext, Krea): the processor, and where the model's attention is."""

from __future__ import annotations

from typing import Any

from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxTransformer2DModel
from torch import Tensor, nn

from .host import Geometry, Site
from .processor import ControlledProcessor, Stream


class FluxControlledAttnProcessor(ControlledProcessor):
    """Attention of a FLUX block through flashbrush; a drop-in for diffusers' FluxAttnProcessor.

    Token order is [text ; image], as in the model. In a double block text and image have projections and
    norms of their own; in a single block they come joined. Heads are counted from the projections' outputs,
    so that a tensor-parallel rank's share works.

    Examples:
        >>> from flashbrush.integrations.diffusers import FluxControlledAttnProcessor, apply
        >>> from diffusers import FluxTransformer2DModel
        >>> model = FluxTransformer2DModel(num_layers=1, num_single_layers=1, attention_head_dim=16,
        ...     num_attention_heads=2, joint_attention_dim=8, pooled_projection_dim=8,
        ...     axes_dims_rope=(4, 6, 6))
        >>> with apply(model):
        ...     isinstance(model.transformer_blocks[0].attn.processor, FluxControlledAttnProcessor)
        True
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As FluxAttnProcessor.

        Args:
            attn: the attention module.
            hidden_states: double block: the image (batch, image tokens, channels); single block: [text ;
                image].
            encoder_hidden_states: double block: the text (batch, text tokens, channels); single block: None.
            attention_mask: bool (True: attend) or additive, broadcastable to (batch, heads, tokens, tokens).
            image_rotary_emb: cos and sin (tokens, head_dim) of [text ; image].

        Returns:
            Double block: (image, text) after their output projections. Single block: (batch, tokens, heads *
            head_dim), which the block projects together with its MLP.
        """
        text = encoder_hidden_states
        image = Stream(*_project(attn, self.hidden(hidden_states)), attn.norm_q, attn.norm_k)
        streams = [image]
        if text is not None:  # the order of tokens: [text ; image]
            streams = [Stream(*_project_text(attn, text), attn.norm_added_q, attn.norm_added_k), image]
        out = self.attend(streams, attn.heads, rope=image_rotary_emb, mask=attention_mask)
        if text is None:
            return out
        text_out, image_out = out.split_with_sizes([text.shape[1], out.shape[1] - text.shape[1]], 1)
        image_out = attn.to_out[1](attn.to_out[0](image_out.contiguous()))
        return image_out, attn.to_add_out(text_out.contiguous())


def _project(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (batch, tokens, heads, head_dim) of the image, x (batch, tokens, channels)."""
    qkv = (
        attn.to_qkv(x).chunk(3, -1) if attn.fused_projections else (attn.to_q(x), attn.to_k(x), attn.to_v(x))
    )
    q, k, v = (t.unflatten(-1, (-1, attn.head_dim)) for t in qkv)
    return q, k, v


def _project_text(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (batch, tokens, heads, head_dim) of the text, x (batch, tokens, channels)."""
    if attn.fused_projections:
        qkv = attn.to_added_qkv(x).chunk(3, -1)
    else:
        qkv = (attn.add_q_proj(x), attn.add_k_proj(x), attn.add_v_proj(x))
    q, k, v = (t.unflatten(-1, (-1, attn.head_dim)) for t in qkv)
    return q, k, v


class FluxHost:
    """The Host of FluxTransformer2DModel."""

    model_class = FluxTransformer2DModel
    processor_class = FluxControlledAttnProcessor
    stock = (FluxAttnProcessor,)
    takes_tokens = True

    @staticmethod
    def sites(model: nn.Module) -> list[Site]:
        double, single = model.transformer_blocks, model.single_transformer_blocks
        sites = [Site(block.attn, "double") for block in double]  # type: ignore[union-attr]
        return sites + [Site(block.attn, "single") for block in single]  # type: ignore[union-attr]

    @staticmethod
    def geometry(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Geometry:
        image = args[0] if args else kwargs["hidden_states"]
        text = args[1] if len(args) > 1 else kwargs["encoder_hidden_states"]
        return Geometry(text.shape[1], image.shape[1], image.shape[0], image.device)

    @staticmethod
    def grids(model: nn.Module, rows: int, columns: int) -> tuple[tuple[int, int], ...]:
        return ()
