"""FLUX: the processor, and how apply() finds its layers and reads its calls (FLUX.1 dev, Fill, Kontext,
Krea).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxTransformer2DModel
from torch import Tensor, nn

from .host import Geometry, Place
from .processor import ControlledProcessor, join


class FluxControlledAttnProcessor(ControlledProcessor):
    """Attention of a FLUX block through flashbrush: a drop-in for diffusers' FluxAttnProcessor.

    Text comes first; each stream has its own projections and norms in a double block; a single block's text
    is joined already. Heads are counted from the projections, so that a tensor-parallel rank's share works.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As FluxAttnProcessor: hidden_states (batch, tokens, channels), encoder_hidden_states (batch, text,
        channels).

        attention_mask is bool (True: attend) or additive, broadcastable to (batch, heads, tokens, tokens) of
            the
        joint sequence. Returns (image, text) after their output projections in a double block; the
        attention's output (batch, tokens, heads * head_dim) in a single block, which projects it together
        with its MLP.
        """
        query, key, value = _project(attn, self.hidden(hidden_states))
        queries, keys, values = [(query, attn.norm_q)], [(key, attn.norm_k)], [value]
        if encoder_hidden_states is not None:
            query, key, value = _project_text(attn, encoder_hidden_states)
            queries.insert(0, (query, attn.norm_added_q))
            keys.insert(0, (key, attn.norm_added_k))
            values.insert(0, value)
        q_offset, k_offset = (None, None) if self.plan is None else (self.plan.q_offset, self.plan.k_offset)
        query = join(queries, q_offset, image_rotary_emb)
        key = join(keys, k_offset, image_rotary_emb)
        out = self.attend(query, key, values, attention_mask, attn.heads)
        out = out.flatten(2, 3).to(query.dtype)
        if encoder_hidden_states is None:
            return out
        text_len = encoder_hidden_states.shape[1]
        text, image = out.split_with_sizes([text_len, out.shape[1] - text_len], 1)
        image = attn.to_out[1](attn.to_out[0](image.contiguous()))
        return image, attn.to_add_out(text.contiguous())


def _project(attn: Any, x: Tensor) -> Iterator[Tensor]:
    """q, k, v (batch, tokens, heads, head_dim) of hidden states (batch, tokens, channels)"""
    joint = (
        attn.to_qkv(x).chunk(3, -1) if attn.fused_projections else (attn.to_q(x), attn.to_k(x), attn.to_v(x))
    )
    return (t.unflatten(-1, (-1, attn.head_dim)) for t in joint)


def _project_text(attn: Any, x: Tensor) -> Iterator[Tensor]:
    if attn.fused_projections:
        joint = attn.to_added_qkv(x).chunk(3, -1)
    else:
        joint = (attn.add_q_proj(x), attn.add_k_proj(x), attn.add_v_proj(x))
    return (t.unflatten(-1, (-1, attn.head_dim)) for t in joint)


class FluxHost:
    """The Host of FluxTransformer2DModel."""

    model_class = FluxTransformer2DModel
    processor_class = FluxControlledAttnProcessor
    stock = (FluxAttnProcessor,)
    takes_tokens = True

    @staticmethod
    def places(model: nn.Module) -> list[Place]:
        doubles = [Place(block.attn, "double") for block in model.transformer_blocks]  # type: ignore[union-attr]
        return doubles + [Place(block.attn, "single") for block in model.single_transformer_blocks]  # type: ignore[union-attr]

    @staticmethod
    def geometry(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Geometry:
        image = args[0] if args else kwargs["hidden_states"]
        text = args[1] if len(args) > 1 else kwargs["encoder_hidden_states"]
        return Geometry(text.shape[1], image.shape[1], image.shape[0], image.device)

    @staticmethod
    def grids(model: nn.Module, rows: int, columns: int) -> tuple[tuple[int, int], ...]:
        return ()
