"""The branch of an IP-Adapter in FLUX: the image's queries attend to image prompts beside a block, and it is added after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ...bindings import Control, attention


class ImageBranch:
    """Of one double block. Its queries are the image's after the norm and without RoPE; no output projection follows.

    The block's own projection of q is listened to, so that q is projected once.
    """

    def __init__(self, block: Any) -> None:
        self.block = block
        self._asked: tuple[Control, Sequence[Tensor], Sequence[Tensor]] | None = None
        self._query: Tensor | None = None

    def hooks(self) -> list[Any]:
        projection = self.block.attn.to_qkv if self.block.attn.fused_projections else self.block.attn.to_q
        return [
            self.block.register_forward_pre_hook(self._begin),
            projection.register_forward_hook(self._project),
            self.block.register_forward_hook(self._add),
        ]

    def ask(self, control: Control, keys: Sequence[Tensor], values: Sequence[Tensor], hidden: Tensor) -> Tensor:
        """As Plan.hidden, whose call says that this layer is controlled in this step; leaves the hidden states alone."""
        self._asked = control, keys, values
        return hidden

    def _begin(self, module: nn.Module, inputs: tuple) -> None:
        self._asked = self._query = None  # a call that failed may have left them

    def _project(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        if self._asked is not None:
            self._query = output

    def _add(self, module: nn.Module, inputs: tuple, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor] | None:
        if self._asked is None:
            return None
        (control, keys, values), query, attn = self._asked, self._query, self.block.attn
        self._asked = self._query = None
        if query is None:
            raise RuntimeError("flashbrush: the block's projections were fused or exchanged after apply(); do that before")
        query = attn.norm_q(query[..., : attn.inner_dim].unflatten(-1, (-1, attn.head_dim)))
        text, image = output
        return text, image + attention(query, keys, values, control, backend=attn.processor.backend).flatten(2)
