"""Problem: packing, unpacking and the schemas of the operators agree with its one declaration of inputs."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from torch import Tensor

from flashbrush.bindings.core.lowering import lower
from flashbrush.bindings.core.problem import MAP, Problem, pack, position, schema, unpack
from support.oracle_calls import library_arguments, random_oracle_call


def lowered(seed: int) -> Problem:
    (q, k, v, control), kwargs = library_arguments(random_oracle_call(seed))
    return lower(q, k, v, control, **kwargs)


def same(a: object, b: object) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a is b if isinstance(a, Tensor) else a == b


@pytest.mark.parametrize("seed", range(6000, 6030))
def test_unpack_gives_the_packed_problem(seed: int) -> None:
    problem = lowered(seed)
    again = unpack(pack(problem))
    assert not [f.name for f in fields(Problem) if not same(getattr(problem, f.name), getattr(again, f.name))]


def test_the_map_s_inputs_are_packed_in_order() -> None:
    problem = lowered(6000)
    of_map, packed = pack(problem, MAP), pack(problem)
    assert len(of_map) == len(MAP) < len(packed)
    assert all(
        x is packed[position(name)] or x == packed[position(name)]
        for x, name in zip(of_map, MAP, strict=True)
    )


@pytest.mark.parametrize("name", ["attention", "attention_out", "attention_backward"])
def test_operators_take_every_input(name: str) -> None:
    arguments = [a.name for a in getattr(torch.ops.flashbrush, name).default._schema.arguments]
    inputs = [declaration.split()[-1] for declaration in schema().split(", ")]
    first = arguments.index(inputs[0])
    assert arguments[first : first + len(inputs)] == inputs
