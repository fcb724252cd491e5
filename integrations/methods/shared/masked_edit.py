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

    Returns:
        One of `times`.

    Raises:
        ValueError: `times` has fewer steps.

    Examples:
        >>> from flashbrush.integrations.methods.shared.masked_edit import cache_time
        >>> times = (0.9, 0.5, 0.0)
        >>> cache_time(times, 0, "invert"), cache_time(times, 1, "edit")  # both cross the interval 0 to 0.5
        (0.5, 0.5)
    """
    steps = len(times) - 1
    if step >= steps:
        raise ValueError(
            f"times: they have {steps} steps, got step {step}; Handle.reset() restarts the count"
        )
    return times[steps - 1 - step] if phase == "invert" else times[step]


def reblend(latents: Tensor, source: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
    """source (1 - mask) + latents mask: within masked tokens, unmasked latents become the inversion's.

    Args:
        latents: (batch, masked tokens, channels), at some time.
        source: (batch, image tokens, channels), of the inversion at the same time.
        mask: of the packed latents, (image tokens, channels).
        tokens: KVEdit.tokens.

    Returns:
        (batch, masked tokens, channels).

    Examples:
        >>> import torch
        >>> from flashbrush.integrations.methods.shared.masked_edit import reblend
        >>> mask = torch.tensor([[0.0, 0.0], [1.0, 0.0]])  # one latent of token 1
        >>> reblend(torch.ones(1, 1, 2), torch.zeros(1, 2, 2), mask, torch.tensor([1]))
        tensor([[[1., 0.]]])
    """
    m = mask[tokens].to(latents)
    return source[:, tokens] * (1 - m) + latents * m


def paste(source: Tensor, latents: Tensor, tokens: Tensor) -> Tensor:
    """The source with the latents at `tokens`, (batch, image tokens, channels).

    Args:
        source: (batch, image tokens, channels).
        latents: (batch, masked tokens, channels).
        tokens: KVEdit.tokens.

    Examples:
        >>> import torch
        >>> from flashbrush.integrations.methods.shared.masked_edit import paste
        >>> paste(torch.zeros(1, 3, 1), torch.ones(1, 2, 1), torch.tensor([1, 2])).flatten()
        tensor([0., 1., 1.])
    """
    return source.index_copy(1, tokens, latents.to(source))
