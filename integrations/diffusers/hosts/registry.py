"""Which host serves a model: the table that a new host joins with one line."""

from __future__ import annotations

from importlib import import_module

from torch import nn

from .host import Host

# model class: (module, host)
HOSTS = {
    "FluxTransformer2DModel": (".flux", "FluxHost"),
    "SD3Transformer2DModel": (".sd3", "SD3Host"),
    "UNet2DConditionModel": (".unet", "UNetHost"),
}


def find_host(model: nn.Module) -> Host:
    """TypeError where the model's class has no processor here."""
    for cls in type(model).__mro__:
        if cls.__name__ in HOSTS:
            module, name = HOSTS[cls.__name__]
            host = getattr(import_module(module, __package__), name)()
            if isinstance(model, host.model_class):
                return host
    hint = next(
        (f"; pass its {name}" for name in ("transformer", "unet") if hasattr(model, name)), ""
    )  # a pipeline
    raise TypeError(f"model: expected one of {', '.join(HOSTS)}, got {type(model).__name__}{hint}")
