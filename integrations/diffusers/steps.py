"""Steps: which denoising step a forward call belongs to, and the plans of all layers for it."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Container
from functools import partial

import torch
from torch import nn

from .hosts.host import Geometry, Site
from .protocol.layer import Layer, Step
from .protocol.plan import LatePlan, Method, Plan
from .protocol.plan_call import CallState


class Steps:
    """The current step, and planning.

    One step is one forward call until set() is called; from then on only set() changes the step.

    Args:
        model: whose parallel configuration decides whether a derived gain is possible.
        sites: the model's attention modules.
        layers: indices of the layers under control.
        selected: indices of the steps under control; None: all.
        collect: whether controlled calls keep their Stats.

    Attributes:
        current: the step of the next forward call, and during a call its own.
        planned: index of the step of the latest plans.
        geometry: the sizes of the latest plans; None: nothing was planned yet.
        passes: forward passes under a method.
        has_planned: whether the method returned a plan in any of them.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: list[Site],
        *,
        layers: frozenset[int],
        selected: Container[int] | None,
        collect: bool,
    ) -> None:
        self._model, self._sites = model, sites
        self.layers, self._selected, self._collect = layers, selected, collect
        self.current, self._counting = Step(0), True
        self.planned = 0
        self.geometry: Geometry | None = None
        self.passes, self.has_planned = 0, False

    @property
    def is_selected(self) -> bool:
        """Whether the current step is under control."""
        return self._selected is None or self.current.index in self._selected

    def set(self, index: int, count: int | None, sigma: float | None) -> None:
        """Make this the current step; counting stops.

        Raises:
            ValueError: a negative index, or one beyond count.
        """
        if isinstance(index, bool) or not isinstance(index, int) or index < 0:
            raise ValueError(f"index: expected a step of 0 or more, got {index!r}")
        if count is not None and index > count:
            raise ValueError(f"index: expected a step of 0 to count={count}, got {index}")
        self.current, self._counting = Step(index, count, sigma), False

    def restart(self) -> None:
        """Step 0; counting forward calls again."""
        self.current, self._counting = Step(0), True

    def end_pass(self, controlled: bool) -> None:
        """A forward call is over. controlled: whether it ran under a method."""
        self.passes += controlled
        if self._counting:
            self.current = Step(self.current.index + 1)

    def unplanned(self, method: Method | None) -> list[CallState | None]:
        """The layers' states before the first planning."""
        if method is not None:
            return [None] * len(self._sites)
        return [CallState(stock=i not in self.layers, collect=self._collect) for i in range(len(self._sites))]

    def plan(
        self,
        method: Method | None,
        geometry: Geometry,
        grid: tuple[int, int] | None,
        batch: int | None = None,
    ) -> list[CallState]:
        """Ask the method for the plan of each selected layer in the current step.

        Args:
            method: None: all layers are plain.
            geometry: sizes of the call.
            grid: Layer.grid where geometry has none.
            batch: CallState.batch.

        Returns:
            One state per layer.

        Raises:
            TypeError: the method returned something else than a plan.
            ValueError: a plan does not fit its layer.
        """
        self.geometry, self.planned = geometry, self.current.index
        stock = _active_backend_is_set()
        states = []
        for i, site in enumerate(self._sites):
            plan, controlled = None, method is not None and self.is_selected and i in self.layers
            if method is not None and controlled:
                plan = self._ask(method, _layer(i, site, geometry, grid), geometry.device)
            self.has_planned |= plan is not None
            plain = stock or (method is None and i not in self.layers)
            states.append(CallState(plan, controlled, plain, self._collect, batch))
        return states

    def _ask(self, method: Method, layer: Layer, device: torch.device) -> Plan | LatePlan | None:
        with _on_cpu():
            plan = method.plan(layer, self.current)
        if callable(plan):
            return partial(self._fit_late, method, plan, layer, device)
        return self._fit(method, plan, layer, device)

    def _fit_late(self, method: Method, late: LatePlan, layer: Layer, device: torch.device) -> Plan | None:
        with _on_cpu():
            plan = late()
        return self._fit(method, plan, layer, device)

    def _fit(self, method: Method, plan: Plan | None, layer: Layer, device: torch.device) -> Plan | None:
        """The plan, checked against the layer, on the device."""
        if plan is None:
            return None
        if not isinstance(plan, Plan):
            raise TypeError(
                f"{type(method).__name__}.plan: expected a Plan or None, got {type(plan).__name__}"
            )
        plan.check(layer)
        parallel = getattr(getattr(self._model, "_parallel_config", None), "tensor_parallel_config", None)
        if parallel is not None and any(control.head_gain is not None for control in plan.controls):
            raise NotImplementedError(
                "flashbrush: a derived head gain compares all heads, but tensor parallelism spreads them "
                "over ranks; use a method without one"
            )
        return plan.to(device)


def _layer(index: int, site: Site, geometry: Geometry, grid: tuple[int, int] | None) -> Layer:
    if geometry.grids:
        grid = geometry.grids[site.level]
    return Layer(
        index,
        site.kind,
        site.place,
        site.attn.heads,
        site.attn.inner_dim // site.attn.heads,
        0 if site.kind == "self" else geometry.text_len,
        math.prod(grid) if geometry.grids and grid is not None else geometry.image_len,
        geometry.batch,
        grid,
    )


def _on_cpu() -> contextlib.AbstractContextManager:
    """Methods make their tables on the CPU whatever torch.set_default_device says; plans are moved later."""
    return contextlib.nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")


def _active_backend_is_set() -> bool:
    """Whether attention_backend() or the environment sets an attention backend for all of diffusers."""
    dispatch = sys.modules["diffusers.models.attention_dispatch"]
    registry = getattr(dispatch, "_AttentionBackendRegistry", None)
    return (
        registry is not None and registry.get_active_backend()[0] is not dispatch.AttentionBackendName.NATIVE
    )
