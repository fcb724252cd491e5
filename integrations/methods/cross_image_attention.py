"""Cross-image attention (arXiv 2311.03335): the structure of one image with the appearance of another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..diffusers.protocol.layer import Layer, Step
from ..diffusers.protocol.plan import Plan
from .shared.cross_batch import Reader, read
from .shared.knobs import Clip, Count, Number, Places, Several, Windows
from .shared.layers_and_steps import has_resolution, is_self_attention, within
from .shared.roles import TransferRoles


@dataclass
class CrossImageAttention:
    """The output reads the appearance's keys and values with its own queries, in a UNet's self-attention.

    With N tokens an image, the head dim d and mu = 1/N, the mean of P's rows:

        P     = softmax(Q_out K_app^T / sqrt(d))
        o_out = clip(mu + contrast (P - mu)) V_app

    At some early steps the output reads the structure's K and V instead. The defaults are those of the
    released code, which also inverts both images by DDPM, starts the output from the structure's noise,
    matches its latents to the appearance's by AdaIN and guides by the difference to a plain pass.
    AppearanceTransferPipeline does all of this. A knob may be set at any time.

    Args:
        contrast: 1.67 in the code; 1: none.
        clip: bounds of the contrasted map, or None.
        windows: {resolution: (first, the one after the last or None)}: the counts at which layers of that
            resolution are changed. A resolution is the side of a square of tokens, or (rows, columns). Layers
            of other resolutions are not changed.
        structure_every: at counts that are multiples of this the output reads the structure; None: at none.
        structure_until: from this count on the output reads the appearance only.
        lag: a step's count is its index less this; the code's counter is one step behind.
        places: of "down", "mid" and "up", one or several.
        items: the roles of a call's items, one TransferRoles for each output.

    Raises:
        ValueError: a wrong knob, by name. When the model is called: another model, a batch that does not
            fit.

    Examples:
        >>> from diffusers import StableDiffusionPipeline
        >>> from flashbrush.integrations import CrossImageAttention
        >>> from flashbrush.integrations.diffusers import apply
        >>> pipe = StableDiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
        >>> prompts = ["a zebra", "a zebra", "a giraffe"]  # output, appearance, structure
        >>> with apply(pipe.unet, CrossImageAttention(windows={16: (1, None)})):
        ...     images = pipe(prompts, guidance_scale=1.0, num_inference_steps=3).images
    """

    contrast: float = Number(1.67)
    clip: tuple[float, float] | None = Clip((0.0, 1.0))
    windows: Mapping[int | tuple[int, int], tuple[int, int | None]] = Windows({32: (10, 70), 64: (10, 90)})
    structure_every: int | None = Count(5, low=1, optional=True)
    structure_until: int = Count(40)
    lag: int = Count(1)
    places: Sequence[str] = Places("up")
    items: Sequence[TransferRoles] = Several(TransferRoles, TransferRoles())

    def plan(self, layer: Layer, step: Step) -> Plan | None:
        count = step.index - self.lag
        windows = [window for r, window in self.windows.items() if has_resolution(layer, r)]
        if not is_self_attention(layer, self.places) or not any(within(window, count) for window in windows):
            return None
        every = self.structure_every
        structure = every is not None and count < self.structure_until and count % every == 0
        readers = []
        for roles in self.items:
            read_from = roles.structure if structure else roles.appearance
            readers.append(Reader(roles.output, roles.output, (read_from,), (read_from,)))
        return read(layer, readers, 1.0, self.contrast, self.clip)
