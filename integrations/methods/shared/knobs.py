"""Knobs: the fields of a method that a user sets, each checked at every assignment.

    @dataclass
    class Brush:
        alpha: float = Number(0.3, low=-1)
        norm: Literal["minmax", "mean"] = Choice("minmax", "mean")
        hole: Tensor | None = Mask("image tokens", default=None)

A knob is a descriptor with a default; without one the field is required. Its value is stored in the object,
so that a dataclass compares, hashes, copies and pickles as without knobs. A wrong value raises a ValueError
that names the knob, what was expected and what was given, and leaves the old value in place.

Where knobs must agree with each other, or cached state depends on one, the class defines
`_knob_changes(name, value)`. It is called before a knob takes a value that is valid by itself, and raises
ValueError to refuse it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ....bindings import Contrast

PLACES = ("down", "mid", "up")
KINDS = ("self", "cross", "added", "joint", "double", "single")
_REQUIRED = object()


class Knob:
    """A checked field; the base of all knobs.

    Args:
        default: the value where none is given; left out: the field is required.
        optional: whether None is allowed; it is where None is the default.
        expected: what a right value is, for the message of a wrong one.
    """

    name = "value"

    # Any: a type checker takes the field's own annotation, as with dataclasses.field.
    def __new__(cls, *args: Any, **options: Any) -> Any:
        return super().__new__(cls)

    def __init__(self, default: Any = _REQUIRED, *, optional: bool = False, expected: str) -> None:
        self.default, self.optional = default, optional or default is None
        self.expected = f"{expected} or None" if self.optional else expected

    def convert(self, value: Any) -> Any:
        """The value as it is stored; ValueError, whose text is not shown, where it is wrong."""
        raise NotImplementedError

    def check(self, value: Any) -> Any:
        """The value as it is stored; ValueError that names the knob, what was expected and what was given."""
        if value is None and self.optional:
            return None
        try:
            return self.convert(value)
        except (TypeError, ValueError) as error:
            if str(error).startswith(f"{self.name}["):  # an entry of a mapping, named already
                raise
            raise ValueError(f"{self.name}: expected {self.expected}, got {_shown(value)}") from None

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name
        if self.default is not _REQUIRED:
            self.default = self.check(self.default)

    def __get__(self, owner: Any, cls: type | None = None) -> Any:
        found = self.default if owner is None else owner.__dict__.get(self.name, _REQUIRED)
        if found is _REQUIRED:  # tells dataclass() that the field has no default
            raise AttributeError(self.name)
        return found

    def __set__(self, owner: Any, value: Any) -> None:
        value = self.check(value)
        if (changes := getattr(owner, "_knob_changes", None)) is not None:
            changes(self.name, value)
        owner.__dict__[self.name] = value


def checked(name: str, knob: Knob, value: Any) -> Any:
    """A function's argument, checked as a knob of this name."""
    knob.name = name
    return knob.check(value)


class Number(Knob):
    """An int or a float from `low` to `high`, or above `above`; finite unless `infinite`."""

    def __init__(
        self,
        default: Any = _REQUIRED,
        *,
        low: float = -math.inf,
        high: float = math.inf,
        above: float = -math.inf,
        infinite: bool = False,
        optional: bool = False,
    ) -> None:
        self.low, self.high, self.above, self.infinite = low, high, above, infinite
        bounds = {">=": low, ">": above, "<=": high}
        bound = "".join(f" {sign} {n:g}" for sign, n in bounds.items() if math.isfinite(n))
        expected = f"a number{bound} or inf" if infinite else f"a finite number{bound}"
        if math.isfinite(low) and math.isfinite(high):
            expected = f"a number from {low:g} to {high:g}"
        super().__init__(default, optional=optional, expected=expected)

    def convert(self, value: Any) -> float:
        _require(is_number(value) or (self.infinite and value == math.inf))
        _require(self.low <= value <= self.high and value > self.above)
        return value


class Share(Number):
    """A number from 0 to 1, stored as a float."""

    def __init__(self, default: Any = _REQUIRED) -> None:
        super().__init__(default, low=0, high=1)

    def convert(self, value: Any) -> float:
        return float(super().convert(value))


class Count(Knob):
    """A whole number of `low` or more."""

    def __init__(self, default: Any = _REQUIRED, *, low: int = 0, optional: bool = False) -> None:
        self.low = low
        super().__init__(default, optional=optional, expected=f"a whole number >= {low}")

    def convert(self, value: Any) -> int:
        _require(is_count(value) and value >= self.low)
        return value


class Counts(Knob):
    """Whole numbers of `low` or more; stored as a tuple of ints.

    Args:
        each: what there is a number for, as "panel".
        one: whether a single number may stand for a tuple of it.
    """

    def __init__(self, each: str, default: Any = _REQUIRED, *, low: int = 0, one: bool = True) -> None:
        self.low, self.one = low, one
        single = f"a whole number >= {low}, or one" if one else f"whole numbers >= {low}, one"
        super().__init__(default, expected=f"{single} for each {each}")

    def convert(self, value: Any) -> tuple[int, ...]:
        if isinstance(value, Tensor):
            value = value.flatten().tolist()
        counts = _several(value, (int, float)) if self.one else tuple(value)
        _require(counts and all(is_number(n) and n == int(n) >= self.low for n in counts))
        return tuple(int(n) for n in counts)


class Flag(Knob):
    """True or False."""

    def __init__(self, default: Any = _REQUIRED) -> None:
        super().__init__(default, expected="True or False")

    def convert(self, value: Any) -> bool:
        _require(isinstance(value, bool))
        return value


class Choice(Knob):
    """One of several values, of which the first is the default."""

    def __init__(self, *choices: str) -> None:
        self.choices = choices
        super().__init__(choices[0], expected=f"one of {', '.join(choices)}")

    def convert(self, value: Any) -> str:
        _require(isinstance(value, str) and value in self.choices)
        return value


class Places(Knob):
    """One or several of a UNet's places down, mid and up; stored as a tuple."""

    def __init__(self, default: Any = _REQUIRED) -> None:
        super().__init__(default, expected=f"some of {', '.join(PLACES)}")

    def convert(self, value: Any) -> tuple[str, ...]:
        places = _several(value, str)
        _require(places and set(places) <= set(PLACES))
        return places


class Layers(Knob):
    """One or several kinds or places of Layer, or indices; None: the method's own. Stored as a tuple."""

    def __init__(self, *kinds: str) -> None:
        self.names = (*PLACES, *(kinds or KINDS))
        super().__init__(None, expected=f"some of {', '.join(self.names)} and indices")

    def convert(self, value: Any) -> tuple[str | int, ...]:
        layers = _several(value, (str, int))
        _require(layers and all(is_count(n) or (isinstance(n, str) and n in self.names) for n in layers))
        return layers


class Window(Knob):
    """(first, the one after the last, or None for no end), of steps or of layers."""

    def __init__(self, first: int = 0, end: int | None = None) -> None:
        super().__init__((first, end), expected="(first, the one after the last or None)")

    def convert(self, value: Any) -> tuple[int, int | None]:
        first, end = _pair(value)
        _require(is_count(first) and (end is None or (is_count(end) and end >= first)))
        return first, end


class Pair(Knob):
    """Two whole numbers of `low` or more.

    Args:
        of: what they are, as "rows, columns".
    """

    def __init__(self, of: str, default: Any = _REQUIRED, *, low: int = 0, optional: bool = False) -> None:
        self.low = low
        super().__init__(default, optional=optional, expected=f"two whole numbers >= {low} ({of})")

    def convert(self, value: Any) -> tuple[int, int]:
        pair = _pair(value)
        _require(all(is_count(n) and n >= self.low for n in pair))
        return pair


class Resolution(Knob):
    """The side of a square of tokens, or (rows, columns)."""

    def __init__(self, default: Any = _REQUIRED) -> None:
        super().__init__(default, expected="a number of tokens > 0 or a pair (rows, columns)")

    def convert(self, value: Any) -> int | tuple[int, int]:
        sides = _pair((value, value) if isinstance(value, int) else value)
        _require(all(is_count(n) and n > 0 for n in sides))
        return value if isinstance(value, int) else sides


class Resolutions(Knob):
    """One or several resolutions, or None; stored as a tuple."""

    def __init__(self, default: Any = _REQUIRED) -> None:
        super().__init__(default, expected="some numbers or pairs (rows, columns) of tokens")

    def convert(self, value: Any) -> tuple[int | tuple[int, int], ...]:
        resolutions = tuple(Resolution().convert(one) for one in _several(value, int))
        _require(resolutions)
        return resolutions


class Windows(Knob):
    """{resolution: window of steps}, read-only."""

    def __init__(self, default: Any = _REQUIRED) -> None:
        super().__init__(default, expected="{resolution: (first, the one after the last or None)}")

    def convert(self, value: Any) -> FrozenDict:
        _require(isinstance(value, Mapping) and value)
        resolutions = {Resolution().convert(r): window for r, window in value.items()}
        return FrozenDict({r: checked(f"{self.name}[{r}]", Window(), w) for r, w in resolutions.items()})


class Items(Knob):
    """Different items of a call's batch, or None; stored as a tuple."""

    def __init__(self) -> None:
        super().__init__(None, expected="different batch items")

    def convert(self, value: Any) -> tuple[int, ...]:
        items = _several(value, int)
        _require(items and all(map(is_count, items)) and len(set(items)) == len(items))
        return items


class Several(Knob):
    """One or several objects of a class; stored as a tuple."""

    def __init__(self, kind: type, default: Any = _REQUIRED) -> None:
        self.kind = kind
        super().__init__(default, expected=f"one or several {kind.__name__}")

    def convert(self, value: Any) -> tuple:
        several = _several(value, self.kind)
        _require(several and all(isinstance(one, self.kind) for one in several))
        return several


class Instance(Knob):
    """An object of a class."""

    def __init__(self, kind: type, default: Any = _REQUIRED) -> None:
        self.kind = kind
        super().__init__(default, expected=kind.__name__)

    def convert(self, value: Any) -> Any:
        _require(isinstance(value, self.kind))
        return value


class Clip(Knob):
    """Bounds (low, high) of a contrasted map, as of Contrast, or None."""

    def __init__(self, default: Any = None) -> None:
        super().__init__(default, optional=True, expected="finite bounds (low, high) with low <= high")

    def convert(self, value: Any) -> tuple[float, float]:
        Contrast(1.0, value)
        return tuple(value)


class Falling(Knob):
    """Two or more numbers, each below the one before; stored as a tuple of floats."""

    def __init__(self, default: Any = _REQUIRED) -> None:
        super().__init__(default, expected="at least two numbers, each below the one before")

    def convert(self, value: Any) -> tuple[float, ...]:
        numbers = tuple(float(n) for n in value)
        _require(len(numbers) > 1 and all(a > b for a, b in pairwise(numbers)))
        return numbers


class Spans(Knob):
    """Disjoint (first, one after the last) of tokens; stored as a tuple."""

    def __init__(self, default: Any = _REQUIRED) -> None:
        super().__init__(default, expected="disjoint (first, one after the last), at least one")

    def convert(self, value: Any) -> tuple[tuple[int, int], ...]:
        spans = tuple(_pair(span) for span in value)
        _require(spans and all(is_count(n) for span in spans for n in span))
        _require(all(first < end for first, end in spans))
        _require(all(a[1] <= b[0] for a, b in pairwise(sorted(spans))))
        return spans


class Positions(Knob):
    """{key: positions of tokens}, read-only, with tuples of positions.

    Args:
        key: what a key is, as "item", and `kind` its class.
        empty: whether there may be no key at all.
    """

    def __init__(self, key: str, kind: type, default: Any = _REQUIRED, *, empty: bool = False) -> None:
        self.kind, self.empty = kind, empty
        super().__init__(default, expected=f"{{{key}: positions of tokens}}")

    def convert(self, value: Any) -> FrozenDict:
        _require(isinstance(value, Mapping) and (value or self.empty))
        _require(all(isinstance(key, self.kind) and not isinstance(key, bool) for key in value))
        each = {key: checked(f"{self.name}[{key!r}]", _Tokens(), given) for key, given in value.items()}
        return FrozenDict(each)


class _Tokens(Knob):
    def __init__(self) -> None:
        super().__init__(expected="positions >= 0, at least one")

    def convert(self, value: Any) -> tuple[int, ...]:
        given = list(value)
        positions = tuple(int(n) for n in given if n == int(n))
        _require(positions and len(positions) == len(given) and min(positions) >= 0)
        return positions


class Numbers(Knob):
    """{token: number from 0 to `high`}, read-only."""

    def __init__(self, default: Any = _REQUIRED, *, high: float = math.inf) -> None:
        self.high = high
        bound = ">= 0" if math.isinf(high) else f"from 0 to {high:g}"
        super().__init__(default, expected=f"{{text token: number {bound}}}")

    def convert(self, value: Any) -> FrozenDict:
        _require(isinstance(value, Mapping) and all(map(is_count, value)))
        _require(all(is_number(n) and 0 <= n <= self.high for n in value.values()))
        return FrozenDict(value)


class _TensorKnob(Knob):
    """A tensor of one of some shapes, each written as its axes: "rows, columns"."""

    def __init__(self, what: str, shapes: tuple[str, ...], default: Any) -> None:
        self.dims = [len(shape.split(",")) for shape in shapes]
        named = " or ".join(f"({shape}{',' * (shape.partition(',')[1] == '')})" for shape in shapes)
        super().__init__(default, expected=what.format(named))

    def convert(self, value: Any) -> Tensor:
        _require(isinstance(value, Tensor) and value.dim() in self.dims)
        return value


class Mask(_TensorKnob):
    """A bool tensor, of which a copy is kept.

    Args:
        shapes: the axes of each shape that is allowed, as "rows, columns".
        some: whether it must be True somewhere.
    """

    def __init__(self, *shapes: str, default: Any = _REQUIRED, some: bool = False) -> None:
        self.some = some
        super().__init__("a bool tensor {}" + " with at least one True" * some, shapes, default)

    def convert(self, value: Any) -> Tensor:
        mask = super().convert(value)
        _require(mask.dtype == torch.bool and (not self.some or bool(mask.any())))
        return mask.clone()


class SoftMask(_TensorKnob):
    """A tensor within 0 and 1, of which a copy is kept."""

    def __init__(self, shape: str) -> None:
        super().__init__("a tensor {} within 0 and 1", (shape,), _REQUIRED)

    def convert(self, value: Any) -> Tensor:
        mask = super().convert(value)
        _require(bool(((mask >= 0) & (mask <= 1)).all()))
        return mask.clone()


class Indices(_TensorKnob):
    """An int64 tensor."""

    def __init__(self, shape: str) -> None:
        super().__init__("an int64 tensor {}", (shape,), _REQUIRED)

    def convert(self, value: Any) -> Tensor:
        _require(super().convert(value).dtype == torch.int64)
        return value


class FrozenDict(Mapping):
    """A mapping that cannot be changed in place: only an assignment to its knob changes it."""

    def __init__(self, items: Mapping = {}) -> None:
        self._items = dict(items)

    def __getitem__(self, key: Any) -> Any:
        return self._items[key]

    def __iter__(self) -> Iterator:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(frozenset(self._items.items()))

    def __repr__(self) -> str:
        return repr(self._items)


def is_count(value: object) -> bool:
    """Whether it is an int >= 0, and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_number(value: object) -> bool:
    """Whether it is a finite int or float, and not a bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _require(right: object) -> None:
    if not right:
        raise ValueError


def _several(value: Any, kind: type | tuple[type, ...]) -> tuple:
    """(value,) if it is of that kind, or the values of an iterable."""
    return (value,) if isinstance(value, kind) else tuple(value)


def _pair(value: Any) -> tuple[Any, Any]:
    _require(isinstance(value, (tuple, list)) and len(value) == 2)
    return value[0], value[1]


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
