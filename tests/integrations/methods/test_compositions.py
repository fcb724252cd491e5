"""Published methods together on one model, against eager forms of both; and those that do not go together."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flashbrush.integrations import (
    InContextBrush,
    IPAdapter,
    PerturbedAttention,
    PlugAndPlay,
    RegionalPrompting,
    SmoothedEnergy,
)
from flashbrush.integrations.diffusers import apply, compose

from ..diffusers.tiny_images import SD15
from ..tiny import COLUMNS, ROWS, relative, tiny_call, tiny_flux
from .eager import Site, attend, run, run_eagerly, worst_layer
from .test_ip_adapter import Case, masks
from .test_regional_prompting import SPANS, Eager, soft, two

TOLERANCE = 1e-5  # float32, relative to the largest output
GRIDS = {64: (8, 8), 16: (4, 4)}


FORMS = {
    "bias": {},
    "groups": {"form": "groups"},
    "soft groups": {"form": "groups", "masks": soft(), "shared": 0.3},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("turned", [False, True])
def test_regional_prompting_with_ip_adapters(form: str, turned: bool) -> None:
    """Words keep to their regions, images to theirs, in one launch."""
    case = Case(SD15, (1, 2))
    regional = RegionalPrompting(**({"masks": two(), "spans": SPANS} | FORMS[form]))
    scales, regions = [0.7, 0.5], [None, masks(2)]
    words, images = Eager(regional, GRIDS), case.eager(scales, regions)

    def both(site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return words(site, q, k, v) + images(site, q, k, v) - attend(q, k, v)

    methods = [regional, IPAdapter(case.prompts, scales, regions)]
    with apply(case.model, compose(*(reversed(methods) if turned else methods))):
        assert worst_layer(case.model, case.call, both) <= TOLERANCE
        out = run(case.model, case.call)
    assert relative(out, run_eagerly(case.model, case.call, both)) <= TOLERANCE
    for one in (words, images):
        assert relative(out, run_eagerly(case.model, case.call, one)) > 1e-2


def test_in_context_brush_with_pag() -> None:
    """The brush has the item that is kept, PAG the one that guidance leads away from."""
    model = tiny_flux()
    call = tiny_call(model, batch=2)
    brush, pag = InContextBrush(alpha_subject=0.5), PerturbedAttention(items=(1,), layers=None)
    with apply(model, brush):
        brushed = run(model, call)
    with apply(model, pag):
        perturbed = run(model, call)
    for methods in ((brush, pag), (pag, brush)):
        with apply(model, compose(*methods)):
            out = run(model, call)
        assert relative(out[:1], brushed[:1]) <= TOLERANCE
        # Other layers brush the perturbed item too.
        assert relative(out[1:], brushed[1:]) > 1e-3 and relative(out[1:], perturbed[1:]) > 1e-3
    everywhere = PerturbedAttention(items=(1,), layers=["double", "single"])
    with apply(model, everywhere):
        perturbed = run(model, call)
    with apply(model, compose(brush, everywhere)):
        out = run(model, call)
    assert relative(out[:1], brushed[:1]) <= TOLERANCE and relative(out[1:], perturbed[1:]) <= TOLERANCE


def test_guidance_beside_a_method_of_other_layers() -> None:
    """Words in cross-attention, SEG in self-attention: neither knows of the other."""
    case = Case(SD15, (1,))
    regional, energy = RegionalPrompting(two(), SPANS), SmoothedEnergy(items=(1,), sigma=torch.inf)
    with apply(case.model, compose(regional, energy)):
        out = run(case.model, case.call)
    alone = []
    for method in (regional, energy):
        with apply(case.model, method):
            alone.append(run(case.model, case.call))
    assert all(relative(out, one) > 1e-3 for one in alone)
    # The other item has the words' method alone.
    assert relative(out[:1], alone[0][:1]) <= TOLERANCE


def test_what_does_not_go_together() -> None:
    case = Case(SD15, (1,))
    call = {n: torch.cat([t, t]) if isinstance(t, Tensor) and t.dim() else t for n, t in case.call.items()}
    injected = PlugAndPlay(layers=(0, None), feature=None)
    energy = SmoothedEnergy(items=(1,), layers=["up"])
    with (
        apply(case.model, compose(injected, energy)),
        pytest.raises(
            ValueError,
            match=r"PlugAndPlay and SmoothedEnergy cannot be joined in layer \d+ .*: both have parts",
        ),
    ):
        run(case.model, call)
    groups = RegionalPrompting(two(), SPANS, form="groups")
    with (
        apply(case.model, compose(groups, groups)),
        pytest.raises(ValueError, match="both split the layer's keys into softmax groups"),
    ):
        run(case.model, case.call)
    model = tiny_flux()
    with apply(model, compose(InContextBrush(), RegionalPrompting(two((ROWS, COLUMNS)), SPANS))) as handle:
        handle.grid = (ROWS, COLUMNS)
        with pytest.raises(ValueError, match="one sorts the tokens, the other has segments of them"):
            run(model, tiny_call(model))
