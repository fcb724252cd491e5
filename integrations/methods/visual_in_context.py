"""SD-VICL (arXiv 2508.09949): do to one image what pairs of images show, by self-attention alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..diffusers.protocol.layer import Layer, Step
from ..diffusers.protocol.plan import Plan
from .shared.cross_batch import Reader, read
from .shared.knobs import Clip, Number, Places, Resolutions, Several, Window
from .shared.layers_and_steps import has_resolution, is_self_attention, within
from .shared.roles import InContextRoles, in_context_roles


@dataclass
class VisualInContext:
    """In a UNet's self-attention the prediction D reads B's values by the attention of the query C to A.

    With n pairs (A_k, B_k), N tokens an image, the head dim d and mu = 1/(n N), the mean of alpha's rows:

        alpha = softmax(Q_C [K_A1, ..., K_An]^T / (temperature sqrt(d)))
        o_D   = clip(mu + contrast (alpha - mu)) [V_B1, ..., V_Bn]

    Several pairs are the paper's implicitly weighted prompt ensemble. All other items are plain. The paper
    also inverts A, B and C by DDPM, starts D from C's noise, matches D's latents to B's by AdaIN and guides
    by the difference to a plain pass. VisualICLPipeline does all of this. A knob may be set at any time,
    between steps too.

    Args:
        temperature: above 0; 0.4 in the paper.
        contrast: 1.67 in the paper; 1: none.
        clip: bounds of the contrasted map. The paper mentions none; the code of cross-image attention,
            which it builds on, has (0, 1). None: unclipped, with one sweep over the keys.
        places: of "down", "mid" and "up", one or several; "up" in the paper.
        resolutions: of the layers that are changed: sides of squares of as many tokens, or (rows, columns).
            None: all, which the paper finds better than 64 alone.
        steps: (first, the one after the last or None). The paper gives none.
        items: the roles of a call's items, one InContextRoles for each prediction, with equally many pairs.
            None: the batch is [A_1, B_1, ..., A_n, B_n, C, D].

    Raises:
        ValueError: a wrong knob, by name. When the model is called: another model, a batch that does not
            fit.

    Examples:
        >>> from diffusers import StableDiffusionPipeline
        >>> from flashbrush.integrations import VisualInContext
        >>> from flashbrush.integrations.diffusers import apply
        >>> pipe = StableDiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
        >>> with apply(pipe.unet, VisualInContext()):  # of the batch [A, B, C, D]
        ...     images = pipe(["", "", "", ""], guidance_scale=1.0, num_inference_steps=2).images
    """

    temperature: float = Number(0.4, above=0)
    contrast: float = Number(1.67)
    clip: tuple[float, float] | None = Clip((0.0, 1.0))
    places: Sequence[str] = Places("up")
    resolutions: Sequence[int | tuple[int, int]] | None = Resolutions(None)
    steps: tuple[int, int | None] = Window()
    items: Sequence[InContextRoles] | None = Several(InContextRoles, None)

    def _knob_changes(self, name: str, value: Any) -> None:
        if name == "items" and value is not None and len({len(roles.prompts) for roles in value}) > 1:
            raise ValueError(f"items: expected equally many pairs for each prediction, got {value!r}")

    def plan(self, layer: Layer, step: Step) -> Plan | None:
        if not is_self_attention(layer, self.places) or not within(self.steps, step.index):
            return None
        if self.resolutions is not None and not any(has_resolution(layer, r) for r in self.resolutions):
            return None
        readers = []
        for roles in in_context_roles(self.items, layer.batch):
            images, truths = zip(*roles.prompts, strict=True)
            readers.append(Reader(roles.prediction, roles.query, images, truths))
        return read(layer, readers, self.temperature, self.contrast, self.clip)
