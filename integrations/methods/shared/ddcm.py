"""The sampler of InfEdit (arXiv 2312.04965), which edits an image without inverting it."""

from __future__ import annotations

from torch import Tensor

from .knobs import Share, checked


def ddcm_step(
    latents: Tensor,
    noise: Tensor,
    clean: Tensor,
    alpha: float,
    next_alpha: float,
    fresh: Tensor,
    eta: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """One step of the denoising diffusion consistent model, a virtual inversion; the source does not change.

    With x_s, e_s the source's latents and predicted noise, x, e those of an item, ab = alpha, ab' =
    next_alpha:

        e_cons = (x_s - sqrt(ab) x0_s) / sqrt(1 - ab)
        x0     = x0_s + ((x - x_s) - sqrt(1 - ab) (e - e_s)) / sqrt(ab)
        x'     = sqrt(ab') x0 + sqrt(1 - ab' - sd) ((e - e_s) + e_cons) + sqrt(sd) fresh,  sd = eta (1 - ab')

    All items start from sqrt(ab) x0_s + sqrt(1 - ab) fresh.

    Args:
        latents: (items, channels, rows, columns), the source's first.
        noise: the model's predictions after guidance, the same shape.
        clean: x0_s, (1, channels, rows, columns).
        alpha: cumulative alpha of the level of `latents`, in (0, 1).
        next_alpha: cumulative alpha of the next level, in (0, 1].
        fresh: one noise for all items, (1, channels, rows, columns).
        eta: 0 to 1; 1 is a consistency model's step, whose noise is all fresh.

    Returns:
        (x', x0), each of the shape of `latents`; the source's x0 is `clean`.

    Raises:
        ValueError: a wrong argument, by name.

    Examples:
        >>> import torch
        >>> from flashbrush.integrations.methods.shared.ddcm import ddcm_step
        >>> clean, fresh = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
        >>> latents = 0.5**0.5 * (clean + fresh).expand(2, -1, -1, -1)  # source and target, at alpha 0.5
        >>> latents, x0 = ddcm_step(latents, torch.randn(2, 4, 8, 8), clean, 0.5, 0.8, fresh)
        >>> torch.equal(x0[:1], clean)
        True
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha: expected a number between 0 and 1, got {alpha!r}")
    if not 0 < next_alpha <= 1:
        raise ValueError(f"next_alpha: expected a number above 0 and up to 1, got {next_alpha!r}")
    if noise.shape != latents.shape:
        raise ValueError(
            f"noise: expected the latents' shape {tuple(latents.shape)}, got {tuple(noise.shape)}"
        )
    for name, t in (("clean", clean), ("fresh", fresh)):
        if t.shape != (1, *latents.shape[1:]):
            raise ValueError(f"{name}: expected shape {(1, *latents.shape[1:])}, got {tuple(t.shape)}")
    deviation = checked("eta", Share(), eta) * (1 - next_alpha)
    consistent = (latents[:1] - alpha**0.5 * clean) / (1 - alpha) ** 0.5
    change = noise - noise[:1]
    start = clean + ((latents - latents[:1]) - (1 - alpha) ** 0.5 * change) / alpha**0.5
    kept = max(1 - next_alpha - deviation, 0.0) ** 0.5
    return next_alpha**0.5 * start + kept * (change + consistent) + deviation**0.5 * fresh, start
