"""IC-Custom (arXiv 2507.01926): references beside the target in one image, told apart in the attention
(ICMA).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from ...bindings import Control, Segments
from ..diffusers.protocol.layer import Layer, Step
from ..diffusers.protocol.plan import Plan
from .shared.cross_batch import check_resolution, is_count
from .shared.ic_custom_parameters import TASKS, ICCustomParameters


@dataclass(eq=False)
class ICCustom:
    """Boundary embeddings E on q and k of the image, and registers r of the task among keys and values, in
    all layers.

        E = cond + idx[k] on the tokens of reference k, target on those of the target
        o = softmax(R([q_T; q_I + E]) [R([k_T; k_I + E]); r_K]^T / sqrt(d)) [v_T; v_I; r_V]

    with q and k normalised and R the RoPE, as in the released code; the paper adds E outside of R, and has
    one register for keys and values. The image of FLUX Fill is a row of panels, the references and then the
    target; a photo of the reference may also be given as Redux tokens after the text's. `known_mask` makes
    the model's mask, `preserve` keeps a background. The released LoRA and input layers are the caller's. A
    knob may be set at any time; ValueError names a wrong one.

    Args:
        parameters: loaded or trained, in the model's dtype.
        task: "free" of position, or with a mask that is "precise" or "drawn" by a user.
        references: panels beside the target.
        widths: of the panels in tokens, the target's last; None: all are equally wide.
        grid: (rows, columns) of the image tokens; None: as Handle.grid tells.
    """

    parameters: ICCustomParameters
    task: Literal["free", "precise", "drawn"] = "free"
    references: int = 1
    widths: Sequence[int] | None = None
    grid: tuple[int, int] | None = None
    _pass: tuple[int, Plan] | None = field(default=None, init=False, repr=False)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "parameters" and not isinstance(value, ICCustomParameters):
            raise ValueError(f"parameters: expected ICCustomParameters, got {type(value).__name__}")
        if name == "task" and value not in TASKS:
            raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {value!r}")
        if name == "references" and not (is_count(value) and value):
            raise ValueError(f"references: expected a number of panels > 0, got {value!r}")
        if name == "widths" and value is not None:
            if not isinstance(value, Sequence) or not all(is_count(n) and n for n in value):
                raise ValueError(f"widths: expected numbers of tokens > 0, one for each panel, got {value!r}")
            value = tuple(value)
        if name == "grid" and value is not None and isinstance(check_resolution(name, value), int):
            raise ValueError(f"grid: expected (rows, columns) of the image tokens, got {value!r}")
        object.__setattr__(self, name, value)

    def plan(self, layer: Layer, step: Step) -> Plan:
        parameters = self.parameters
        if torch.is_grad_enabled() and any(p.requires_grad for p in parameters.parameters()):
            # Of its own in each layer: layers that are checkpointed go backward one by one, through a graph
            # of their own.
            return self._make(layer)
        if self._pass is None or layer.index <= self._pass[0]:
            self._pass = layer.index, self._make(layer)
        self._pass = layer.index, self._pass[1]
        return self._pass[1]

    def _make(self, layer: Layer) -> Plan:
        if self.parameters.hidden != layer.heads * layer.head_dim:
            expected = f"{layer.heads * layer.head_dim} channels for layer {layer.index}"
            raise ValueError(f"parameters: expected {expected}, got {self.parameters.hidden}")
        if self.references > (most := self.parameters.idx_embedding.num_embeddings):
            raise ValueError(
                f"references: expected at most {most} of these parameters, got {self.references}"
            )
        if (grid := self.grid or layer.grid) is None:
            raise ValueError("grid: expected (rows, columns) of the image tokens, here or as Handle.grid")
        if grid[0] * grid[1] != layer.image_len:
            raise ValueError(
                f"grid: {grid[0]} x {grid[1]} tokens, but the call has {layer.image_len} of image"
            )
        heads = (layer.heads, layer.head_dim)
        panel = panels(grid, self.references, self.widths).to(self.parameters.cond_embedding.weight.device)
        boundary = self.parameters.boundary(self.references)[panel]
        offset = torch.nn.functional.pad(boundary, (0, 0, layer.text_len, 0)).unflatten(1, heads)
        k, v = (t.unflatten(1, heads)[None] for t in self.parameters.registers(self.task))
        control = _control(layer.rows, k.shape[1])
        return Plan(control, extra={"registers": (k, v)}, q_offset=offset, k_offset=offset)


@lru_cache(maxsize=64)
def _control(tokens: int, registers: int) -> Control:
    return Control(Segments(tokens=tokens), Segments(tokens=tokens, registers=registers))


@lru_cache(maxsize=64)
def panels(grid: tuple[int, int], references: int = 1, widths: tuple[int, ...] | None = None) -> Tensor:
    """int64 (rows * columns,): the panel that each token is in, from the left; the last, `references`, is the
    target.

    Raises:
        ValueError: other than references + 1 widths, or not as wide together as the grid; without, one that
            has no such equal parts.
    """
    rows, columns = grid
    if widths is None:
        if columns % (references + 1):
            raise ValueError(
                f"widths: {columns} columns are not {references + 1} equally wide panels; give their widths"
            )
        widths = (columns // (references + 1),) * (references + 1)
    if len(widths) != references + 1 or sum(widths) != columns:
        raise ValueError(
            f"widths: expected those of {references + 1} panels, {columns} tokens together, got {widths}"
        )
    with torch.inference_mode(False):  # kept beyond a call in inference mode
        return torch.arange(references + 1).repeat_interleave(torch.tensor(widths)).repeat(rows)


def known_mask(painted: Tensor, references: Sequence[int]) -> Tensor:
    """The model's mask of all panels, the inverse of FLUX Fill's: 1 known, 0 generated.

    Args:
        painted: (..., height, width), 1 where the target is generated; all ones for a task that is free of
            position.
        references: widths of their panels, which are known.
    """
    known = painted.new_ones(*painted.shape[:-1], sum(references))
    return torch.cat([known, 1 - painted], -1)


def preserve(
    velocity: Tensor,
    noise: Tensor,
    source: Tensor,
    known: Tensor,
    step: int,
    steps: int,
    *,
    until: float = 0.8,
    progressive: bool = False,
) -> Tensor:
    """velocity (1 - known) + (noise - source) known while step <= until * steps: the background's straight
    way home.

    Args:
        velocity, noise, source: (batch, tokens, channels): the model's, the noise of the first step, the
            photo's latents.
        known: (batch or 1, tokens, 1), 1 where the photo is kept.
        step: from 0. until: 0.8 in the released code, 0.5 in its app. progressive: on even steps alone.
    """
    if not 0 <= until <= 1:
        raise ValueError(f"until: expected a share of the steps, 0 to 1, got {until!r}")
    if step > until * steps or (progressive and step % 2):
        return velocity
    return velocity * (1 - known) + (noise - source) * known
