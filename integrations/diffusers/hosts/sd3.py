"""SD 3 and 3.5: the processor, and how apply() finds its layers and reads its calls."""

from __future__ import annotations

from typing import Any

from diffusers.models.attention_processor import FusedJointAttnProcessor2_0, JointAttnProcessor2_0
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from torch import Tensor, nn

from .host import Geometry, Place
from .processor import ControlledProcessor, join


class SD3ControlledAttnProcessor(ControlledProcessor):
    """Attention of an SD 3 block through flashbrush: a drop-in for diffusers' JointAttnProcessor2_0.

    Text and image have their own projections and norms and attend jointly, text first here whatever the
    model's order of outputs; SD 3.5's second attention, of the image alone, has no text. There is no RoPE.
    """

    dispatches = False
    fused = False

    def replace(self, attn: Any, original: Any) -> None:
        super().replace(attn, original)
        self.fused = isinstance(original, FusedJointAttnProcessor2_0)
        if self.fused and (attn.norm_q is not None or attn.add_q_proj is None):
            raise TypeError(
                "model: diffusers' fused projections leave out SD 3.5's norms and second attention; "
                "unfuse_qkv_projections() comes first"
            )

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As JointAttnProcessor2_0: hidden_states (batch, tokens, channels), encoder_hidden_states (batch,
        text, channels).

        Returns (image, text) after their output projections, the text unprojected in the last block, whose
        text goes no further; without text the image alone.

        Raises:
            NotImplementedError: an attention_mask, which the stock processor would ignore.
        """
        if attention_mask is not None:
            raise NotImplementedError("flashbrush: attention_mask, which diffusers' SD 3 processor ignores")
        text = encoder_hidden_states
        query, key, value = _project(attn, self.hidden(hidden_states), self.fused)
        queries, keys, values = [(query, attn.norm_q)], [(key, attn.norm_k)], [value]
        if text is not None:
            query, key, value = _project_text(attn, text, self.fused)
            queries.insert(0, (query, attn.norm_added_q))
            keys.insert(0, (key, attn.norm_added_k))
            values.insert(0, value)
        q_offset, k_offset = (None, None) if self.plan is None else (self.plan.q_offset, self.plan.k_offset)
        query = join(queries, q_offset, None)
        out = self.attend(query, join(keys, k_offset, None), values, None, attn.heads)
        out = out.flatten(2, 3).to(query.dtype)
        text_len = 0 if text is None else text.shape[1]
        text_out, image = out.split_with_sizes([text_len, out.shape[1] - text_len], 1)
        image = attn.to_out[1](attn.to_out[0](image.contiguous()))
        if text is None:
            return image
        return image, text_out if attn.context_pre_only else attn.to_add_out(text_out.contiguous())


def _project(attn: Any, x: Tensor, fused: bool) -> list[Tensor]:
    """q, k, v (batch, tokens, heads, head_dim) of hidden states (batch, tokens, channels)"""
    joint = attn.to_qkv(x).chunk(3, -1) if fused else (attn.to_q(x), attn.to_k(x), attn.to_v(x))
    return [t.unflatten(-1, (-1, attn.inner_dim // attn.heads)) for t in joint]


def _project_text(attn: Any, x: Tensor, fused: bool) -> list[Tensor]:
    joint = (
        attn.to_added_qkv(x).chunk(3, -1)
        if fused
        else (attn.add_q_proj(x), attn.add_k_proj(x), attn.add_v_proj(x))
    )
    return [t.unflatten(-1, (-1, attn.inner_dim // attn.heads)) for t in joint]


class SD3Host:
    """The Host of SD3Transformer2DModel."""

    model_class = SD3Transformer2DModel
    processor_class = SD3ControlledAttnProcessor
    stock = (JointAttnProcessor2_0, FusedJointAttnProcessor2_0)
    takes_tokens = False

    @staticmethod
    def places(model: nn.Module) -> list[Place]:
        places = []
        for block in model.transformer_blocks:  # type: ignore[union-attr]
            places.append(Place(block.attn, "joint"))
            if block.attn2 is not None:
                places.append(Place(block.attn2, "self"))
        return places

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
