"""IC-Custom (arXiv 2507.01926): references beside the target in one image, marked by embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from ...bindings import Control, Segments
from ..diffusers.protocol.layer import Layer, Step
from ..diffusers.protocol.plan import Plan
from .shared.ic_custom_parameters import TASKS, ICCustomParameters
from .shared.knobs import Choice, Count, Counts, Instance, Pair, Share, checked
from .shared.panels import known_mask, panels

__all__ = ["ICCustom", "known_mask", "panels", "preserve"]


@dataclass(eq=False)
class ICCustom:
    """Boundary embeddings E on q and k of the image, and the task's registers r among keys and values.

        E = cond + idx[k] on the tokens of reference k, target on those of the target
        o = softmax(R([q_T; q_I + E]) [R([k_T; k_I + E]); r_K]^T / sqrt(d)) [v_T; v_I; r_V]

    in all layers of FLUX, with q and k normalised and R the RoPE, as in the released code. The paper (Eq.
    6) adds E outside of R and has one register for keys and values. FLUX Fill's image is a row of panels,
    the references and then the target; a photo of a reference may also be given as Redux tokens after the
    text's. `known_mask` makes the model's mask, `preserve` keeps a background. Load the released LoRA and
    input layers yourself. A knob may be set at any time.

    Args:
        parameters: loaded or trained, in the model's dtype.
        task: how the position is given: "free": not at all, "precise": by an exact mask, "drawn": by a user's
            drawing.
        references: panels beside the target.
        widths: of the panels in tokens, the target's last; None: all are equally wide.
        grid: (rows, columns) of the image tokens; None: Handle.grid.

    Raises:
        ValueError: a wrong knob, by name. When the model is called: parameters, panels or a grid that do
            not fit.

    Examples:
        >>> from diffusers import FluxPipeline
        >>> from flashbrush.integrations import ICCustom, ICCustomParameters
        >>> from flashbrush.integrations.diffusers import apply
        >>> pipe = FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev")
        >>> parameters = ICCustomParameters(pipe.transformer.inner_dim)  # or from_pretrained()
        >>> size = {"height": 64, "width": 128, "max_sequence_length": 16}  # two panels
        >>> token = 2 * pipe.vae_scale_factor  # pixels a side
        >>> with apply(pipe.transformer, ICCustom(parameters)) as handle:
        ...     handle.grid = (64 // token, 128 // token)
        ...     images = pipe("a chair in a garden", num_inference_steps=2, **size).images
    """

    parameters: ICCustomParameters = Instance(ICCustomParameters)
    task: Literal["free", "precise", "drawn"] = Choice(*TASKS)
    references: int = Count(1, low=1)
    widths: Sequence[int] | None = Counts("panel", None, low=1, one=False)
    grid: tuple[int, int] | None = Pair("rows, columns", None, low=1)
    _pass: tuple[int, Plan] | None = field(default=None, init=False, repr=False)

    def plan(self, layer: Layer, step: Step) -> Plan:
        parameters = self.parameters
        if torch.is_grad_enabled() and any(p.requires_grad for p in parameters.parameters()):
            # One plan for each layer: with gradient checkpointing each layer has a backward graph of its own.
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
    """velocity (1 - known) + (noise - source) known, while step <= until * steps: the background is kept.

    Args:
        velocity: of the model, (batch, tokens, channels).
        noise: of the first step, the same shape.
        source: the photo's latents, the same shape.
        known: (batch or 1, tokens, 1), 1 where the photo is kept.
        step: from 0.
        steps: of the run.
        until: share of the steps, 0 to 1: 0.8 in the released code, 0.5 in its app.
        progressive: on even steps only.

    Returns:
        The velocity for the scheduler's step, (batch, tokens, channels).

    Raises:
        ValueError: a wrong `until`.

    Examples:
        >>> import torch
        >>> from flashbrush.integrations.methods.ic_custom import preserve
        >>> velocity, noise, source = torch.zeros(1, 2, 1), torch.ones(1, 2, 1), torch.zeros(1, 2, 1)
        >>> known = torch.tensor([[[1.0], [0.0]]])
        >>> preserve(velocity, noise, source, known, step=0, steps=10).flatten()
        tensor([1., 0.])
    """
    checked("until", Share(), until)
    if step > until * steps or (progressive and step % 2):
        return velocity
    return velocity * (1 - known) + (noise - source) * known
