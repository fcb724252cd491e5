"""Which host serves which model class: a new host adds one line."""

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
    """The host of the model's class or of a base class of it.

    Raises:
        TypeError: there is none.
    """
    for cls in type(model).__mro__:
        if cls.__name__ in HOSTS:
            module, name = HOSTS[cls.__name__]
            host = getattr(import_module(module, __package__), name)()
            if isinstance(model, host.model_class):
                return host
    # Given a pipeline, the message names the part of it to pass.
    hint = next((f"; pass its {name}" for name in ("transformer", "unet") if hasattr(model, name)), "")
    raise TypeError(f"model: expected one of {', '.join(HOSTS)}, got {type(model).__name__}{hint}")
