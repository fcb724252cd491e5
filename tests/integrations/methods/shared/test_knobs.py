"""Knobs: what each takes, stores and refuses, and that a dataclass with knobs behaves like any other."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from flashbrush.integrations.methods.shared import knobs
from flashbrush.integrations.methods.shared.knobs import (
    Choice,
    Count,
    FrozenDict,
    Mask,
    Number,
    Numbers,
    Window,
)


@dataclass(unsafe_hash=True)
class Brush:
    tokens: int = Count(low=1)
    alpha: float = Number(0.3, low=-1)
    norm: Literal["minmax", "mean"] = Choice("minmax", "mean")
    steps: tuple[int, int | None] = Window()
    weights: Mapping[int, float] = Numbers({})
    hole: Tensor | None = Mask("image tokens", default=None)


def test_signature_and_repr_have_the_defaults() -> None:
    parameters = inspect.signature(Brush).parameters
    assert parameters["tokens"].default is inspect.Parameter.empty
    assert [p.default for p in parameters.values()][1:] == [0.3, "minmax", (0, None), {}, None]
    assert repr(Brush(2)) == (
        "Brush(tokens=2, alpha=0.3, norm='minmax', steps=(0, None), weights={}, hole=None)"
    )
    assert Brush.alpha == 0.3
    with pytest.raises(AttributeError):
        _ = Brush.tokens


def test_required_knob_must_be_given() -> None:
    with pytest.raises(TypeError, match="tokens"):
        Brush()  # type: ignore[call-arg]


def test_equal_knobs_are_equal_and_hash_alike() -> None:
    a = Brush(2, steps=[1, None], weights={3: 0.5})  # type: ignore[arg-type]
    b = Brush(2, steps=(1, None), weights={3: 0.5})
    assert a == b and hash(a) == hash(b)
    b.alpha = 0.5
    assert a != b and hash(a) != hash(b)


@pytest.mark.parametrize(
    "duplicate",
    [
        copy.copy,
        copy.deepcopy,
        lambda brush: pickle.loads(pickle.dumps(brush)),
        dataclasses.replace,
        lambda brush: Brush(**vars(brush)),
    ],
    ids=["copy", "deepcopy", "pickle", "replace", "vars"],
)
def test_duplicates_have_the_same_knobs_and_check_them(duplicate: Any) -> None:
    brush = Brush(2, 0.5, "mean", (1, 3), {1: 2.0}, torch.tensor([True, False]))
    twin = duplicate(brush)
    assert twin is not brush
    assert (twin.tokens, twin.alpha, twin.norm, twin.steps, twin.weights) == (
        2,
        0.5,
        "mean",
        (1, 3),
        {1: 2.0},
    )
    assert torch.equal(twin.hole, brush.hole)
    twin.alpha = 0.7
    assert brush.alpha == 0.5
    with pytest.raises(ValueError, match=r"^alpha: "):
        twin.alpha = -2


def test_wrong_value_is_named_and_changes_nothing() -> None:
    brush = Brush(2)
    with pytest.raises(ValueError, match=r"^alpha: expected a finite number >= -1, got -1\.5$"):
        brush.alpha = -1.5
    with pytest.raises(
        ValueError, match=r"^hole: expected a bool tensor \(image tokens,\) or None, got float32 of"
    ):
        brush.hole = torch.zeros(3)
    with pytest.raises(ValueError, match=r"^tokens: expected a whole number >= 1, got 0$"):
        Brush(0)
    assert brush == Brush(2)


def test_wrong_default_is_found_when_the_class_is_made() -> None:
    with pytest.raises((ValueError, RuntimeError)) as caught:
        type("Wrong", (), {"alpha": Number(2.0, high=1)})
    error = (
        caught.value if isinstance(caught.value, ValueError) else caught.value.__cause__
    )  # wrapped before 3.12
    assert str(error) == "alpha: expected a finite number <= 1, got 2.0"


def test_frozen_dataclass_checks_once() -> None:
    @dataclass(frozen=True)
    class Frozen:
        alpha: float = Number(0.3, low=0)

    assert Frozen(1).alpha == 1 and Frozen() == Frozen(0.3)
    with pytest.raises(ValueError, match=r"^alpha: "):
        Frozen(-1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Frozen().alpha = 0.5  # type: ignore[misc]


def test_subclass_inherits_knobs() -> None:
    @dataclass
    class Wider(Brush):
        sigma: float = Number(math.inf, low=0, infinite=True)

    assert Wider(2).sigma == math.inf and Wider(2, 0.4).alpha == 0.4
    with pytest.raises(ValueError, match=r"^alpha: "):
        Wider(2, -2)


def test_hook_sees_a_checked_value_and_can_refuse_it() -> None:
    seen: list[tuple[str, Any]] = []

    @dataclass
    class Pair:
        first: tuple[int, ...] = knobs.Counts("panel")
        second: tuple[int, ...] = knobs.Counts("panel")

        def _knob_changes(self, name: str, value: Any) -> None:
            seen.append((name, value))
            if len(value) > 2:
                raise ValueError(f"{name}: too long")

    pair = Pair(1, [2, 3])  # type: ignore[arg-type]
    assert seen == [("first", (1,)), ("second", (2, 3))]
    with pytest.raises(ValueError, match="first: too long"):
        pair.first = (1, 2, 3)
    assert pair == Pair((1,), (2, 3))


def test_mask_is_copied() -> None:
    given = torch.tensor([True, False])
    brush = Brush(1, hole=given)
    given[1] = True
    assert brush.hole is not None and brush.hole.tolist() == [True, False]


def test_mapping_cannot_be_changed_in_place() -> None:
    given = {1: 2.0}
    brush = Brush(1, weights=given)
    given[1] = 3.0
    assert (
        brush.weights == {1: 2.0}
        and dict(brush.weights) == {1: 2.0}
        and hash(brush) == hash(Brush(1, weights={1: 2.0}))
    )
    with pytest.raises(TypeError):
        brush.weights[1] = 3.0  # type: ignore[index]
    for twin in (copy.deepcopy(brush.weights), pickle.loads(pickle.dumps(brush.weights))):
        assert isinstance(twin, FrozenDict) and twin == {1: 2.0}


class One:
    def __repr__(self) -> str:
        return "One()"


# A knob; values it takes, with what it stores; values it refuses
ONE = One()
MASK = torch.tensor([[True, False], [False, False]])
KNOBS: dict[str, tuple[Any, list[tuple[Any, Any]], list[Any]]] = {
    "number": (Number(), [(1, 1), (-0.5, -0.5)], [math.nan, math.inf, "1", None, True, 1j]),
    "number within": (Number(low=-1, high=1), [(-1, -1), (1.0, 1.0)], [-1.1, 1.1]),
    "number above": (Number(above=0), [(1e-9, 1e-9)], [0, -1]),
    "number or inf": (
        Number(low=0, infinite=True),
        [(math.inf, math.inf), (0, 0)],
        [-math.inf, math.nan, -1],
    ),
    "optional number": (Number(optional=True), [(None, None), (2, 2)], ["2"]),
    "share": (knobs.Share(), [(0, 0.0), (1, 1.0), (0.5, 0.5)], [-0.1, 1.1, math.nan, "0.5", None]),
    "count": (Count(low=1), [(1, 1), (7, 7)], [0, 1.0, True, "1", None]),
    "counts": (
        knobs.Counts("item", low=1),
        [(3, (3,)), ([1, 2.0], (1, 2)), (torch.tensor([4, 5]), (4, 5))],
        [0, (), (1, 0), 1.5, "3", None, True, math.nan],
    ),
    "counts, several": (knobs.Counts("panel", None, one=False), [((1, 2), (1, 2)), (None, None)], [3, ()]),
    "flag": (knobs.Flag(), [(True, True), (False, False)], [1, 0, None, "True"]),
    "choice": (Choice("a", "b"), [("b", "b")], ["c", 0, None, ("a",)]),
    "places": (knobs.Places(), [("up", ("up",)), (["down", "mid"], ("down", "mid"))], ["side", (), 3, None]),
    "layers": (
        knobs.Layers("self"),
        [(None, None), ("up", ("up",)), (3, (3,)), (["self", 1], ("self", 1))],
        ["cross", -1, (), True, 1.5, ("up", None)],
    ),
    "window": (
        Window(),
        [((1, None), (1, None)), ([2, 2], (2, 2))],
        [(3, 2), (-1, 2), 4, (1,), None, (0, 1.5)],
    ),
    "pair": (knobs.Pair("rows, columns", low=1), [([2, 3], (2, 3))], [(0, 1), 2, (1, 2, 3), None, (1, True)]),
    "resolution": (knobs.Resolution(), [(16, 16), ([4, 8], (4, 8))], [0, (4, 0), (1, 2, 3), "8", True, None]),
    "resolutions": (
        knobs.Resolutions(None),
        [(None, None), (8, (8,)), ([8, [4, 16]], (8, (4, 16)))],
        [(), (0,), "64", ((8, 8, 8),)],
    ),
    "windows": (knobs.Windows(), [({8: [0, None]}, {8: (0, None)})], [{}, {0: (0, 1)}, (1, 2), None]),
    "items": (
        knobs.Items(),
        [(None, None), (1, (1,)), ([2, 0], (2, 0))],
        [(), (1, 1), (-1,), ("0",), (0.5,), True],
    ),
    "several": (knobs.Several(One), [(ONE, (ONE,)), ([ONE], (ONE,))], [(), 3, (3,), None]),
    "instance": (knobs.Instance(One, None), [(None, None), (ONE, ONE)], [3, One]),
    "clip": (knobs.Clip(), [(None, None), ([0, 1], (0, 1))], [(1, 0), 1.0, (0, math.inf), (0, 1, 2)]),
    "falling": (
        knobs.Falling(),
        [([1, 0.5], (1.0, 0.5)), (torch.tensor([1.0, 0]), (1.0, 0.0))],
        [(1,), (0, 1), 3],
    ),
    "spans": (
        knobs.Spans(),
        [([(3, 5), [0, 3]], ((3, 5), (0, 3)))],
        [(), 3, (1, 2), ((0, 3), (2, 4)), ((4, 4),), ((-1, 2),), (0, 2)],
    ),
    "positions": (
        knobs.Positions("name", str),
        [({"cat": range(2)}, {"cat": (0, 1)}), ({"a": torch.tensor([3])}, {"a": (3,)})],
        [{}, {"a": []}, {"a": [-1]}, {"a": [0.5]}, {0: [1]}, [1], None],
    ),
    "positions, none": (
        knobs.Positions("item", int, {}, empty=True),
        [({}, {}), ({-1: [2]}, {-1: (2,)})],
        [{True: [1]}],
    ),
    "numbers": (
        Numbers(high=1),
        [({2: 0.5}, {2: 0.5}), ({}, {})],
        [{-1: 0.5}, {1: 1.5}, {1: -0.5}, {"a": 1}, 3],
    ),
    "mask": (Mask("rows, columns"), [(MASK, MASK)], [MASK[0], MASK.float(), 3, None]),
    "mask of two shapes": (Mask("tokens", "batch, tokens"), [(MASK, MASK), (MASK[0], MASK[0])], [MASK[None]]),
    "mask with some": (Mask("tokens", some=True), [(MASK[0], MASK[0])], [MASK[1]]),
    "soft mask": (
        knobs.SoftMask("rows, columns"),
        [(MASK.float(), MASK.float())],
        [2 * MASK, -1.0 * MASK, MASK[0]],
    ),
    "indices": (
        knobs.Indices("tokens"),
        [(torch.tensor([-1, 2]), torch.tensor([-1, 2]))],
        [MASK[0], torch.ones(2), 1],
    ),
}


@pytest.mark.parametrize("name", KNOBS)
def test_what_a_knob_stores_and_refuses(name: str) -> None:
    knob, right, wrong = KNOBS[name]
    Holder = type("Holder", (), {"field": knob})
    for value, stored in right:
        holder: Any = Holder()
        holder.field = value
        same = torch.equal(holder.field, stored) if isinstance(stored, Tensor) else holder.field == stored
        assert same and type(holder.field) in (type(stored), FrozenDict)
    for value in wrong:
        holder = Holder()
        with pytest.raises(ValueError, match=r"^field(\[.*\])?: expected .*, got "):
            holder.field = value
        assert "field" not in vars(holder)


def test_entry_of_a_mapping_is_named() -> None:
    for knob, value, match in (
        (
            knobs.Positions("name", str),
            {"cat": [-1]},
            r"^text\['cat'\]: expected positions >= 0, at least one, got \[-1\]",
        ),
        (knobs.Windows(), {8: (3, 1)}, r"^text\[8\]: expected \(first, the one after"),
    ):
        with pytest.raises(ValueError, match=match):
            knobs.checked("text", knob, value)


def test_argument_of_a_function_is_checked_by_its_name() -> None:
    assert knobs.checked("eta", knobs.Share(), 1) == 1.0
    with pytest.raises(ValueError, match=r"^eta: expected a number from 0 to 1, got 2$"):
        knobs.checked("eta", knobs.Share(), 2)
