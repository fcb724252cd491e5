"""A method's own hooks on a model, alone and composed."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import FluxTransformer2DModel

from flashbrush.integrations import InContextBrush, PlugAndPlay
from flashbrush.integrations.diffusers import Handle, Layer, Plan, Step, apply, compose

from ...tiny import forward, relative, tiny_call, tiny_flux
from ..tiny_images import tiny_unet


class Attached:
    """A method that doubles the input of the model's output projection."""

    def plan(self, layer: Layer, step: Step) -> Plan | None: ...

    def attach(self, model: FluxTransformer2DModel) -> list:
        return [model.proj_out.register_forward_pre_hook(lambda module, args: (2 * args[0],))]


def test_hooks_of_a_method_are_removed_with_it() -> None:
    model = tiny_flux(double=1, single=1)
    call = tiny_call(model)
    stock = forward(model, call)
    with apply(model, Attached()) as handle:
        changed = forward(model, call)
        assert relative(changed, stock) > 0.1
        handle.method = None
        assert relative(forward(model, call), stock) <= 1e-5
        handle.method = Attached()
        assert relative(forward(model, call), changed) <= 1e-5
    assert torch.equal(forward(model, call), stock)


def test_a_method_with_hooks_serves_the_model_it_was_applied_to_last() -> None:
    models, method = [tiny_flux(double=1, single=1) for _ in range(2)], Attached()
    call = tiny_call(models[0])
    for given in (method, compose(InContextBrush(), method)):
        first = apply(models[0], compose(method, InContextBrush()))
        forward(models[0], call)
        copied = copy.deepcopy(models[0])
        second = apply(models[1], given)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="this Attached was applied to another model since"):
                forward(models[0], call)
        forward(models[1], call)
        forward(copied, call)  # its method is a copy
        second.remove()
        with pytest.raises(RuntimeError, match="another model since"):
            forward(models[0], call)
        first.method = method
        forward(models[0], call)
        first.remove()
        theirs = Handle.of(copied)
        assert theirs is not None
        with apply(tiny_flux(double=1, single=1), theirs.method), pytest.raises(RuntimeError, match="since"):
            forward(copied, call)


def test_an_interrupted_attach_leaves_no_hooks() -> None:
    class Interrupted(Attached):
        def attach(self, model: FluxTransformer2DModel) -> list:
            raise KeyboardInterrupt

    model = tiny_flux(double=1, single=1)
    with pytest.raises(KeyboardInterrupt):
        apply(model, compose(Attached(), Interrupted()))
    assert Handle.of(model) is None and not model.proj_out._forward_pre_hooks


def test_a_composition_without_hooks_serves_several_models() -> None:
    class Plain:
        def plan(self, layer: Layer, step: Step) -> Plan:
            return Plan()

    method = compose(Plain(), Plain())
    models = [tiny_flux(double=1, single=1) for _ in range(2)]
    for model in models:
        apply(model, method)
    for model in models:
        forward(model, tiny_call(model))


def test_a_composition_with_a_method_that_is_refused_leaves_no_hooks() -> None:
    model = tiny_unet()

    def hooks() -> int:
        return sum(len(module._forward_hooks) for module in model.modules())

    before = hooks()
    with pytest.raises(ValueError, match="feature"):
        apply(model, compose(PlugAndPlay(layers=(0, None), feature=(1, 0)), PlugAndPlay(feature=(9, 9))))
    assert hooks() == before
