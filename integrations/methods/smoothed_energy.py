"""SEG (arXiv 2408.00760): guidance away from a model whose queries are blurred over the image."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from ...bindings import query_blur
from ..diffusers.protocol.batch_call import Part
from ..diffusers.protocol.layer import Layer, Step
from ..diffusers.protocol.plan import Plan
from .shared.perturbed import Perturbed


@dataclass
class SmoothedEnergy(Perturbed):
    """The perturbed items' queries are blurred, which flattens the energy of their attention: o =
    softmax(G(Q) K^T) V.

    G is a Gaussian over the grid of image tokens; see bindings' query_blur for its taps. With an infinite
    sigma it is
    the mean, and all rows are the same: one is computed. In joint attention the text's queries stay
        (diffusers' guider
    blurs them, and has its two branches the wrong way round). Around it, `perturbed.guide` with the paper's
    scale 3. A knob may be set at any time; ValueError names a wrong one.

    Args:
        sigma: in tokens, >= 0; 0: plain. The released code's default is infinite, which there is any number
            over 9999.
        Further ones: those of Perturbed.
    """

    sigma: float = math.inf

    def checked(self, name: str, value: Any) -> Any:
        if name == "sigma" and not (
            isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0
        ):
            raise ValueError(f"sigma: expected a number >= 0 or inf, got {value!r}")
        return super().checked(name, value)

    def plan(self, layer: Layer, step: Step) -> Plan | None:
        items = self.perturbed(layer, step)
        if not items or not self.sigma:
            return None
        if layer.grid is None:
            raise ValueError(
                "SmoothedEnergy: the model's inputs do not tell the grid of image tokens; set handle.grid"
            )
        sigma = math.inf if self.sigma > 9999 else float(self.sigma)
        return _plan(items, layer.rows - layer.image_len, layer.grid, sigma)


@lru_cache(maxsize=64)
def _plan(items: tuple[int, ...], text_len: int, grid: tuple[int, int], sigma: float) -> Plan:
    blur = partial(query_blur, grid=grid, sigma=sigma, tokens=slice(text_len, None))
    return Plan(parts=[Part(items, query=blur)])
