"""Guidance by references and a prompt, whose directions are normalised."""

from __future__ import annotations

import torch
from torch import Tensor

from .knobs import Choice, checked


def guide(
    neither: Tensor,
    references: Tensor,
    both: Tensor,
    *,
    scale_references: float = 7.0,
    scale_prompt: float = 7.0,
    norm: str = "least",
    base: str = "neither",
) -> Tensor:
    """base + scale_references n(references - neither) + scale_prompt n(both - references).

    The formula of CustomShift (arXiv 2606.16866, Eq. 20), and with other choices that of SynCD. Norms are
    over all of an item's latents.

    Args:
        neither: the velocity without references and prompt, (batch, ...).
        references: the velocity with references, the same shape.
        both: the velocity with references and prompt, the same shape.
        scale_references: 7 in the paper.
        scale_prompt: 7 in the paper.
        norm: n(g). "unit": g / ||g||, as the paper writes it. "least": g m / ||g||, m the smaller of the two
            norms, which is SynCD's, whose data the paper builds on: with unit norms a scale of 7 would have
            little effect. "none": g.
        base: "neither" (CustomShift) or "references" (SynCD).

    Returns:
        The guided velocity, of the same shape.

    Raises:
        ValueError: another norm or base.

    Examples:
        >>> import torch
        >>> from flashbrush.integrations.methods.shared.reference_guidance import guide
        >>> guide(torch.zeros(1, 4), torch.ones(1, 4), 3 * torch.ones(1, 4))
        tensor([[14., 14., 14., 14.]])
    """
    checked("guide: norm", Choice("least", "unit", "none"), norm)
    checked("guide: base", Choice("neither", "references"), base)
    directions = references - neither, both - references
    if norm != "none":
        lengths = [
            torch.linalg.vector_norm(g, dim=tuple(range(1, g.dim())), keepdim=True) for g in directions
        ]
        least = torch.minimum(*lengths) if norm == "least" else 1.0
        directions = [g * least / n.clamp(min=1e-12) for g, n in zip(directions, lengths, strict=True)]
    start = neither if base == "neither" else references
    return start + scale_references * directions[0] + scale_prompt * directions[1]
