"""The IP-Adapter's branch in FLUX, which runs beside a double block and is added to the block's output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ....bindings import Control, attention


class ImageBranch:
    """The branch of one double block, in which the image's queries without RoPE attend to image prompts.

    It takes q from the block's own projection by a hook, so that q is projected once. It has no output
    projection. It acts where apply() selected the block's layer and the step.

    Attributes:
        prompts: (control, keys, values) of the image prompts in the coming calls; None: the branch adds
            nothing.
    """

    def __init__(self, block: Any) -> None:
        self.block: Any = block
        self.prompts: tuple[Control, Sequence[Tensor], Sequence[Tensor]] | None = None
        self._query: Tensor | None = None
        self._projection: nn.Module | None = None
        self._query_hook: Any = None
        self._hooks = [block.register_forward_pre_hook(self._begin), block.register_forward_hook(self._add)]
        self._hook_projection()

    def remove(self) -> None:
        for hook in (*self._hooks, self._query_hook):
            hook.remove()
        self.block, self._projection = None, None  # the method may live longer than the model

    def _hook_projection(self) -> None:
        attn = self.block.attn
        if self._query_hook is not None:
            self._query_hook.remove()
        projection = self._projection = attn.to_qkv if attn.fused_projections else attn.to_q
        self._query_hook = projection.register_forward_hook(self._project)

    def _acts(self) -> bool:
        state = self.block.attn.processor.state
        return self.prompts is not None and state is not None and state.controlled

    def _begin(self, module: nn.Module, inputs: tuple) -> None:
        self._query = None  # a call that failed may have left it
        attn = self.block.attn
        # A LoRA and fused projections put another module in the place of this one.
        if self._projection is not (attn.to_qkv if attn.fused_projections else attn.to_q):
            self._hook_projection()

    def _project(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        if self._acts():
            self._query = output

    def _add(
        self, module: nn.Module, inputs: tuple, output: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor] | None:
        if not self._acts():
            return None
        assert self.prompts is not None and self._query is not None
        (control, keys, values), query, attn = self.prompts, self._query, self.block.attn
        self._query = None
        query = attn.norm_q(query[..., : attn.inner_dim].unflatten(-1, (-1, attn.head_dim)))
        text, image = output
        keys, values = ([t.to(query.dtype) for t in tensors] for tensors in (keys, values))
        return text, image + attention(query, keys, values, control, backend=attn.processor.backend).flatten(
            2
        )
