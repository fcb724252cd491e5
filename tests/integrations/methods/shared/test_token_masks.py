"""Masks of latents and of image tokens."""

from __future__ import annotations

import pytest
import torch

from flashbrush.integrations.methods.shared.token_masks import dilated, eroded, moved, packed_mask, token_mask

from ...tiny import COLUMNS, ROWS


def test_token_is_masked_if_any_of_its_latents_is() -> None:
    from diffusers import FluxPipeline

    mask = torch.zeros(2 * ROWS, 2 * COLUMNS)
    mask[3, 4] = mask[7, 1] = mask[10, 6] = mask[11, 7] = 1
    tokens = token_mask(mask)
    assert tokens.nonzero()[:, 0].tolist() == [COLUMNS + 2, 3 * COLUMNS, 5 * COLUMNS + 3]
    packed = FluxPipeline._pack_latents(mask.expand(1, 3, -1, -1), 1, 3, *mask.shape)[0]
    assert torch.equal(packed_mask(mask, 3), packed)
    assert torch.equal(packed.any(1), tokens)


@pytest.mark.parametrize("shape", [(4, 3), (5, 2), (1, 4, 4)])
def test_odd_latents_raise(shape: tuple[int, ...]) -> None:
    for function in (token_mask, lambda mask: packed_mask(mask, 2)):
        with pytest.raises(ValueError, match=r"^mask: expected \(rows, columns\)"):
            function(torch.ones(shape))


def test_masks_moved_dilated_and_eroded() -> None:
    mask = torch.zeros(5, 6, dtype=torch.bool)
    mask[1:4, 0:3] = True
    assert moved(mask, 1, 3).nonzero().tolist() == [[r, c] for r in (2, 3, 4) for c in (3, 4, 5)]
    assert moved(mask, -1).nonzero()[0].tolist() == [0, 0]
    for step in ((2, 0), (0, -1), (0, 4), (-2, 0)):
        with pytest.raises(ValueError, match=r"^mask: moved by .* it leaves the 5 x 6 tokens"):
            moved(mask, *step)
    larger = torch.zeros_like(mask)
    larger[0:5, 0:4] = True
    assert torch.equal(dilated(mask), larger) and torch.equal(dilated(mask, 1), mask)
    assert eroded(mask).nonzero().tolist() == [[2, 0], [2, 1]]
    with pytest.raises(ValueError, match=r"^size: "):
        dilated(mask, 2)
