"""Bad calls raise the right type, name the argument, what was expected and what came, and write nothing."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

import flashbrush as fb

NAN, INF = math.nan, math.inf
S, C, A = fb.Segments, fb.Control, fb.attention  # short for the tables below


def rows() -> fb.Segments:
    return S(a=2, b=3)


def keys() -> fb.Segments:
    return S(x=4, y=5)


def control(**options) -> fb.Control:
    return C(rows(), keys(), **options)


ints, ramp = torch.tensor([1, 2]), torch.arange(9)
needs_grad = torch.ones(4, requires_grad=True)

SEGMENTS = (
    (lambda: S(), ValueError, r"Segments.*at least one.*none"),
    (lambda: S(5), TypeError, r"Segments.*dict.*int"),
    (lambda: S({"a": 1}, a=2), ValueError, r"Segments.*twice"),
    (lambda: S(a=-1), ValueError, r"'a'.*>= 0.*-1"),
    (lambda: S(a=1.5), TypeError, r"'a'.*int.*float"),
    (lambda: S(a=True), TypeError, r"'a'.*int.*bool"),
    (lambda: S(a="4"), TypeError, r"'a'.*int.*str"),
    (lambda: S({"*": 1}), ValueError, r"'\*'"),
    (lambda: S({"": 1}), ValueError, r"name.*''"),
    (lambda: S({3: 1}), ValueError, r"name.*3"),
    (lambda: S(a=torch.tensor([1.0])), TypeError, r"'a'.*int tensor.*float32"),
    (lambda: S(a=torch.tensor(3)), TypeError, r"'a'.*\(batch,\).*\(\)"),
    (lambda: S(a=torch.tensor([1, -2]), b=torch.tensor([4, 7])), ValueError, r"'a'.*>= 0.*-2"),
    (lambda: S(a=torch.tensor([1, 2]), b=torch.tensor([1, 2, 3])), ValueError, r"'b'.*3 items.*2"),
    (lambda: S(a=torch.tensor([1, 2]), b=4), ValueError, r"totals.*equal.*\[5, 6\]"),
    (lambda: S(a=torch.tensor([], dtype=torch.int64)), ValueError, r"'a'.*at least one item"),
    (lambda: rows().slice("c"), ValueError, r"unknown segment 'c'.*a, b"),
    (lambda: S(a=torch.tensor([1, 2]), b=torch.tensor([2, 1])).slice("b"), ValueError, r"slice.*'b'.*items"),
    (lambda: S.from_labels([0, 1], ["a", "b"]), TypeError, r"labels.*int tensor.*list"),
    (lambda: S.from_labels(torch.zeros(4), ["a"]), TypeError, r"labels.*float32"),
    (
        lambda: S.from_labels(torch.zeros(2, 2, 2).long(), ["a"]),
        ValueError,
        r"labels.*\(tokens,\).*\(2, 2, 2\)",
    ),
    (lambda: S.from_labels(torch.tensor([0, 2]), ["a", "b"]), ValueError, r"labels.*0\.\.1.*0\.\.2"),
    (lambda: S.from_labels(torch.tensor([-1, 0]), ["a", "b"]), ValueError, r"labels.*-1"),
    (lambda: S.from_labels(torch.tensor([0]), ["a", "a"]), ValueError, r"names.*distinct"),
    (lambda: S.from_labels(torch.tensor([0]), "ab"), TypeError, r"names.*string 'ab'"),
)

CONTROL = (
    (lambda: C(5), TypeError, r"rows.*Segments.*int"),
    (lambda: C(rows(), {"x": 3}), TypeError, r"keys.*Segments.*dict"),
    (lambda: control(bias=[("a", "x")]), TypeError, r"bias.*dict.*list"),
    (lambda: control(bias={("c", "x"): 1.0}), ValueError, r"bias.*row.*'c'.*a, b"),
    (lambda: control(bias={("a", "prompt"): 1.0}), ValueError, r"bias.*key.*'prompt'.*x, y"),
    (lambda: control(bias={"ax": 1.0}), ValueError, r"bias.*pair.*'ax'"),
    (lambda: control(bias={("a", "x", "y"): 1.0}), ValueError, r"bias.*pair"),
    (lambda: control(bias={("a", 3): 1.0}), TypeError, r"bias.*key.*segment name.*3"),
    (lambda: control(bias={("a", "x"): NAN}), ValueError, r"bias.*finite number or -inf.*nan"),
    (lambda: control(bias={("a", "x"): INF}), ValueError, r"bias.*finite number or -inf.*inf"),
    (lambda: control(bias={("a", "x"): "big"}), TypeError, r"bias.*number or a tensor.*str"),
    (
        lambda: control(bias={("a", "x"): -1e9}),
        ValueError,
        r"bias.*-inf, which removes, at most 1e4.*got -1000000000",
    ),
    (lambda: control(bias={("a", "x"): torch.tensor([1.0, -1e9])}), ValueError, r"bias.*at most 1e4"),
    (lambda: control(weight={("a", "x"): 1e39}), ValueError, r"weight.*finite"),
    (
        lambda: control(weight={("a", "x"): torch.tensor([1.0, 1e39], dtype=torch.float64)}),
        ValueError,
        r"weight.*finite",
    ),
    (
        lambda: control(bias={("a", "x"): torch.tensor([1.0, NAN])}),
        ValueError,
        r"bias.*finite number or -inf",
    ),
    (
        lambda: control(bias={("a", "x"): torch.zeros(2, 4, 5)}),
        ValueError,
        r"bias.*\(batch, heads\).*\(2, 4, 5\)",
    ),
    (lambda: control(bias={("a", "x"): torch.tensor(1.0)}), ValueError, r"bias.*\(heads,\).*\(\)"),
    (lambda: control(bias={("a", "x"): ints}), TypeError, r"bias.*float tensor.*int64"),
    (lambda: control(bias={("a", "x"): needs_grad}), TypeError, r"bias.*requires grad"),
    (lambda: control(weight={("a", "x"): -0.1}), ValueError, r"weight.*>= 0.*-0.1"),
    (lambda: control(weight={("a", "x"): NAN}), ValueError, r"weight.*>= 0.*nan"),
    (lambda: control(weight={("a", "x"): INF}), ValueError, r"weight.*>= 0.*inf"),
    (lambda: control(weight={("a", "x"): -INF}), ValueError, r"weight.*>= 0.*inf"),
    (lambda: control(weight={("a", "x"): torch.tensor([1.0, -1.0])}), ValueError, r"weight.*>= 0"),
    (lambda: control(weight={("a", "x"): needs_grad}), TypeError, r"weight.*requires grad"),
    (
        lambda: control(weight={("a", "x"): torch.ones(2), ("b", "x"): torch.ones(4)}),
        ValueError,
        r"weight.*head counts.*2 and 4",
    ),
    (
        lambda: control(bias={("a", "x"): torch.ones(2, 4), ("b", "x"): torch.ones(3, 4)}),
        ValueError,
        r"bias.*batch counts.*2 and 3",
    ),
    (lambda: control(gain={"x": 1.0}), ValueError, r"gain.*'x'.*a, b"),
    (lambda: control(gain={"a": -INF}), ValueError, r"gain.*finite.*inf"),
    (lambda: control(gain={"a": torch.tensor([-INF])}), ValueError, r"gain.*finite"),
    (lambda: control(gain=2.0), TypeError, r"gain.*dict.*float"),
    (lambda: control(head_gain=0.2), TypeError, r"head_gain.*HeadGain.*float"),
    (lambda: control(head_gain=fb.HeadGain()), ValueError, r"head_gain.rows.*'target'.*a, b"),
    (lambda: control(head_gain=fb.HeadGain("a")), ValueError, r"head_gain.keys.*'prompt'.*x, y"),
    (
        lambda: control(head_gain=fb.HeadGain("a", "x", apply_to=["a", "c"])),
        ValueError,
        r"head_gain.apply_to.*'c'",
    ),
    (lambda: control(head_gain=fb.HeadGain(3, "x")), TypeError, r"head_gain.rows.*segment name.*3"),
    (lambda: control(head_gain=fb.HeadGain([], "x")), TypeError, r"head_gain.rows.*segment name.*\[\]"),
    (lambda: fb.HeadGain(norm="l2"), ValueError, r"HeadGain.norm.*minmax.*'l2'"),
    (lambda: fb.HeadGain(span=NAN), ValueError, r"HeadGain.span.*finite.*nan"),
    (lambda: fb.HeadGain(floor="1"), ValueError, r"HeadGain.floor.*finite.*'1'"),
    (lambda: control(groups=["x", "y"]), TypeError, r"groups.*dict.*list"),
    (lambda: control(groups={}), ValueError, r"groups.*at least one"),
    (lambda: control(groups={"g": "x"}), TypeError, r"groups\['g'\].*list.*'x'"),
    (lambda: control(groups={"g": 3}), TypeError, r"groups\['g'\].*list.*3"),
    (lambda: control(groups={"g": ["x", "z"]}), ValueError, r"groups\['g'\].*'z'.*x, y"),
    (lambda: control(groups={"g": ["x"], "h": ["x", "y"]}), ValueError, r"groups.*'x'.*more than one"),
    (lambda: control(groups={"g": ["x"]}), ValueError, r"groups.*missing y"),
    (lambda: control(gates={"g": 0.5}), ValueError, r"gates.*'g'.*all"),
    (lambda: control(gates={"all": torch.ones(5)}), ValueError, r"gates\['all'\].*\(batch, 5 rows\).*\(5,\)"),
    (lambda: control(gates={"all": torch.ones(2, 6)}), ValueError, r"gates\['all'\].*5 rows.*\(2, 6\)"),
    (lambda: control(gates={"all": torch.full((2, 5), NAN)}), ValueError, r"gates\['all'\].*finite"),
    (lambda: control(gates={"all": NAN}), ValueError, r"gates\['all'\].*finite.*nan"),
    (lambda: control(gates={"all": torch.ones(2, 5).long()}), TypeError, r"gates\['all'\].*float.*int64"),
    (
        lambda: control(gates={"all": torch.ones(2, 5, requires_grad=True)}),
        TypeError,
        r"gates\['all'\].*requires grad",
    ),
    (
        lambda: C(
            S(a=1),
            keys(),
            groups={"g": ["x"], "h": ["y"]},
            gates={"g": torch.ones(2, 1), "h": torch.ones(3, 1)},
        ),
        ValueError,
        r"gates.*batch.*2 and 3",
    ),
    (lambda: control(contrast=1.67), TypeError, r"contrast.*Contrast.*float"),
    (lambda: control(contrast={"g": fb.Contrast()}), ValueError, r"contrast.*'g'.*all"),
    (lambda: control(contrast={"all": 1.67}), TypeError, r"contrast\['all'\].*Contrast.*float"),
    (lambda: fb.Contrast(NAN), ValueError, r"Contrast.beta.*finite.*nan"),
    (lambda: fb.Contrast("1"), ValueError, r"Contrast.beta.*finite.*'1'"),
    (lambda: fb.Contrast(1.67, (1.0, 0.0)), ValueError, r"Contrast.clip.*lo <= hi.*\(1.0, 0.0\)"),
    (lambda: fb.Contrast(1.67, (0.0,)), ValueError, r"Contrast.clip.*\(0.0,\)"),
    (lambda: fb.Contrast(1.67, (0.0, INF)), ValueError, r"Contrast.clip.*finite.*inf"),
    (lambda: fb.Contrast(1.67, True), ValueError, r"Contrast.clip.*True"),
    (lambda: control(valid={"z": ints}), ValueError, r"valid.*'z'.*x, y"),
    (lambda: control(valid={"x": 3}), TypeError, r"valid\['x'\].*int tensor.*int"),
    (lambda: control(valid={"x": torch.ones(2)}), TypeError, r"valid\['x'\].*int tensor.*float32"),
    (lambda: control(valid={"x": torch.ones(2).bool()}), TypeError, r"valid\['x'\].*int tensor.*bool"),
    (lambda: control(valid={"x": torch.ones(2, 4).long()}), TypeError, r"valid\['x'\].*\(batch,\).*\(2, 4\)"),
    (lambda: control(valid={"x": torch.tensor([1, 5])}), ValueError, r"valid\['x'\].*0\.\.4.*5"),
    (lambda: control(valid={"x": torch.tensor([1, -1])}), ValueError, r"valid\['x'\].*0\.\.4.*-1"),
    (lambda: control(valid={"x": ints, "y": torch.tensor([1, 2, 3])}), ValueError, r"valid.*batch.*2, 3"),
    (
        lambda: C(S(a=5), S(x=ints, y=3 - ints), valid={"x": torch.tensor([0, 0, 0])}),
        ValueError,
        r"valid\['x'\].*\(2,\).*\(3,\)",
    ),
)


def q(*shape: int, **more) -> torch.Tensor:
    return torch.randn(shape or (2, 5, 4, 8), **more)


def kv(*shape: int, **more) -> torch.Tensor:
    return torch.randn(shape or (2, 9, 2, 8), **more)


def lists(*sizes: int) -> list[torch.Tensor]:
    return [kv(2, n, 2, 8) for n in sizes]


def source(**index) -> dict:
    return {"source": index}


# Each: (q, k, v, control) and keyword arguments of attention(), the error, and a pattern of its message.
CALLS = (
    (lambda: ([1.0], kv(), kv()), {}, TypeError, r"q: .*tensor.*list"),
    (lambda: (q(5, 4, 8), kv(), kv()), {}, ValueError, r"q: .*\(batch, tokens, heads, dim\).*\(5, 4, 8\)"),
    (lambda: (q().long(), kv(), kv()), {}, TypeError, r"q: .*float32.*int64"),
    (lambda: (q(2, 5, 4, 257), kv(2, 9, 2, 257), kv(2, 9, 2, 257)), {}, ValueError, r"q: .*1 to 256.*257"),
    (lambda: (q(2, 5, 4, 0), kv(2, 9, 2, 0), kv(2, 9, 2, 0)), {}, ValueError, r"q: .*1 to 256.*0"),
    (lambda: (q(2, 5, 0, 8), kv(), kv()), {}, ValueError, r"q: .*one head.*\(2, 5, 0, 8\)"),
    (lambda: (q(), None, kv()), {}, TypeError, r"k: .*tensor.*NoneType"),
    (lambda: (q(), [], []), {}, TypeError, r"k: .*non-empty list"),
    (lambda: (q(), kv().double(), kv()), {}, TypeError, r"k: .*float32.*float64"),
    (lambda: (q(), kv(), kv().bfloat16()), {}, TypeError, r"v: .*float32.*bfloat16"),
    (lambda: (q(), kv(2, 9, 2, 7), kv()), {}, ValueError, r"k: .*head dim 8.*7"),
    (lambda: (q(), kv(), kv(2, 9, 2, 16)), {}, ValueError, r"v: .*head dim 8.*16"),
    (lambda: (q(), kv(), kv(2, 8, 2, 8)), {}, ValueError, r"v: .*tokens and heads \(9, 2\).*\(8, 2\)"),
    (lambda: (q(), kv(), kv(2, 9, 1, 8)), {}, ValueError, r"v: .*\(9, 2\).*\(9, 1\)"),
    (lambda: (q(), kv(2, 9, 3, 8), kv(2, 9, 3, 8)), {}, ValueError, r"k: .*4 heads.*multiple.*3"),
    (lambda: (q(), kv(2, 9, 0, 8), kv(2, 9, 0, 8)), {}, ValueError, r"k: .*multiple.*0"),
    (lambda: (q(), kv(3, 9, 2, 8), kv()), {}, ValueError, r"k: .*batch of 2.*3"),
    (lambda: (q(), kv(), kv(3, 9, 2, 8)), {}, ValueError, r"v: .*batch of 2.*3"),
    (lambda: (q(), lists(4, 5), lists(4)), {}, ValueError, r"v: .*as many tensors as k \(2\).*1"),
    (lambda: (q(), lists(4, 5), kv()), {}, ValueError, r"v: .*as many tensors as k"),
    (lambda: (q(), [kv(2, 4, 2, 8), 3], lists(4, 5)), {}, TypeError, r"k\[1\].*tensor.*int"),
    (
        lambda: (q(), [kv(2, 4, 2, 8), kv(2, 5, 1, 8)], [kv(2, 4, 2, 8), kv(2, 5, 1, 8)]),
        {},
        ValueError,
        r"k\[1\].*2 heads",
    ),
    (lambda: (q(), kv(), kv(), {"a": 3}), {}, TypeError, r"control: .*Control.*dict"),
    (lambda: (q(2, 6, 4, 8), kv(), kv(), control()), {}, ValueError, r"control.rows.*5 tokens.*6 rows"),
    (lambda: (q(), kv(2, 8, 2, 8), kv(2, 8, 2, 8), control()), {}, ValueError, r"control.keys.*9 tokens.*8"),
    (
        lambda: (q(), lists(3, 3, 3), lists(3, 3, 3), control()),
        {},
        ValueError,
        r"k: .*per key segment \(2\).*3",
    ),
    (lambda: (q(), lists(5, 4), lists(5, 4), control()), {}, ValueError, r"k: .*'x'.*4 tokens.*5"),
    (
        lambda: (q(), lists(4, 5), lists(4, 5), C(rows(), S(x=ints, y=9 - ints))),
        {},
        ValueError,
        r"control.keys.*item to item.*single",
    ),
    (
        lambda: (q(), kv(), kv(), control(bias={("a", "x"): torch.ones(2)})),
        {},
        ValueError,
        r"control.*\[2\] heads.*4",
    ),
    (
        lambda: (q(), kv(), kv(), control(weight={("a", "x"): torch.ones(3, 4)})),
        {},
        ValueError,
        r"control.*batch of \[3\].*2",
    ),
    (
        lambda: (q(), kv(), kv(), control(gates={"all": torch.ones(3, 5)})),
        {},
        ValueError,
        r"control.*batch of \[3\].*2",
    ),
    (
        lambda: (q(), kv(), kv(), control(valid={"x": torch.tensor([1, 2, 3])})),
        {},
        ValueError,
        r"control.*batch of \[3\].*2",
    ),
    (
        lambda: (q(), kv(), kv(), C(S(a=torch.tensor([1, 2, 3]), b=torch.tensor([4, 3, 2])), keys())),
        {},
        ValueError,
        r"control.*batch of \[3\].*2",
    ),
    (lambda: (q(), kv(), kv()), {"scale": "1"}, TypeError, r"scale: .*number.*str"),
    (lambda: (q(), kv(), kv()), {"scale": True}, TypeError, r"scale: .*number.*bool"),
    (lambda: (q(), kv(), kv()), {"scale": NAN}, ValueError, r"scale: .*finite.*nan"),
    (lambda: (q(), kv(), kv()), {"scale": torch.tensor([1.0, INF])}, ValueError, r"scale: .*finite"),
    (lambda: (q(), kv(), kv()), {"scale": ints}, TypeError, r"scale: .*float tensor.*int64"),
    (lambda: (q(), kv(), kv()), {"scale": torch.ones(3)}, ValueError, r"scale: .*\(2,\) or \(2, 4\).*\(3,\)"),
    (lambda: (q(), kv(), kv()), {"scale": torch.ones(2, 3)}, ValueError, r"scale: .*\(2, 4\).*\(2, 3\)"),
    (
        lambda: (q(), kv(), kv()),
        {"scale": torch.ones(2, requires_grad=True)},
        TypeError,
        r"scale: .*requires grad",
    ),
    (lambda: (q(), kv(), kv()), {"source": [0, 1]}, TypeError, r"source: .*dict.*list"),
    (lambda: (q(), kv(), kv()), source(query=ints), ValueError, r"source: .*q, k and v.*'query'"),
    (lambda: (q(), kv(), kv()), source(q=[0, 1]), ValueError, r"source\['q'\].*1 index tensor.*2"),
    (lambda: (q(), kv(), kv()), source(q=3), TypeError, r"source\['q'\].*tensor \(out_batch,\).*int"),
    (lambda: (q(), kv(), kv()), source(q=torch.tensor([0.0, 1.0])), TypeError, r"source\['q'\].*float32"),
    (lambda: (q(), kv(), kv()), source(k=torch.tensor([[0, 1]])), TypeError, r"source\['k'\].*\(1, 2\)"),
    (lambda: (q(), kv(), kv()), source(q=torch.tensor([0, 2])), ValueError, r"source\['q'\].*0\.\.1.*0\.\.2"),
    (lambda: (q(), kv(), kv()), source(v=torch.tensor([-1, 0])), ValueError, r"source\['v'\].*0\.\.1.*-1"),
    (
        lambda: (q(), kv(), kv()),
        source(q=torch.tensor([0]), k=torch.tensor([0, 1])),
        ValueError,
        r"source: .*differ.*1, 2",
    ),
    (lambda: (q(), kv(), kv()), source(q=torch.tensor([0, 1, 0])), ValueError, r"k: .*batch of 3.*2"),
    (
        lambda: (q(), lists(4, 5), lists(4, 5), control()),
        source(k=[torch.tensor([0, 1])]),
        ValueError,
        r"source\['k'\].*2 index tensors.*1",
    ),
    (lambda: (q(), kv(), kv()), {"mask": "causal"}, TypeError, r"mask: .*bool or float.*str"),
    (
        lambda: (q(), kv(), kv()),
        {"mask": torch.ones(5, 9).long()},
        TypeError,
        r"mask: .*bool or float.*int64",
    ),
    (
        lambda: (q(), kv(), kv()),
        {"mask": torch.ones(9, 5).bool()},
        ValueError,
        r"mask: .*\(2, 4, 5, 9\).*\(9, 5\)",
    ),
    (
        lambda: (q(), kv(), kv()),
        {"mask": torch.ones(1, 2, 4, 5, 9).bool()},
        ValueError,
        r"mask: .*\(1, 2, 4, 5, 9\)",
    ),
    (
        lambda: (q(), kv(), kv()),
        {"mask": torch.ones(5, 9, requires_grad=True)},
        TypeError,
        r"mask: .*requires grad",
    ),
    (
        lambda: (q(), kv(), kv()),
        {"mask": torch.ones(5, 9).bool(), "backend": "cpu"},
        ValueError,
        r"backend: 'cpu'",
    ),
    (lambda: (q(), kv(), kv()), {"backend": "flash"}, ValueError, r"backend: .*'auto'.*composed.*'flash'"),
    (lambda: (q(), kv(), kv()), {"backend": None}, ValueError, r"backend: .*'auto'.*None"),
    (
        lambda: (q(), kv(), kv()),
        {"backend": "triton"},
        ValueError,
        r"backend: 'triton' cannot run this call: ",
    ),
    (
        lambda: (q(), kv(), kv(), control(contrast=fb.Contrast())),
        {"backend": "composed"},
        ValueError,
        r"backend: 'composed'.*clipped contrast",
    ),
    (lambda: (q(), kv(), kv()), {"causal": True}, TypeError, r"causal"),
    (lambda: (q(), kv(), kv()), {"dropout_p": 0.1}, TypeError, r"dropout"),
    (lambda: (q(), kv(), kv()), {"window": (8, 8)}, TypeError, r"window"),
    (lambda: (q(requires_grad=True), kv(), kv()), {}, ValueError, r"out: .*require grad"),
    (
        lambda: (q(requires_grad=True), kv(), kv(), control(contrast=fb.Contrast())),
        {},
        (TypeError, ValueError),
        "contrast|out",
    ),
)

OUTS = (
    (lambda: [1.0], r"out: .*float32 \(2, 5, 4, 8\).*list"),
    (lambda: torch.full((2, 5, 4, 9), NAN), r"out: .*\(2, 5, 4, 8\).*\(2, 5, 4, 9\)"),
    (lambda: torch.full((2, 5, 4, 8), NAN, dtype=torch.bfloat16), r"out: .*float32.*bfloat16"),
    (lambda: torch.full((2, 5, 8, 4), NAN).transpose(2, 3), r"out: .*contiguous last dimension.*strides"),
    (lambda: torch.full((1, 5, 4, 8), NAN).expand(2, -1, -1, -1), r"out: .*share memory.*strides"),
    (lambda: torch.full((2, 5, 4, 8), NAN, requires_grad=True), r"out: .*require grad"),
)


@pytest.mark.parametrize(("make", "error", "words"), (*SEGMENTS, *CONTROL))
def test_bad_segments_and_controls(make: Callable, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize(("arguments", "more", "error", "words"), CALLS)
def test_bad_arguments_of_attention(arguments: Callable, more: dict, error, words: str) -> None:
    out = torch.full((2, 5, 4, 8), NAN)
    with pytest.raises(error, match=words):
        A(*arguments(), out=out, **more)
    assert bool(torch.isnan(out).all())


@pytest.mark.parametrize(("make", "words"), OUTS)
def test_bad_out(make: Callable, words: str) -> None:
    out = make()
    with pytest.raises(ValueError, match=words):
        A(q(), kv(), kv(), out=out)
    assert not isinstance(out, torch.Tensor) or bool(torch.isnan(out).all())


def test_the_same_arguments_pass_without_the_mistake() -> None:
    """So no case above is refused for another reason than the one it names."""
    options = {
        "bias": {("a", "*"): -INF, ("b", ("x", "y")): torch.zeros(2, 4)},
        "weight": {("*", "x"): 0.0, ("a", "y"): torch.ones(4)},
        "gain": {"*": -1.0},
        "head_gain": fb.HeadGain(["a", "b"], "*", apply_to="b"),
        "groups": {"g": ["y"], "h": ("x",), "none": []},
        "gates": {"g": torch.ones(1, 5), "h": torch.ones(2, 5)},
        "valid": {"x": torch.tensor([0, 4], dtype=torch.uint8)},
    }
    more = {"scale": torch.ones(2), "source": source(q=ints - 1)["source"], "mask": torch.ones(9).bool()}
    out = torch.full((2, 5, 4, 8), NAN)
    A(q(), kv(), kv(), control(**options), backend="reference", out=out, **more)
    assert bool(torch.isfinite(out).all())
    A(q(), lists(4, 5), lists(4, 5), control(), backend="reference")
    assert len(SEGMENTS) + len(CONTROL) + len(CALLS) + len(OUTS) >= 150
