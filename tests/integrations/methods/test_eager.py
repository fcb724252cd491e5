"""The eager oracle with plain attention is the stock model, on every host."""

from __future__ import annotations

import pytest

from ..diffusers.tiny_images import CONFIGS, sd3_call, tiny_sd3, tiny_unet, unet_call
from ..tiny import relative, tiny_call, tiny_flux
from .eager import FluxCore, changed_layers, plain, run, run_eagerly, sites_of

TOLERANCE = 1e-5  # float32, relative to the largest output
HOSTS = {
    **{name: (lambda name=name: tiny_unet(CONFIGS[name])) for name in ("SD 1.5", "SD 2", "SDXL")},
    "SD 3": tiny_sd3,
    "SD 3.5": lambda: tiny_sd3(dual=(0, 1), qk_norm="rms_norm"),
    "FLUX": tiny_flux,
}


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("core", [plain, FluxCore()], ids=["function", "class"])
def test_plain_core_is_the_stock_model(host: str, core) -> None:
    model = HOSTS[host]()
    call = tiny_call(model) if host == "FLUX" else sd3_call() if "SD 3" in host else unet_call(model)
    assert relative(run_eagerly(model, call, core), run(model, call)) <= TOLERANCE
    assert not changed_layers(model, call)


def test_sites_are_in_the_order_of_the_forward_pass() -> None:
    for model, call in (
        (unet := tiny_unet(), unet_call(unet)),
        (flux := tiny_flux(), tiny_call(flux)),
    ):
        seen: list[str] = []
        hooks = [
            site.attn.register_forward_hook(lambda *_, seen=seen, name=site.name: seen.append(name))
            for site in sites_of(model)
        ]
        run(model, call)
        for hook in hooks:
            hook.remove()
        assert seen == [site.name for site in sites_of(model)]
