"""Published methods together on one model, against eager forms of both; and methods that conflict."""

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
from .test_ip_adapter import AdapterCase, image_masks
from .test_regional_prompting import SPANS, EagerRegions, soft_regions, two_regions

TOLERANCE = 1e-5  # float32, relative to the largest output
GRIDS = {64: (8, 8), 16: (4, 4)}


FORMS = {
    "bias": {},
    "groups": {"form": "groups"},
    "soft groups": {"form": "groups", "masks": soft_regions(), "shared": 0.3},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("turned", [False, True])
def test_regional_prompting_with_ip_adapters_matches_eager(form: str, turned: bool) -> None:
    """Words and images each keep to their regions, in one launch."""
    case = AdapterCase(SD15, (1, 2))
    regional = RegionalPrompting(**({"masks": two_regions(), "spans": SPANS} | FORMS[form]))
    scales, regions = [0.7, 0.5], [None, image_masks(2)]
    words, images = EagerRegions(regional, GRIDS), case.eager(scales, regions)

    def both(site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return words(site, q, k, v) + images(site, q, k, v) - attend(q, k, v)

    methods = [regional, IPAdapter(case.prompts, scales, regions)]
    with apply(case.model, compose(*(reversed(methods) if turned else methods))):
        assert worst_layer(case.model, case.call, both) <= TOLERANCE
        out = run(case.model, case.call)
    assert relative(out, run_eagerly(case.model, case.call, both)) <= TOLERANCE
    for one in (words, images):
        assert relative(out, run_eagerly(case.model, case.call, one)) > 1e-2


def test_in_context_brush_with_pag_matches_eager() -> None:
    """The brush controls the conditional item, PAG the perturbed one."""
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
        # In layers without PAG the brush controls the perturbed item too.
        assert relative(out[1:], brushed[1:]) > 1e-3 and relative(out[1:], perturbed[1:]) > 1e-3
    everywhere = PerturbedAttention(items=(1,), layers=["double", "single"])
    with apply(model, everywhere):
        perturbed = run(model, call)
    with apply(model, compose(brush, everywhere)):
        out = run(model, call)
    assert relative(out[:1], brushed[:1]) <= TOLERANCE and relative(out[1:], perturbed[1:]) <= TOLERANCE


def test_methods_of_different_layers_act_together() -> None:
    """Regions in cross-attention, SEG in self-attention."""
    case = AdapterCase(SD15, (1,))
    regional, energy = RegionalPrompting(two_regions(), SPANS), SmoothedEnergy(items=(1,), sigma=torch.inf)
    with apply(case.model, compose(regional, energy)):
        out = run(case.model, case.call)
    alone = []
    for method in (regional, energy):
        with apply(case.model, method):
            alone.append(run(case.model, case.call))
    assert all(relative(out, one) > 1e-3 for one in alone)
    # SEG leaves the other item to the regions.
    assert relative(out[:1], alone[0][:1]) <= TOLERANCE


def test_methods_that_conflict_raise() -> None:
    case = AdapterCase(SD15, (1,))
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
    groups = RegionalPrompting(two_regions(), SPANS, form="groups")
    with (
        apply(case.model, compose(groups, groups)),
        pytest.raises(ValueError, match="both split the layer's keys into softmax groups"),
    ):
        run(case.model, case.call)
    model = tiny_flux()
    with apply(
        model, compose(InContextBrush(), RegionalPrompting(two_regions((ROWS, COLUMNS)), SPANS))
    ) as handle:
        handle.grid = (ROWS, COLUMNS)
        with pytest.raises(ValueError, match="one sorts the tokens, the other has segments of them"):
            run(model, tiny_call(model))
