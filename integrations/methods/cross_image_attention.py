"""Cross-image attention (arXiv 2311.03335): the structure of one image with the appearance of another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..diffusers.protocol.layer import Layer, Step
from ..diffusers.protocol.plan import Plan
from .shared import cross_batch as borrowed
from .shared.cross_batch import Clip, Reader, Resolution, Window


@dataclass(frozen=True)
class TransferRoles:
    """Which items of a batch are the output, the image it takes its appearance from, and the one of its
    structure.
    """

    output: int = 0
    appearance: int = 1
    structure: int = 2


@dataclass
class CrossImageAttention:
    """The output reads the appearance's keys and values with its own queries, in a UNet's upsampling
    self-attention.

    With mu = 1/N the mean of P's rows (N tokens an image, head dim d):

        P     = softmax(Q_out K_app^T / sqrt(d))
        o_out = clip(mu + beta (P - mu)) V_app

    and every so often, early on, K and V of the structure instead. Around it the released code inverts both
    images by DDPM, starts the output from the structure's noise, matches its latents to the appearance's by
    AdaIN and guides by the difference to a plain pass. All defaults are the released code's. A knob may be
    set at any time; ValueError names a wrong one.

    Args:
        contrast: beta; 1: none.
        clip: bounds of the contrasted map, or None.
        windows: {resolution: (first, after the last or None)}: the counts during which layers of that
            resolution, the side of a square of as many tokens or (rows, columns), are changed; layers of
            others never are.
        structure_every, structure_until: counts below `structure_until` that are multiples of
            `structure_every` read the structure; structure_every=None: none do.
        lag: the released code's step count, on which the windows are defined, lags this many steps behind.
        places: of "down", "mid" and "up".
        items: which items of a call are what, a sequence with TransferRoles for each output.
    """

    contrast: float = 1.67
    clip: Clip = (0.0, 1.0)
    windows: Mapping[Resolution, Window] = field(default_factory=lambda: {32: (10, 70), 64: (10, 90)})
    structure_every: int | None = 5
    structure_until: int = 40
    lag: int = 1
    places: Sequence[str] = ("up",)
    items: Sequence[TransferRoles] = field(default_factory=lambda: (TransferRoles(),))

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "items" and value is None:
            raise ValueError("items: expected one or several TransferRoles, got None")
        value = borrowed.checked(name, value, TransferRoles)
        if name == "windows":
            if not isinstance(value, Mapping) or not value:
                raise ValueError(
                    f"windows: expected {{resolution: (first, after the last or None)}}, got {value!r}"
                )
            windows = {borrowed.check_resolution(name, r): window for r, window in value.items()}
            value = {r: borrowed.check_window(f"windows[{r}]", window) for r, window in windows.items()}
        if name == "structure_every" and value is not None and not (borrowed.is_count(value) and value):
            raise ValueError(f"structure_every: expected a number of steps > 0 or None, got {value!r}")
        if name in ("structure_until", "lag") and not borrowed.is_count(value):
            raise ValueError(f"{name}: expected a number of steps >= 0, got {value!r}")
        object.__setattr__(self, name, value)

    def plan(self, layer: Layer, step: Step) -> Plan | None:
        count = step.index - self.lag
        windows = [window for r, window in self.windows.items() if borrowed.has_resolution(layer, r)]
        if not borrowed.is_self(layer, self.places) or not any(
            borrowed.within(window, count) for window in windows
        ):
            return None
        every = self.structure_every
        structure = every is not None and count < self.structure_until and count % every == 0
        readers = []
        for roles in self.items:
            read_from = roles.structure if structure else roles.appearance
            readers.append(Reader(roles.output, roles.output, (read_from,), (read_from,)))
        return borrowed.read(layer, readers, 1.0, self.contrast, self.clip)
