"""apply(): a method's control on a diffusers model."""

from __future__ import annotations

import warnings
from collections.abc import Container, Iterable, Sequence

from torch import nn

from ...bindings import Stats, backends
from .handle import Handle
from .hosts.host import Site
from .hosts.registry import find_host
from .installation import check_replaceable
from .protocol.plan import Method, check_method


def apply(
    model: nn.Module,
    method: Method | None = None,
    *,
    layers: str | int | Iterable[str | int] | None = None,
    steps: int | Iterable[int] | None = None,
    stats: bool | Sequence[str] = False,
    backend: str = "auto",
) -> Handle:
    """Control the attention of a diffusers model with a method; without one, run it through flashbrush.

    Works with torch.compile, offloading, LoRA, fused projections and quantised linears. Call handle.prepare()
    where a whole model is compiled after apply(), or where apply() got the model itself and its torch.compile
    wrapper is called. A deep copy of the model carries a copy of the control (``Handle.of(copy)``). A call
    without a plan is plain attention: through flashbrush, or through the backend that
    ``model.set_attention_backend`` or ``attention_backend`` set, or, with a dense attention_mask, as
    diffusers computes it.

    One step is one forward call, counted from 0, until ``handle.set_step`` is called: call it from the
    pipeline's callback where a step takes several forward calls, or where the method needs the sigma. Call
    ``handle.reset()`` before a second image, or its steps continue the first image's count.

    A backward pass with gradient checkpointing runs layers again with the plans of the latest forward pass:
    call backward() before the next forward pass, before a knob changes, and before remove(). Call a model
    under control from one thread only.

    Args:
        model: FluxTransformer2DModel (FLUX.1 dev, Fill, Kontext), UNet2DConditionModel (SD 1.5, SD 2, SDXL,
            DeepFloyd IF) or SD3Transformer2DModel (SD 3, 3.5), also within a torch.compile wrapper.
        method: an object with plan(layer, step); None: plain attention.
        layers: a kind ("double", "self", ...), a UNet's "down", "mid" or "up", an index in the order of the
            forward pass, or several of these; None: all. Other layers are plain; without a method they stay
            diffusers' own.
        steps: indices of steps to control; None: all. Other steps are plain.
        stats: statistics of controlled calls to keep in ``handle.stats``, without waiting for the GPU. True:
            mass and gain; a sequence of "lse", "mass", "gain": those. lse, one float32 per head and row,
            takes 0.5 MB a layer and step at FLUX's 5120 tokens.
        backend: as in attention(), for controlled and plain calls.

    Returns:
        A context manager that removes the control at its end, or at handle.remove().

    Raises:
        TypeError: a model class without a host here; processors that are not diffusers' own (IP-Adapter,
            trained ones); a method without plan().
        ValueError: layers, steps, stats or a backend that do not exist or are not usable here.
        NotImplementedError: context parallelism; a UNet with blocks or inputs that the processors cannot
            serve (GLIGEN, two text encodings, image prompts). A derived head gain across tensor-parallel
            ranks raises when planned.
        RuntimeError: the model already has a control. When the model is called: the method has an attach()
            and was applied to another model since.

    Examples:
        >>> import flashbrush as fb
        >>> from diffusers import FluxFillPipeline
        >>> from flashbrush.integrations import InContextBrush
        >>> from flashbrush.integrations.diffusers import apply
        >>> pipe = FluxFillPipeline.from_pretrained(fb.tiny_fill())  # or any FLUX.1 Fill checkpoint
        >>> with apply(pipe.transformer, InContextBrush(alpha_subject=0.5), layers="single") as handle:
        ...     pass  # pipe(...)
    """
    inner = getattr(model, "_orig_mod", model)
    host = find_host(inner)
    check_method(method)
    sites = host.sites(inner)
    check_replaceable(inner, sites, host)
    handle = Handle(
        model,
        host,
        method,
        layers=_selected_layers(layers, sites),
        steps=_selected_steps(steps),
        fields=_selected_fields(stats),
        backend=_usable_backend(backend),
    )
    set_backends = [site.attn.processor._attention_backend for site in sites]
    if method is None and all(name is not None for name in set_backends):
        name = getattr(set_backends[0], "value", set_backends[0])
        warnings.warn(
            f"flashbrush: the model's attention backend is set to {name!r}, and plain calls use it: "
            "apply() without a method changes nothing. model.reset_attention_backend() lets flashbrush "
            "serve them",
            stacklevel=2,
        )
    return handle


def _selected_layers(layers: str | int | Iterable[str | int] | None, sites: list[Site]) -> frozenset[int]:
    """Layer indices; ValueError for a name or index that the model does not have."""
    if layers is None:
        return frozenset(range(len(sites)))
    if isinstance(layers, (str, int)):
        layers = [layers]
    names = list(
        dict.fromkeys(name for site in sites for name in (site.kind, site.place) if name is not None)
    )
    chosen: set[int] = set()
    for entry in layers:
        if isinstance(entry, str):
            if entry not in names:
                raise ValueError(f"layers: expected one of {', '.join(names)} or an index, got {entry!r}")
            chosen |= {i for i, site in enumerate(sites) if entry in (site.kind, site.place)}
        elif isinstance(entry, bool) or not isinstance(entry, int):
            raise ValueError(f"layers: expected a kind or an index, got {entry!r}")
        elif not 0 <= entry < len(sites):
            raise ValueError(f"layers: expected indices in 0..{len(sites) - 1}, got {entry}")
        else:
            chosen.add(entry)
    if not chosen:
        raise ValueError("layers: expected at least one, got none")
    return frozenset(chosen)


def _selected_steps(steps: int | Iterable[int] | None) -> Container[int] | None:
    """Step indices; None: all. ValueError for anything that is no index."""
    if steps is None:
        return None
    entries = [steps] if isinstance(steps, int) else list(steps)
    for entry in entries:
        if isinstance(entry, bool) or not isinstance(entry, int) or entry < 0:
            raise ValueError(f"steps: expected step indices of 0 or more, got {entry!r}")
    if not entries:
        raise ValueError("steps: expected at least one, got none")
    return frozenset(entries)


def _selected_fields(stats: bool | Sequence[str]) -> frozenset[str]:
    """Fields of Stats; ValueError for others."""
    if isinstance(stats, bool):
        return frozenset(("mass", "gain") if stats else ())
    fields = [stats] if isinstance(stats, str) else list(stats)
    if unknown := [f for f in fields if f not in Stats._fields]:
        raise ValueError(
            f"stats: expected True, False or some of {', '.join(Stats._fields)}, got {unknown[0]!r}"
        )
    return frozenset(fields)


def _usable_backend(backend: str) -> str:
    """ValueError for a backend that does not exist, or with the reasons why it is not usable here."""
    usable = backends()
    if backend != "auto" and backend not in usable:
        raise ValueError(f"backend: expected 'auto' or one of {', '.join(usable)}, got {backend!r}")
    if reasons := usable.get(backend):
        raise ValueError(f"backend: {backend!r} is not usable here: {'; '.join(reasons)}")
    return backend
