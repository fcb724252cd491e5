"""InfEdit's sampler (arXiv 2312.04965), which edits an image without inverting it."""

from __future__ import annotations

from torch import Tensor

from . import cross_batch as borrowed


def ddcm_step(
    latents: Tensor,
    noise: Tensor,
    clean: Tensor,
    alpha: float,
    next_alpha: float,
    fresh: Tensor,
    eta: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """A step of the denoising diffusion consistent model: a virtual inversion, in which the source stays what
    it is.

    With x_s, e_s the source's latents and predicted noise, those of each item x, e, ab = alpha and ab' =
    next_alpha:

        e_cons = (x_s - sqrt(ab) x0_s) / sqrt(1 - ab)
        x0     = x0_s + ((x - x_s) - sqrt(1 - ab) (e - e_s)) / sqrt(ab)
        x'     = sqrt(ab') x0 + sqrt(1 - ab' - sd) ((e - e_s) + e_cons) + sqrt(sd) fresh,    sd = eta (1 - ab')

    All items start from sqrt(ab) x0_s + sqrt(1 - ab) fresh.

    Args:
        latents: (items, channels, rows, columns), the source's first. noise: the model's predictions, of that
            shape, after guidance. clean: x0_s, (1, channels, rows, columns).
        alpha, next_alpha: cumulative products of the level of `latents`, in (0, 1), and of the next one, in
            (0, 1].
        fresh: (1, channels, rows, columns), one noise for all items.
        eta: in [0, 1]; 1 is a consistency model's step, with nothing but fresh noise.

    Returns:
        (x', x0), of the shape of `latents`; the source's x0 is `clean`.

    Raises:
        ValueError: naming the argument, what was expected and what came.
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
    deviation = borrowed.check_share("eta", eta) * (1 - next_alpha)
    consistent = (latents[:1] - alpha**0.5 * clean) / (1 - alpha) ** 0.5
    change = noise - noise[:1]
    start = clean + ((latents - latents[:1]) - (1 - alpha) ** 0.5 * change) / alpha**0.5
    kept = max(1 - next_alpha - deviation, 0.0) ** 0.5
    return next_alpha**0.5 * start + kept * (change + consistent) + deviation**0.5 * fresh, start
