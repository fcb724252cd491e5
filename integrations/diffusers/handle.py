"""Handle, which apply() returns: it sets the step and the method, and removes the control."""

from __future__ import annotations

import warnings
from collections.abc import Container, Sequence
from typing import Any

import torch
from torch import nn

from .hosts.host import Geometry, Host
from .installation import Installation
from .protocol.layer import Step
from .protocol.model_hooks import Attachment
from .protocol.plan import Method, check_method
from .protocol.plan_call import CallState
from .statistics import Record, Records
from .steps import Steps


class Handle:
    """A control on a model; made by apply(). As a context manager it removes the control at the end.

    Attributes:
        grid: (rows, columns) of the image tokens, for Layer.grid where the model's inputs do not say it
            (FLUX). Set it before the model is called.

    Examples:
        >>> import flashbrush as fb
        >>> from diffusers import FluxFillPipeline
        >>> from flashbrush.integrations import InContextBrush
        >>> from flashbrush.integrations.diffusers import apply
        >>> pipe = FluxFillPipeline.from_pretrained(fb.tiny_fill())
        >>> handle = apply(pipe.transformer, InContextBrush())
        >>> handle.set_step(0, count=4)
        >>> handle.step
        Step(index=0, count=4, sigma=None)
        >>> handle.method = InContextBrush(alpha_subject=0.5)
        >>> handle.remove()
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
        self.grid: tuple[int, int] | None = None
        self._method, self._host = method, host
        self._installation = Installation(model, host, backend)
        self._model, sites = self._installation.model, self._installation.sites
        self._steps = Steps(self._model, sites, layers=layers, selected=steps, collect=bool(fields))
        self._records = Records([site.kind for site in sites], fields)
        self._attachment = Attachment(method, self._model)  # may refuse the model, which is unchanged so far
        self._set_states(self._steps.unplanned(method))
        self._installation.install(self._before, self._after)

    @staticmethod
    def of(model: nn.Module) -> Handle | None:
        """The handle of a model under control, such as a deep copy of one; None: it has no control."""
        for hook in model._forward_pre_hooks.values():
            if isinstance(owner := getattr(hook, "__self__", None), Handle):
                return owner
        return None

    @property
    def method(self) -> Method | None:
        """The method that is asked for plans. Assign another, or set its knobs, at any time.

        If an assignment raises, the previous method stays.
        """
        return self._method

    @method.setter
    def method(self, method: Method | None) -> None:
        check_method(method)
        if not self._installation.installed:
            self._method = method
            return
        self._attachment.remove()
        try:
            self._attachment = Attachment(method, self._model)
        except Exception:
            self._attachment = Attachment(self._method, self._model)
            raise
        self._method = method

    @property
    def stats(self) -> list[Record]:
        """The records of all controlled calls since apply() or reset(), in the order of the calls."""
        self._collect()
        return self._records.records

    @property
    def step(self) -> Step:
        """The step of the next forward call; during a call its own."""
        return self._steps.current

    @property
    def controls_step(self) -> bool:
        """Whether `step` is among the steps that apply() selected."""
        return self._steps.is_selected

    def set_step(self, index: int, count: int | None = None, sigma: float | None = None) -> None:
        """Set the step of the coming forward calls; forward calls are not counted from then on until reset().

            handle.set_step(0, steps)  # before the pipeline, for a method that needs the count in step 0
            def callback(pipe, index, timestep, tensors):  # callback_on_step_end: step `index` is over
                handle.set_step(index + 1, pipe.num_timesteps)
                return tensors

        The method is asked for its plans at once, for the sizes of the latest call, because a compiled
        model's hooks may not run. Where they run, the method is asked again.

        Args:
            index: from 0; `count` where the run is over.
            count: steps of the run.
            sigma: noise level at which the model is evaluated next.

        Raises:
            ValueError: a negative index, or one beyond count.
        """
        self._steps.set(index, count, sigma)
        geometry = self._steps.geometry
        if index == count or geometry is None or not self._installation.installed:
            return
        try:
            self._plan(geometry)
        except Exception:
            # The next call may have other sizes: its hook asks again. Where the hook cannot run, it raises.
            self._set_states([None] * len(self._installation.processors))

    def reset(self) -> None:
        """Start over, as for a new image: step 0, counting forward calls, no statistics."""
        self._collect()
        self._records.clear()
        self._steps.restart()

    def prepare(
        self,
        *,
        text_len: int,
        image_len: int | None = None,
        latents: tuple[int, int] | None = None,
        batch: int = 1,
        device: torch.device | str | None = None,
    ) -> None:
        """Ask for the plans of coming calls of these sizes.

        Needed only where a whole model was compiled *after* apply(), as its hooks are compiled with it and
        cannot plan. set_step() then plans each following step.

        Args:
            text_len: text tokens.
            image_len: image tokens, for FLUX.
            latents: (rows, columns) of the latents, for UNets and SD 3.
            batch: items of a call.
            device: the model's if None.

        Raises:
            ValueError: the image's size in another form than the model takes.
        """
        host = self._host
        if (image_len is None) is host.takes_tokens or (latents is None) is not host.takes_tokens:
            wanted = "image_len" if host.takes_tokens else "latents=(rows, columns)"
            raise ValueError(
                f"prepare: {type(self._model).__name__} needs {wanted}, and no other size of the image"
            )
        device = self._installation.device() if device is None else torch.device(device)
        grids = () if latents is None else host.grids(self._model, *latents)
        self._plan(Geometry(text_len, image_len or 0, batch, device, grids), batch)

    def remove(self) -> None:
        """Put back the processors from before apply(), the same objects. A second call does nothing.

        A processor that was set in the meantime stays. Warns where the method returned no plan in any forward
        pass, as when its layers, steps or resolutions select none.
        """
        self._remove()

    def _remove(self) -> None:
        if not self._installation.installed:
            return
        self._collect()
        steps = self._steps
        idle = self._method is not None and steps.passes and not steps.has_planned
        idle = idle and not self._attachment.has_hooks  # a method may act through its hooks alone
        self._attachment.remove()
        self._installation.remove()
        if idle:  # last, as warnings may be errors: the model is restored by now
            warnings.warn(
                f"flashbrush: {type(self._method).__name__} controlled nothing in {steps.passes} forward "
                f"passes of {type(self._model).__name__}: its knobs and apply()'s layers and steps together "
                "select none",
                stacklevel=3,  # the caller of remove(), or the end of the with
            )

    def __enter__(self) -> Handle:
        if not self._installation.installed:
            raise RuntimeError("Handle: it was removed and controls nothing; apply() makes a new one")
        return self

    def __exit__(self, *_: object) -> None:
        self._remove()

    def __repr__(self) -> str:
        sites = self._installation.sites
        state = (
            f"{len(self._steps.layers)} of {len(sites)} layers" if self._installation.installed else "removed"
        )
        return f"Handle({type(self._model).__name__}, method={self._method!r}, {state})"

    def _before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the model: plan the call."""
        if torch.compiler.is_compiling():
            return
        self._installation.check()
        self._plan(self._host.geometry(self._model, args, kwargs))

    def _after(self, module: nn.Module, args: tuple, output: object) -> None:
        """Forward hook of the model: take the statistics, and go on to the next step."""
        if torch.compiler.is_compiling():
            return
        self._collect()
        for processor in self._installation.processors:
            if processor.state is not None:
                processor.state.again = True
        self._steps.end_pass(controlled=self._method is not None)

    def _plan(self, geometry: Geometry, batch: int | None = None) -> None:
        self._collect()
        self._attachment.check()
        self._set_states(self._steps.plan(self._method, geometry, self.grid, batch))

    def _set_states(self, states: Sequence[CallState | None]) -> None:
        for processor, state in zip(self._installation.processors, states, strict=True):
            processor.state = state

    def _collect(self) -> None:
        self._records.collect(self._installation.processors, self._steps.planned)
