"""FastComposer's fusion of a subject's image into the word that names it."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Fusion(nn.Module):
    """A subject's image embedding z fused into its word's embedding e: c = LN(MLP_2(MLP_1([e ; z]) + e)).

    An MLP is LN, linear, GELU, linear; the second one adds its input to its output. Published parameters
    have other names and do not load.

    Args:
        dim: channels of the text's embeddings and of the image's.

    Examples:
        >>> import torch
        >>> from flashbrush.integrations.methods.shared.subject_fusion import Fusion
        >>> fused = Fusion(8)(torch.randn(1, 5, 8), torch.randn(1, 1, 8), torch.tensor([[2]]))  # into token 2
        >>> fused.shape
        torch.Size([1, 5, 8])
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp1 = nn.Sequential(
            nn.LayerNorm(2 * dim), nn.Linear(2 * dim, dim), nn.GELU(), nn.Linear(dim, dim)
        )
        self.mlp2 = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))
        self.layer_norm = nn.LayerNorm(dim)

    def forward(self, text: Tensor, images: Tensor, tokens: Tensor) -> Tensor:
        """The text with the images fused in, (batch, length, dim).

        Args:
            text: (batch, length, dim).
            images: (batch, subjects, dim).
            tokens: int64 (batch, subjects), where each subject goes; -1: nowhere.
        """
        batch, subject = (tokens >= 0).nonzero(as_tuple=True)
        place = tokens[batch, subject]
        words = text[batch, place]
        fused = self.mlp1(torch.cat([words, images[batch, subject]], -1)) + words
        fused = self.layer_norm(self.mlp2(fused) + fused)
        return text.index_put((batch, place), fused.to(text))
