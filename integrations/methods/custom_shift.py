"""CustomShift (arXiv 2606.16866): an image of SD 3 reads keys and values of clean references."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor, nn

from ...bindings import Control, Segments
from ..diffusers.protocol.batch_call import Part
from ..diffusers.protocol.layer import Layer, Step
from ..diffusers.protocol.plan import Plan, Seen
from .shared.knobs import Items
from .shared.reference_guidance import guide

__all__ = ["CustomShift", "guide"]


@dataclass(eq=False)
class CustomShift:
    """Image x and prompt p read the references R; a reference reads itself and its subject's name s alone.

    In each head, with d the head dim:

        o_{x, p} = softmax(q [K_x ; K_p ; K_R1 ; ... ; K_Rn]^T / sqrt(d)) [V_x ; V_p ; V_R1 ; ... ; V_Rn]
        o_{R, s} = softmax(q [K_R ; K_s]^T / sqrt(d)) [V_R ; V_s]                   for each R, at t = 0

    The references are clean and read nothing else, so their K and V are the same in every step: `remember`
    keeps them, layer by layer, and generation reads them in place.

    This follows summaries of the paper; no code is published. Two points are our assumptions: the routing is
    one softmax over tokens, and x and p do not read s. The paper fine-tunes by LoRA, which is loaded as
    usual. SD 3.5's second attention, of the image alone, stays plain. A knob may be set at any time.

    Args:
        items: the batch items that read the references; None: the last two thirds of a batch [neither,
            references, references and prompt], as `guide` takes them.

    Raises:
        ValueError: a wrong knob, by name. When the model is called: another model than SD 3, a batch that
            does not fit.

    Examples:
        >>> import torch
        >>> from diffusers import SD3Transformer2DModel
        >>> from flashbrush.integrations import CustomShift
        >>> from flashbrush.integrations.diffusers import apply
        >>> from flashbrush.integrations.methods.custom_shift import guide
        >>> transformer = SD3Transformer2DModel(sample_size=8, in_channels=4, num_layers=1,
        ...     attention_head_dim=8, num_attention_heads=2, joint_attention_dim=8, caption_projection_dim=16,
        ...     pooled_projection_dim=8, pos_embed_max_size=8)
        >>> references, names, pooled = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 8), torch.randn(2, 8)
        >>> latents, text, pooled_text = torch.randn(3, 4, 8, 8), torch.randn(3, 5, 8), torch.randn(3, 8)
        >>> method = CustomShift()
        >>> with apply(transformer, method):
        ...     method.remember(transformer, references, names, pooled)
        ...     velocity = transformer(latents, text, pooled_text, torch.full((3,), 500.0)).sample
        >>> neither, with_references, both = velocity.chunk(3)
        >>> velocity = guide(neither, with_references, both)
    """

    items: Sequence[int] | None = Items()

    def __post_init__(self) -> None:
        self._reading = False
        # {layer: (k, v)}, each (1, tokens of all references, heads, head_dim)
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def remember(self, transformer: nn.Module, latents: Tensor, text: Tensor, pooled: Tensor) -> None:
        """Run the references through the model once and keep their keys and values, beside those kept before.

        This is one forward call, and a handle that counts forward calls counts it as a step; handle.reset()
        restarts the count.

        Args:
            transformer: the model under this method's control.
            latents: clean latents, (references, channels, rows, columns).
            text: embeddings of the subjects' names, (references, tokens, channels).
            pooled: their pooled embeddings, (references, channels).

        Raises:
            RuntimeError: the model is not under this method's control.
        """
        before, self._kept, self._reading = self._kept, {}, True
        try:
            transformer(
                hidden_states=latents,
                encoder_hidden_states=text,
                pooled_projections=pooled,
                timestep=latents.new_zeros(latents.shape[0]),
            )
        finally:
            new, self._kept, self._reading = self._kept, before, False
        if not new:
            raise RuntimeError(
                "CustomShift.remember: no layer was read; apply(transformer, this method) comes first"
            )
        for i, (k, v) in new.items():
            old_k, old_v = before.get(i, (k[:, :0], v[:, :0]))
            self._kept[i] = torch.cat([old_k, k], 1), torch.cat([old_v, v], 1)

    def forget(self) -> None:
        """Drop what `remember` keeps; without references the model is plain."""
        self._kept = {}

    def plan(self, layer: Layer, step: Step) -> Plan | None:
        if layer.kind not in ("joint", "self") or layer.place is not None:
            raise ValueError(
                f"CustomShift: expected the joint attention of SD 3; layer {layer.index} is {layer.kind!r}"
            )
        if layer.kind == "self":
            return None
        if self._reading:
            return Plan(see=partial(self._see, layer))
        if layer.index not in self._kept:
            return None
        if self.items is None and layer.batch % 3:
            raise ValueError(f"items: without them a batch has 3 equal parts, got {layer.batch} items")
        items = tuple(range(layer.batch // 3, layer.batch)) if self.items is None else tuple(self.items)
        references = self._kept[layer.index]
        control = _control(layer.text_len, layer.image_len, references[0].shape[1])
        return Plan(parts=[Part(items, control=control, extra={"references": references})])

    def _see(self, layer: Layer, seen: Seen) -> None:
        k, v = (t[:, layer.text_len :].flatten(0, 1)[None] for t in (seen.k, seen.v))
        self._kept[layer.index] = k, v


@lru_cache(maxsize=64)
def _control(text_len: int, image_len: int, references: int) -> Control:
    rows = {"prompt": text_len, "image": image_len}
    return Control(Segments(rows), Segments(rows | {"references": references}))
