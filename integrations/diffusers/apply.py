"""apply(): a method's control on a diffusers model, and the handle that steers it and takes it away again."""

from __future__ import annotations

import contextlib
import math
import sys
import warnings
from collections.abc import Container, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...bindings import Stats
from .hosts.host import Geometry, Host, Place
from .hosts.registry import find_host
from .model_hooks import Attachment
from .protocol.layer import Layer, Step
from .protocol.plan import Method, Plan
from .selection import check_backend, select_fields, select_layers, select_steps


class Record(NamedTuple):
    """Statistics of one controlled attention call."""

    step: int
    layer: int  # Layer.index
    kind: str  # Layer.kind
    stats: Stats  # on the model's device; a field that was not asked for is an empty tensor
    items: tuple[int, ...] | None = None  # the batch items of the call; None: all


def apply(
    model: nn.Module,
    method: Method | None = None,
    *,
    layers: str | int | Iterable[str | int] | None = None,
    steps: int | Iterable[int] | None = None,
    stats: bool | Sequence[str] = False,
    backend: str = "auto",
) -> Handle:
    """Control a diffusers model's attention with `method`; without one, run it through flashbrush.attention
    as it is.

        with apply(pipe.transformer, InContextBrush(alpha_subject=0.5)) as handle:
            pipe(...)

    or ``handle = apply(...)`` and later ``handle.remove()``. Works under torch.compile (a whole model that is
    compiled after apply(), or whose wrapper is called though apply() got the model itself, needs
    handle.prepare()), with offloading, LoRA, fused projections and quantised linears; a deep copy of the
    model carries a copy of the control (``Handle.of(copy)``). A call without a plan is plain attention
    through flashbrush, or through the backend set by ``model.set_attention_backend`` or
    ``attention_backend``, or, with a dense attention_mask, as diffusers does it.

    One step is one forward call, counted from 0, unless ``handle.set_step`` says otherwise: call it from the
    pipeline's callback where a step takes several forward calls, or where the method needs the sigma. A
    second image under the same control needs ``handle.reset()`` before it, or a method with a window of steps
    takes it for later steps.

    A backward pass with gradient checkpointing runs layers again with the plans of the latest forward pass:
    take it before the next one, before a knob changes, and before remove(). One model under control serves
    one thread.

    Args:
        model: FluxTransformer2DModel (FLUX.1 dev, Fill, Kontext), UNet2DConditionModel (SD 1.5, SD 2, SDXL,
            DeepFloyd IF) or SD3Transformer2DModel (SD 3, 3.5); a torch.compile wrapper around one will do.
            host.py says how to add an architecture.
        method: what to do in each layer and step.
        layers: a kind ("double", "self", ...), a UNet's "down", "mid" or "up", an index in the order of the
            forward pass, or several of them; None: all. Other layers are plain; without a method they stay
            diffusers' own.
        steps: step indices to control; None: all. Other steps are plain.
        stats: collect Stats of the controlled calls in ``handle.stats``, without waiting for the GPU. True:
            mass and gain; a sequence of "lse", "mass", "gain": those. lse holds a float32 per head and row:
            0.5 MB a layer and step at FLUX's 5120 tokens.
        backend: as in attention(), for controlled and plain calls.

    Raises:
        TypeError: a model class without a processor here; processors in place that are not diffusers' own
            (IP-Adapter, trained ones); a method that is none.
        ValueError: layers, steps, stats or backend that do not exist or are not usable here.
        NotImplementedError: context parallelism; a UNet with blocks or inputs whose layers are not known here
            (GLIGEN, two text encodings, image prompts). A derived head gain across tensor-parallel ranks
            raises when planned.
        RuntimeError: the model is under control already. When the model is called: its method, which has an
            attach(), was given to another model since.
    """
    inner = getattr(model, "_orig_mod", model)
    host = find_host(inner)
    _check_method(method)
    places = host.places(inner)
    for place in places:
        # What somebody has put back after remove(), as unfuse_qkv_projections() does.
        if getattr(place.attn.processor, "original", None) is not None:
            place.attn.set_processor(place.attn.processor.original)
    _check_processors(inner, places, host)
    handle = Handle(
        model,
        host,
        method,
        layers=select_layers(layers, places),
        steps=select_steps(steps),
        fields=select_fields(stats),
        backend=check_backend(backend),
    )
    handle._install()
    return handle


class Handle:
    """A control in place; made by apply(). A context manager that removes it at the end.

    Attributes:
        grid: (rows, columns) of the image tokens, handed on to the method as Layer.grid where the model's
            inputs do not tell it (FLUX).
    """

    def __init__(
        self,
        model: nn.Module,
        host: Host,
        method: Method | None,
        *,
        layers: frozenset[int],
        steps: Container[int] | None,
        fields: frozenset[str],
        backend: str,
    ) -> None:
        self._method = method
        self.grid: tuple[int, int] | None = None
        self._outer = model
        self._model: nn.Module = getattr(model, "_orig_mod", model)
        self._host, self._layers, self._steps, self._fields = host, layers, steps, fields
        self._places = host.places(self._model)
        self._originals = [place.attn.processor for place in self._places]
        self._processors = [host.processor_class(backend=backend, collect=bool(fields)) for _ in self._places]
        for place, original, mine in zip(self._places, self._originals, self._processors, strict=True):
            mine.replace(place.attn, original)
        self._hooks: list[Any] = []
        self._attached: Attachment | None = None
        self._calls: tuple[Any, Any] | None = None  # (ours around model.compile()'s, model.compile()'s)
        self._records: list[Record] = []
        self._geometry: Geometry | None = None
        self._step, self._counting, self._planned_step = Step(0), True, 0
        self._passes, self._has_planned = (
            0,
            False,
        )  # forward passes under a method; whether there was a plan in any

    @staticmethod
    def of(model: nn.Module) -> Handle | None:
        """The handle of a model under control, as after a deep copy, else None."""
        for hook in model._forward_pre_hooks.values():
            if isinstance(owner := getattr(hook, "__self__", None), Handle):
                return owner
        return None

    @property
    def method(self) -> Method | None:
        """What is asked for plans. It may be replaced at any time, or its knobs; one that is refused leaves
        the one before.
        """
        return self._method

    @method.setter
    def method(self, method: Method | None) -> None:
        _check_method(method)
        before = self._method
        self._detach()
        self._method = method
        if not self._hooks:
            return
        try:
            self._attached = Attachment(method, self._model)
        except Exception:
            self._method, self._attached = before, Attachment(before, self._model)
            raise

    @property
    def stats(self) -> list[Record]:
        """Records of all calls since apply() or reset(), in the order of the calls."""
        self._collect()
        return self._records

    @property
    def step(self) -> Step:
        """The step that the next forward call belongs to."""
        return self._step

    @property
    def controls_step(self) -> bool:
        """Whether apply's `steps` have the step that the next forward call, or the current one, belongs to."""
        return self._steps is None or self._step.index in self._steps

    def set_step(self, index: int, count: int | None = None, sigma: float | None = None) -> None:
        """Say which step the coming forward calls belong to; counting stops until reset().

            handle.set_step(0, steps)  # before the pipeline, for a method that needs the count in its first step
            def callback(pipe, index, timestep, tensors):  # callback_on_step_end: step `index` is over
                handle.set_step(index + 1, pipe.num_timesteps)
                return tensors

        The method is asked for the step's plans at once, in the shapes of the latest call, for a compiled
        model whose hooks do not run; and again before the call where they do.

        Args:
            index: from 0; count itself where the run is over. count: steps of the run. sigma: noise level at
                which the
            model is evaluated next.

        Raises:
            ValueError: a negative index, or one beyond count.
        """
        if isinstance(index, bool) or not isinstance(index, int) or index < 0:
            raise ValueError(f"index: expected a step of 0 or more, got {index!r}")
        if count is not None and index > count:
            raise ValueError(f"index: expected a step of 0 to count={count}, got {index}")
        self._step, self._counting = Step(index, count, sigma), False
        if index == count or self._geometry is None or not self._hooks:
            return
        try:
            self._plan_all(self._geometry)
        except Exception:
            # The next call may have other shapes than the last. It asks again, or is refused where its hook
            # cannot run.
            for processor in self._processors:
                processor.planned = False

    def reset(self) -> None:
        """Start over, as for a new image: step 0, counting forward calls, without statistics."""
        self._collect()
        self._records = []
        self._step, self._counting = Step(0), True

    def prepare(
        self,
        *,
        text_len: int,
        image_len: int | None = None,
        latents: tuple[int, int] | None = None,
        batch: int = 1,
        device: torch.device | str | None = None,
    ) -> None:
        """Plan ahead for calls of these shapes, where the forward pre-hook is compiled into the model and
        cannot.

        Only a whole model compiled *after* apply() needs this; set_step() then plans the following steps.

        Args:
            text_len: tokens. image_len: image tokens, for FLUX. latents: (rows, columns) of the latents, for
                UNets and
            SD3. batch: items of a call. device: the model's if None.

        Raises:
            ValueError: the image's size in the other form than the model takes it, or in both.
        """
        host = self._host
        if (image_len is None) is host.takes_tokens or (latents is None) is not host.takes_tokens:
            wanted = "image_len" if host.takes_tokens else "latents=(rows, columns)"
            raise ValueError(
                f"prepare: {type(self._model).__name__} needs {wanted}, and no other size of the image"
            )
        device = next(self._model.parameters()).device if device is None else torch.device(device)
        grids = () if latents is None else host.grids(self._model, *latents)
        self._plan_all(Geometry(text_len, image_len or 0, batch, device, grids))
        for processor in self._processors:
            processor.prepared, processor.running = batch, True

    def remove(self) -> None:
        """Put back the processors that were in place before, the same objects. A second call does nothing.

        A processor that somebody else has put there in the meantime stays. A method that never had a plan, as
        when its window of layers, steps or resolutions misses all of them, is named in a warning.
        """
        self._remove()

    def _remove(self) -> None:
        if not self._hooks:
            return
        self._collect()
        # A method that attaches hooks may do all its work there.
        hooks = self._attached is not None and self._attached.hooks
        idle = self.method is not None and self._passes and not self._has_planned and not hooks
        self._detach()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._calls is not None and self._model._compiled_call_impl is self._calls[0]:
            self._model._compiled_call_impl = self._calls[1]
        for place, original, mine in zip(self._places, self._originals, self._processors, strict=True):
            mine.retire(original)
            if isinstance(place.attn.processor, self._host.processor_class):
                place.attn.set_processor(original)
        if idle:  # last: where warnings are errors, the model is as it was all the same
            warnings.warn(
                f"flashbrush: {type(self.method).__name__} controlled nothing in {self._passes} forward passes of "
                f"{type(self._model).__name__}: its knobs, or apply()'s layers and steps, select no layer and step of them",
                stacklevel=3,  # the caller of remove(), or the end of the with
            )

    def __enter__(self) -> Handle:
        if not self._hooks:
            raise RuntimeError("Handle: it was removed, and controls nothing; apply() makes a new one")
        return self

    def __exit__(self, *_: object) -> None:
        self._remove()

    def __repr__(self) -> str:
        state = f"{len(self._layers)} of {len(self._places)} layers" if self._hooks else "removed"
        return f"Handle({type(self._model).__name__}, method={self.method!r}, {state})"

    def _install(self) -> None:
        self._attached = Attachment(
            self._method, self._model
        )  # first: a method that refuses the model leaves it as it was
        for i, (place, mine) in enumerate(zip(self._places, self._processors, strict=True)):
            mine.planned = self.method is None
            mine.defer = self.method is None and i not in self._layers
            place.attn.set_processor(mine)
        # A torch.compile wrapper has hooks of its own, which run outside of the compiled region.
        for module in dict.fromkeys((self._model, self._outer)):
            self._hooks.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
            self._hooks.append(module.register_forward_hook(self._after))
        if (compiled := self._model._compiled_call_impl) is not None:
            # model.compile() has taken the hooks into the compiled region: step in before it.
            def call(*args: Any, **kwargs: Any) -> Any:
                self._before(self._model, args, kwargs)
                result = compiled(*args, **kwargs)
                self._after(self._model, args, result)
                return result

            self._calls = (call, compiled)
            self._model._compiled_call_impl = call
        if self.method is None and all(p._attention_backend is not None for p in self._processors):
            name = getattr(
                self._processors[0]._attention_backend, "value", self._processors[0]._attention_backend
            )
            warnings.warn(
                f"flashbrush: the model's attention backend is set to {name!r}, which plain calls keep to: apply() "
                "without a method changes nothing. model.reset_attention_backend() gives them to flashbrush",
                stacklevel=3,
            )

    def _detach(self) -> None:
        if self._attached is not None:
            self._attached.remove()
        self._attached = None

    def _before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        self._check_in_place()
        self._plan_all(self._host.geometry(self._model, args, kwargs))
        for processor in self._processors:
            processor.prepared, processor.running = None, True

    def _after(self, module: nn.Module, args: tuple, output: object) -> None:
        if torch.compiler.is_compiling():
            return
        self._collect()
        for processor in self._processors:
            processor.running = False
        self._passes += self.method is not None
        if self._counting:
            self._step = Step(self._step.index + 1)

    def _check_in_place(self) -> None:
        for place, mine in zip(self._places, self._processors, strict=True):
            if place.attn.processor is not mine:
                raise RuntimeError(
                    "flashbrush: the model's attention processors were replaced after apply() (now "
                    f"{type(place.attn.processor).__name__}); call handle.remove() before loading an IP-Adapter or "
                    "setting processors"
                )
            if mine._parallel_config is not None:
                raise NotImplementedError(_CONTEXT_PARALLEL)

    def _plan_all(self, geometry: Geometry) -> None:
        self._collect()
        if self._attached is not None:
            self._attached.check()
        self._geometry, self._planned_step = geometry, self._step.index
        defer = _active_backend_is_set()
        for i, (place, processor) in enumerate(zip(self._places, self._processors, strict=True)):
            plan = self._ask(i, place, geometry) if self.controls_step and i in self._layers else None
            processor.plan, processor.planned = plan, True
            self._has_planned |= plan is not None
            processor.defer = defer or (self.method is None and i not in self._layers)

    def _ask(self, index: int, place: Place, geometry: Geometry) -> Plan | None:
        if self.method is None:
            return None
        attn, grid = place.attn, geometry.grids[place.level] if geometry.grids else self.grid
        layer = Layer(
            index,
            place.kind,
            place.place,
            attn.heads,
            attn.inner_dim // attn.heads,
            0 if place.kind == "self" else geometry.text_len,
            math.prod(geometry.grids[place.level]) if geometry.grids else geometry.image_len,
            geometry.batch,
            grid,
        )
        with _on_cpu():
            plan = self.method.plan(layer, self._step)
        if isinstance(plan, Plan) and (late := plan.late) is not None:

            def fitted() -> Plan | None:
                with _on_cpu():
                    known = late()
                return self._fitted(known, layer, geometry.device)

            return Plan(late=fitted)
        return self._fitted(plan, layer, geometry.device)

    def _fitted(self, plan: Plan | None, layer: Layer, device: torch.device) -> Plan | None:
        if plan is None:
            return None
        if not isinstance(plan, Plan):
            raise TypeError(
                f"{type(self.method).__name__}.plan: expected a Plan or None, got {type(plan).__name__}"
            )
        plan.check(layer)
        parallel = getattr(getattr(self._model, "_parallel_config", None), "tensor_parallel_config", None)
        if parallel is not None and any(control.head_gain is not None for control in plan.controls):
            raise NotImplementedError(
                "flashbrush: a derived head gain compares all heads, but tensor parallelism spreads them over ranks; "
                "use a method without one"
            )
        return plan.to(device)

    def _collect(self) -> None:
        for i, (place, processor) in enumerate(zip(self._places, self._processors, strict=True)):
            for items, stats in processor.stats:
                # Copies: a CUDA graph would overwrite its own outputs in the next step.
                kept = {name: _kept(t, name in self._fields) for name, t in stats._asdict().items()}
                self._records.append(Record(self._planned_step, i, place.kind, Stats(**kept), items))
            processor.stats = ()


_CONTEXT_PARALLEL = (
    "flashbrush: context parallelism is configured on the model, but a processor sees only its rank's tokens and cannot "
    "tell the segments; use tensor parallelism, or none"
)


def _kept(t: Tensor, wanted: bool) -> Tensor:
    return t.detach().clone() if wanted else t.new_empty(0)


def _on_cpu() -> contextlib.AbstractContextManager:
    """Methods make their tables on the CPU, from where plans are moved, whatever torch.set_default_device
    says.
    """
    return contextlib.nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")


def _active_backend_is_set() -> bool:
    """Whether the user has chosen an attention backend for all of diffusers (attention_backend, environment)."""
    dispatch = sys.modules["diffusers.models.attention_dispatch"]
    registry = getattr(dispatch, "_AttentionBackendRegistry", None)
    return (
        registry is not None and registry.get_active_backend()[0] is not dispatch.AttentionBackendName.NATIVE
    )


def _check_method(method: object) -> None:
    if isinstance(method, type) or not (method is None or isinstance(method, Method)):
        got = f"the class {method.__name__}" if isinstance(method, type) else type(method).__name__
        raise TypeError(f"method: expected an object with plan(layer, step) or None, got {got}")


def _check_processors(model: nn.Module, places: list[Place], host: Host) -> None:
    for i, place in enumerate(places):
        processor = place.attn.processor
        if isinstance(processor, host.processor_class):
            raise RuntimeError(
                "model: it is under flashbrush's control already; handle.remove() comes first, or handle.method = another, or "
                "compose() of both (Handle.of(model) is the handle)"
            )
        # A subclass may do anything; only the stock classes themselves are known to be replaceable.
        if type(processor) not in host.stock:
            raise TypeError(
                f"model: layer {i} ({place.kind}) has a {type(processor).__name__}, which apply() would replace; expected "
                f"{' or '.join(cls.__name__ for cls in host.stock)} (first "
                "unload IP-Adapters, and disable attention slicing, xFormers and other processors)"
            )
        if getattr(processor, "_parallel_config", None) is not None:
            raise NotImplementedError(_CONTEXT_PARALLEL)
    if getattr(getattr(model, "_parallel_config", None), "context_parallel_config", None) is not None:
        raise NotImplementedError(_CONTEXT_PARALLEL)
