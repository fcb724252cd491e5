"""SD-VICL (arXiv 2508.09949): a task shown by pairs of images, done to another one, by self-attention alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..diffusers.protocol.layer import Layer, Step
from ..diffusers.protocol.plan import Plan
from .shared import cross_batch as borrowed
from .shared.cross_batch import Clip, Reader, Resolution, Window


@dataclass(frozen=True)
class InContextRoles:
    """Which items of a batch are the pairs (A_k, B_k), the query C and its prediction D."""

    prompts: tuple[tuple[int, int], ...]
    query: int
    prediction: int

    def __post_init__(self) -> None:
        if not self.prompts or any(not isinstance(pair, tuple) or len(pair) != 2 for pair in self.prompts):
            raise ValueError(
                f"prompts: expected pairs of items (A_k, B_k), at least one, got {self.prompts!r}"
            )

    @staticmethod
    def stacked(prompts: int = 1, plain: bool = True, repeats: int = 1) -> tuple[InContextRoles, ...]:
        """For batches [A_1, B_1, ..., A_n, B_n, C, D plain, D], `repeats` times one after the other.

        Args:
            prompts: n. plain: whether there is an item for D with ordinary attention, as swap guidance needs
                it.
            repeats: such as 2 where the unconditional half of a classifier-free guidance is in the same
                batch.

        Raises:
            ValueError: less than one pair or repeat.
        """
        for name, count in (("prompts", prompts), ("repeats", repeats)):
            if count < 1:
                raise ValueError(f"{name}: expected at least 1, got {count}")
        length = 2 * prompts + 2 + plain
        return tuple(
            InContextRoles(
                tuple((start + 2 * k, start + 2 * k + 1) for k in range(prompts)),
                start + 2 * prompts,
                start + length - 1,
            )
            for start in range(0, repeats * length, length)
        )


@dataclass
class VisualInContext:
    """D reads B where C finds A, in the UNet's upsampling self-attention; the other items are left alone.

    With n pairs, and mu = 1/(n N) the mean of alpha's rows (N tokens an image, head dim d):

        alpha = softmax(Q_C [K_A1, ..., K_An]^T / (temperature sqrt(d)))
        o_D   = clip(mu + beta (alpha - mu)) [V_B1, ..., V_Bn]

    Several pairs are the paper's implicitly weighted prompt ensemble. Around it the paper inverts A, B and C
    by DDPM, starts D from C's noise, matches D's latents to B's by AdaIN and guides by the difference to an
    unswapped pass. A knob may be set at any time, between steps too; ValueError names a wrong one.

    Args:
        temperature: > 0; the paper's.
        contrast: beta; the paper's; 1: none.
        clip: bounds of the contrasted map. The paper does not mention any, cross-image attention's code, on
            which it builds, has (0, 1). None: unclipped, in a single sweep over the keys.
        places: of "down", "mid" and "up". The paper's are the upsampling layers.
        resolutions: those of the layers that are changed, each the side of a square of as many tokens or
            (rows, columns); None: all, which the paper finds better than 64 alone.
        steps: (first, after the last or None). The paper states none.
        items: which items of a call are what, a sequence with InContextRoles for each prediction, all with
            equally many pairs; None: the batch is [A_1, B_1, ..., A_n, B_n, C, D].
    """

    temperature: float = 0.4
    contrast: float = 1.67
    clip: Clip = (0.0, 1.0)
    places: Sequence[str] = ("up",)
    resolutions: Sequence[Resolution] | None = None
    steps: Window = (0, None)
    items: Sequence[InContextRoles] | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        value = borrowed.checked(name, value, InContextRoles)
        if name == "items" and value is not None and len({len(roles.prompts) for roles in value}) > 1:
            raise ValueError(f"items: expected equally many pairs for each prediction, got {value!r}")
        object.__setattr__(self, name, value)

    def plan(self, layer: Layer, step: Step) -> Plan | None:
        if not borrowed.is_self(layer, self.places) or not borrowed.within(self.steps, step.index):
            return None
        if self.resolutions is not None and not any(
            borrowed.has_resolution(layer, r) for r in self.resolutions
        ):
            return None
        readers = []
        for roles in self.items or _in_order(layer.batch):
            images, truths = zip(*roles.prompts, strict=True)
            readers.append(Reader(roles.prediction, roles.query, images, truths))
        return borrowed.read(layer, readers, self.temperature, self.contrast, self.clip)


def _in_order(batch: int) -> tuple[InContextRoles, ...]:
    if batch < 4 or batch % 2:
        raise ValueError(
            f"items: without them a batch is [A_1, B_1, ..., A_n, B_n, C, D], which {batch} items are not"
        )
    return InContextRoles.stacked(batch // 2 - 1, plain=False)
