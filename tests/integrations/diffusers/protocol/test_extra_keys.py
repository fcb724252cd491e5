"""Extra keys that a plan makes of the layer's own, against eager arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import flashbrush as fb
from flashbrush.integrations.diffusers import Part, Plan

from ...tiny import TEXT, relative
from ..hosts.test_flux import TOKENS, TOLERANCE, both, execute, rotate, softmax, streams, values


@both
@pytest.mark.parametrize("parts", [False, True], ids=["plan", "part"])
def test_extra_keys_made_of_the_layer_s_own(kind: str, parts: bool) -> None:
    """Three image tokens of item 0, once more and elsewhere: turned by the RoPE of as many others, with
    halved values.
    """
    q, k, v, rope = streams(kind)
    keys = fb.Segments(tokens=TOKENS, copies=3)
    control = fb.Control(fb.Segments(tokens=TOKENS), keys, weight={("tokens", "copies"): 0.4})
    elsewhere = tuple(t[10:13] for t in rope)

    def copies(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        torch.testing.assert_close(key, rotate(k, rope))
        return rotate(key[:1, TEXT : TEXT + 3], elsewhere), value[:1, TEXT : TEXT + 3] / 2

    if parts:
        part = Part([1], control=control, extra={"copies": copies}, value=lambda t: -t)
        out, doubled = execute(kind, Plan(parts=[part])), torch.stack([v[0], -v[1]])
    else:
        out, doubled = execute(kind, Plan(control, extra={"copies": copies}, order=torch.randperm(TOKENS))), v
    more = rotate(rotate(k, rope)[:1, TEXT : TEXT + 3], elsewhere).expand(2, -1, -1, -1)
    prob = softmax(rotate(q, rope), torch.cat([rotate(k, rope), more], 1))
    prob[..., TOKENS:] *= 0.4
    expected = values(prob, torch.cat([doubled, (v[:1, TEXT : TEXT + 3] / 2).expand(2, -1, -1, -1)], 1))
    if parts:
        expected[0] = values(softmax(rotate(q, rope), rotate(k, rope)), v)[0]
    assert relative(out, expected) <= TOLERANCE


def test_what_is_no_pair_and_cannot_make_one_raises() -> None:
    control = fb.Control(fb.Segments(tokens=TOKENS), fb.Segments(tokens=TOKENS, copies=3))
    with pytest.raises(
        TypeError, match=r"Plan\.extra\['copies'\]: expected a pair .* or a callable, got list"
    ):
        Plan(control, extra={"copies": [torch.ones(3)]})  # type: ignore[dict-item]
