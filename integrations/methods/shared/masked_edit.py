"""For KV-Edit: the time under which keys are kept, and how masked tokens are put back into the photo."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def cache_time(times: Sequence[float], step: int, phase: str) -> float:
    """The time under which a step's keys are kept: the upper end of the interval that the step crosses.

    The inversion enters an interval at its lower end, the edit at its upper; both take the upper one.

    Args:
        times: decreasing noise levels.
        step: index of the step, from 0; the inversion's first is the lowest interval, the edit's the
            highest.
        phase: "invert" or "edit".

    Raises:
        ValueError: `times` has fewer steps.
    """
    steps = len(times) - 1
    if step >= steps:
        raise ValueError(f"times: they are of {steps} steps, got step {step}; Handle.reset() counts anew")
    return times[steps - 1 - step] if phase == "invert" else times[step]


def reblend(latents: Tensor, source: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
    """source (1 - mask) + latents mask: within masked tokens, unmasked latents become the inversion's.

    Args:
        latents: (batch, masked tokens, channels), at some time.
        source: (batch, image tokens, channels), of the inversion at the same time.
        mask: of the packed latents, (image tokens, channels).
        tokens: KVEdit.tokens.
    """
    m = mask[tokens].to(latents)
    return source[:, tokens] * (1 - m) + latents * m


def paste(source: Tensor, latents: Tensor, tokens: Tensor) -> Tensor:
    """The source with the latents at `tokens`, (batch, image tokens, channels).

    Args:
        source: (batch, image tokens, channels).
        latents: (batch, masked tokens, channels).
        tokens: KVEdit.tokens.
    """
    return source.index_copy(1, tokens, latents.to(source))
