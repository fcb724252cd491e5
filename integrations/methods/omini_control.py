"""OminiControl (arXiv 2411.15098): how strongly condition tokens and other tokens attend to each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial

import torch
from torch import Tensor

from ...bindings import Control, Segments
from ..diffusers.protocol.layer import Layer, Step
from ..diffusers.protocol.plan import Plan, Seen
from .shared.knobs import Counts, Flag, Number


@dataclass
class OminiControl:
    """Attention over [text ; image ; conditions] with a bias between the conditions and the others.

        o = softmax(Q K^T / sqrt(d) + B) V,    B = log(gamma) on (conditions, others), (others, conditions)

    in all layers of FLUX. The conditions are the last image tokens. Text and image attend to all tokens; a
    condition attends to itself, text and image, and to no other condition. The first release has one
    condition and gamma. The second has several conditions, no gamma, and optionally keeps their keys and
    values (`cached`): at step 0 a condition then attends to itself only, and later calls are without the
    conditions' tokens. As the conditions depend on nothing else, step 0 may be a call of [text ; conditions]
    alone (in the released code with the conditions' LoRA and at time 0); the sampling's steps then count from
    1. The caller sets LoRA, time and ids (`offset_ids`). A knob may be set at any time.

    Args:
        condition_tokens: the number of tokens, > 0, or one for each condition.
        strength: gamma, >= 0; 1: neutral, 0: the conditions are cut off.
        independent_condition: whether the conditions attend to no text and image.
        cached: keep the conditions' keys and values at step 0, and read them in place at later steps.

    Raises:
        ValueError: a wrong knob, by name. When the model is called: fewer image tokens than condition
            tokens; with `cached`, a later step without kept keys.

    Examples:
        >>> import torch
        >>> from diffusers import FluxTransformer2DModel
        >>> from flashbrush.integrations import OminiControl
        >>> from flashbrush.integrations.diffusers import apply
        >>> transformer = FluxTransformer2DModel(num_layers=1, num_single_layers=1, attention_head_dim=16,
        ...     num_attention_heads=2, in_channels=4, joint_attention_dim=8, pooled_projection_dim=8,
        ...     axes_dims_rope=(4, 6, 6))
        >>> call = {"encoder_hidden_states": torch.randn(1, 3, 8), "pooled_projections": torch.randn(1, 8),
        ...     "txt_ids": torch.zeros(3, 3), "timestep": torch.ones(1)}
        >>> ids = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(6.0))
        >>> latents = torch.randn(1, 24, 4)  # the last 8 are the condition's
        >>> with apply(transformer, OminiControl(condition_tokens=8, strength=0.8)):
        ...     velocity = transformer(latents, img_ids=ids, **call).sample
    """

    condition_tokens: int | Sequence[int] = Counts("condition", low=1)
    strength: float = Number(1.0, low=0)
    independent_condition: bool = Flag(False)
    cached: bool = Flag(False)
    # {layer: (k, v)}, each (batch, condition tokens, heads, head_dim)
    kept: dict[int, tuple[Tensor, Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def plan(self, layer: Layer, step: Step) -> Plan:
        lengths = self._lengths
        if self.cached and step.index:
            if layer.index not in self.kept:
                raise ValueError(
                    f"cached: nothing is kept for layer {layer.index}; call step 0, with the conditions' "
                    "tokens, first"
                )
            control = _control(layer.text_len + layer.image_len, lengths, self.strength, False, True)
            return Plan(control, extra={"conditions": self.kept[layer.index]})
        others = layer.text_len + layer.image_len - sum(lengths)
        if others < layer.text_len:
            raise ValueError(
                f"condition_tokens: they are {sum(lengths)}, but the call has {layer.image_len} image tokens"
            )
        control = _control(others, lengths, self.strength, self.independent_condition or self.cached, False)
        return Plan(control, see=partial(self._keep, layer.index) if self.cached else None)

    @property
    def _lengths(self) -> tuple[int, ...]:
        return self.condition_tokens  # type: ignore[return-value]

    def _keep(self, layer: int, seen: Seen) -> None:
        first = seen.k.shape[1] - sum(self._lengths)
        self.kept[layer] = seen.k[:, first:].detach().clone(), seen.v[:, first:].detach().clone()


@lru_cache(maxsize=64)
def _control(
    others: int, lengths: tuple[int, ...], strength: float, independent: bool, extra: bool
) -> Control:
    """The control of rows [others ; conditions]; with `extra`, of rows others, conditions as extra keys."""
    gamma = -math.inf if strength == 0 else math.log(strength)
    if extra:
        keys = Segments(others=others, conditions=sum(lengths))
        return Control(
            Segments(others=others), keys, bias={("others", "conditions"): gamma} if gamma else None
        )
    names = [f"condition_{n}" for n in range(1, len(lengths) + 1)]
    bias = {(a, b): -math.inf for a in names for b in names if a != b}
    for name in names:
        seen = {("others", name): gamma, (name, "others"): -math.inf if independent else gamma}
        bias |= {pair: value for pair, value in seen.items() if value}
    return Control(Segments({"others": others} | dict(zip(names, lengths, strict=True))), bias=bias)


def offset_ids(ids: Tensor, rows: float = 0, columns: float = 0) -> Tensor:
    """Image ids of a condition that lies beside the image.

    Subject tasks have columns = W/16 of the image, 32 at 512 pixels, in current examples, and the other
    sign in older models. Spatial tasks have no offset.

    Args:
        ids: of the condition, (..., 3).
        rows: tokens below the image.
        columns: tokens to the right of the image.

    Returns:
        The moved ids, of the same shape.

    Examples:
        >>> import torch
        >>> from flashbrush.integrations.methods.omini_control import offset_ids
        >>> offset_ids(torch.tensor([[0.0, 1.0, 2.0]]), columns=32)
        tensor([[ 0.,  1., 34.]])
    """
    return ids + torch.tensor([0, rows, columns], dtype=ids.dtype, device=ids.device)
