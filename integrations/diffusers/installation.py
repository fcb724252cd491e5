"""Processors and forward hooks, put into a model and taken out again."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .hosts.host import Host, Site

if TYPE_CHECKING:  # imports diffusers
    from .hosts.processor import ControlledProcessor

_CONTEXT_PARALLEL = (
    "flashbrush: context parallelism is configured on the model, but a processor has only its rank's "
    "tokens, and segments are over all tokens; use tensor parallelism, or none"
)


def check_replaceable(model: nn.Module, sites: list[Site], host: Host) -> None:
    """Put back what an earlier control left behind, then check that each processor can be replaced.

    Raises:
        RuntimeError: the model has a flashbrush control.
        TypeError: a processor that is not the host's stock one.
        NotImplementedError: context parallelism.
    """
    for site in sites:
        # A removed control's processor may be put back, as unfuse_qkv_projections() does.
        if getattr(site.attn.processor, "original", None) is not None:
            site.attn.set_processor(site.attn.processor.original)
    for i, site in enumerate(sites):
        processor = site.attn.processor
        if isinstance(processor, host.processor_class):
            raise RuntimeError(
                "apply: this model already has a flashbrush control; call handle.remove() first, assign "
                "another handle.method, or compose() both methods (Handle.of(model) is the handle)"
            )
        # Only the stock classes themselves: a subclass may do anything.
        if type(processor) not in host.stock:
            raise TypeError(
                f"model: layer {i} ({site.kind}) has a {type(processor).__name__}, which apply() would "
                f"replace; expected {' or '.join(cls.__name__ for cls in host.stock)} (unload IP-Adapters, "
                "and disable attention slicing, xFormers and other processors first)"
            )
        if getattr(processor, "_parallel_config", None) is not None:
            raise NotImplementedError(_CONTEXT_PARALLEL)
    if getattr(getattr(model, "_parallel_config", None), "context_parallel_config", None) is not None:
        raise NotImplementedError(_CONTEXT_PARALLEL)


class Installation:
    """A model's stock processors replaced by ours, and hooks around its forward, from install() to remove().

    Attributes:
        sites: the attention modules, in the order of the forward pass.
        processors: ours, one per site.
    """

    def __init__(self, model: nn.Module, host: Host, backend: str) -> None:
        self._outer = model
        self.model: nn.Module = getattr(model, "_orig_mod", model)  # within a torch.compile wrapper
        self._host = host
        self.sites = host.sites(self.model)
        self._originals = [site.attn.processor for site in self.sites]
        self.processors: list[ControlledProcessor] = [
            host.processor_class(backend=backend) for _ in self.sites
        ]
        for site, original, mine in zip(self.sites, self._originals, self.processors, strict=True):
            mine.replace(site.attn, original)
        self._hooks: list[Any] = []
        self._calls: tuple[Any, Any] | None = None  # (our wrapper, the compiled call in it)

    @property
    def installed(self) -> bool:
        return bool(self._hooks)

    def install(self, before: Callable[..., None], after: Callable[..., None]) -> None:
        """Put the processors in, and register hooks around each forward pass.

        Args:
            before: called as before(module, args, kwargs) ahead of the forward pass.
            after: called as after(module, args, output) behind it.
        """
        for site, mine in zip(self.sites, self.processors, strict=True):
            site.attn.set_processor(mine)
        # The hooks of a torch.compile wrapper run outside the compiled region.
        for module in dict.fromkeys((self.model, self._outer)):
            self._hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
            self._hooks.append(module.register_forward_hook(after))
        if (compiled := self.model._compiled_call_impl) is not None:
            # model.compile() runs the hooks inside the compiled region: call ours around it.
            def call(*args: Any, **kwargs: Any) -> Any:
                before(self.model, args, kwargs)
                result = compiled(*args, **kwargs)
                after(self.model, args, result)
                return result

            self._calls = (call, compiled)
            self.model._compiled_call_impl = call

    def check(self) -> None:
        """Raise where processors were replaced, or context parallelism was configured, since install()."""
        for site, mine in zip(self.sites, self.processors, strict=True):
            if site.attn.processor is not mine:
                raise RuntimeError(
                    "flashbrush: the model's attention processors were replaced after apply() (now "
                    f"{type(site.attn.processor).__name__}); call handle.remove() before loading an "
                    "IP-Adapter or setting processors"
                )
            if mine._parallel_config is not None:
                raise NotImplementedError(_CONTEXT_PARALLEL)

    def remove(self) -> None:
        """Put the stock processors back, the same objects. One that replaced ours in the meantime stays."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._calls is not None and self.model._compiled_call_impl is self._calls[0]:
            self.model._compiled_call_impl = self._calls[1]
        for site, original, mine in zip(self.sites, self._originals, self.processors, strict=True):
            mine.retire(original)
            if isinstance(site.attn.processor, self._host.processor_class):
                site.attn.set_processor(original)

    def device(self) -> torch.device:
        """The device of the model's first parameter."""
        return next(self.model.parameters()).device
