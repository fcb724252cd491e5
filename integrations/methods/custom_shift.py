"""CustomShift (arXiv 2606.16866): an image of SD 3 reads what the model itself makes of clean reference
images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from ...bindings import Control, Segments
from ..diffusers.protocol.batch_call import Part
from ..diffusers.protocol.layer import Layer, Step
from ..diffusers.protocol.plan import Plan, Seen
from .shared import cross_batch as borrowed


@dataclass(eq=False)
class CustomShift:
    """Image x and prompt p read the references R; a reference reads itself and its subject's name s alone. In
    each head:

        o_{x, p} = softmax(q [K_x ; K_p ; K_R1 ; ... ; K_Rn]^T / sqrt(d)) [V_x ; V_p ; V_R1 ; ... ; V_Rn]
        o_{R, s} = softmax(q [K_R ; K_s]^T / sqrt(d)) [V_R ; V_s]                                  for each R, at t = 0

    The references are clean and hear of nothing else, so that their K and V are the same in every step:
    `remember` keeps them, layer by layer, and generation reads them in place.

        with apply(transformer, CustomShift()) as handle:
            handle.method.remember(transformer, references, names, pooled)
            ...

    Read from summaries of the paper, of which no code is published: that the routing is one softmax over
    tokens, and that x and p do not see s, are our readings. The paper fine-tunes by LoRA, which is loaded as
    ever. SD 3.5's second attention, of the image alone, is left plain.

    Args:
        items: the batch items that read the references; None: the last two thirds of a batch [neither,
            references, references and prompt], as `guide` takes them. May be set at any time; ValueError
            names a wrong one.
    """

    items: Sequence[int] | None = None

    def __post_init__(self) -> None:
        self._reading = False
        self._kept: dict[
            int, tuple[Tensor, Tensor]
        ] = {}  # k and v (1, tokens of all references, heads, head_dim)

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, borrowed.check_items(name, value) if name == "items" else value)

    @torch.no_grad()
    def remember(self, transformer: nn.Module, latents: Tensor, text: Tensor, pooled: Tensor) -> None:
        """Run the references and keep their keys and values, beside those that are kept already; see
        `forget`.

        One forward call, which a counting handle counts as a step: handle.reset() starts over.

        Args:
            transformer: the model under this method's control.
            latents: (references, channels, rows, columns), clean. text, pooled: the embeddings of the
                subjects' names.

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
        """Drop what `remember` has kept: the model is plain until it has references again."""
        self._kept = {}

    def plan(self, layer: Layer, step: Step) -> Plan | None:
        if layer.kind not in ("joint", "self") or layer.place is not None:
            raise ValueError(
                f"CustomShift: it is made for the joint attention of SD 3; layer {layer.index} is {layer.kind!r}"
            )
        if layer.kind == "self":
            return None
        if self._reading:
            return Plan(see=partial(self._see, layer))
        if layer.index not in self._kept:
            return None
        if self.items is None and layer.batch % 3:
            raise ValueError(
                f"items: without them a batch has 3 equal parts, which {layer.batch} items have not"
            )
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


def guide(
    neither: Tensor,
    references: Tensor,
    both: Tensor,
    *,
    scale_references: float = 7.0,
    scale_prompt: float = 7.0,
    norm: str = "least",
    base: str = "neither",
) -> Tensor:
    """base + scale_references n(g_R) + scale_prompt n(g_p), with g_R = references - neither and g_p = both -
    references.

    Args:
        neither, references, both: the velocities without references and prompt, with references, with both.
        scale_references, scale_prompt: the paper's 7.
        norm: n(g): "unit", g / ||g||, as the paper writes it, over all of an item's latents; "least", g m /
            ||g|| with m the smaller of the two norms, which is SynCD's, whose data the paper builds on: with
            unit norms a scale of 7 would be next to nothing; "none", g.
        base: "neither" (CustomShift), or "references" (SynCD).

    Raises:
        ValueError: another norm or base.
    """
    if norm not in ("unit", "least", "none") or base not in ("neither", "references"):
        raise ValueError(
            f"guide: expected norm unit, least or none and base neither or references, got {norm!r}, {base!r}"
        )
    steps = references - neither, both - references
    lengths = [torch.linalg.vector_norm(g, dim=tuple(range(1, g.dim())), keepdim=True) for g in steps]
    least = torch.minimum(*lengths) if norm == "least" else 1.0
    scaled = (
        steps
        if norm == "none"
        else [g * least / n.clamp(min=1e-12) for g, n in zip(steps, lengths, strict=True)]
    )
    return (
        (neither if base == "neither" else references)
        + scale_references * scaled[0]
        + scale_prompt * scaled[1]
    )
