"""PlanCall: what plans and parts do to q, k and v, against eager arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import flashbrush as fb
from flashbrush.integrations.diffusers import Layer, Part, Plan, Seen
from flashbrush.integrations.diffusers.protocol import plan as plan_module, plan_call
from flashbrush.integrations.diffusers.protocol.plan_call import PlanCall

from ...tiny import relative

BATCH, ROWS, KEYS, HEADS, DIM = 4, 12, 9, 2, 8
TOLERANCE = 2e-6


def inputs(rows: int = ROWS, keys: int = KEYS) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(BATCH, rows, HEADS, DIM, generator=generator)
    k, v = torch.randn(2, BATCH, keys, HEADS, DIM, generator=generator).unbind(0)
    return q, k, v


def run(plan: Plan, q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    plan.check(layer(q.shape[1], k.shape[1], options.get("cross", q.shape[1] != k.shape[1])))
    return PlanCall(plan).attend(q, k, v, **options)


def layer(rows: int = ROWS, keys: int = KEYS, cross: bool = True) -> Layer:
    text = keys if cross else 0
    return Layer(0, "cross" if cross else "self", "up", HEADS, DIM, text, rows, BATCH)


def eager(q: Tensor, k: Tensor, v: Tensor, add: Tensor | float = 0.0) -> Tensor:
    """One item, (rows, heads, dim)"""
    prob = torch.softmax(torch.einsum("rhd,khd->hrk", q, k) / math.sqrt(DIM) + add, -1)
    return torch.einsum("hrk,khd->rhd", prob, v)


# Extra keys


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "by item"])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_extra_keys_at_any_position_match_eager(position: int, shared: bool) -> None:
    q, k, v = inputs()
    more = torch.randn(2, 1 if shared else BATCH, 3, HEADS, DIM).unbind(0)
    names = ["a", "b"]
    names.insert(position, "more")
    lengths = {"a": 4, "b": KEYS - 4, "more": 3}
    segments = fb.Segments({name: lengths[name] for name in names})
    control = fb.Control(fb.Segments(rows=ROWS), segments, bias={("*", "more"): 0.5})
    out = run(Plan(control, extra={"more": more}), q, k, v)
    bias = torch.cat([torch.zeros(KEYS), torch.full((3,), 0.5)])
    for n in range(BATCH):
        own = [torch.cat([t[n], extra[0 if shared else n]]) for t, extra in zip((k, v), more, strict=True)]
        assert relative(out[n], eager(q[n], *own, bias)) <= TOLERANCE


def test_extra_keys_are_read_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = inputs()
    more = torch.randn(1, 3, HEADS, DIM), torch.randn(1, 3, HEADS, DIM)
    seen: dict = {}

    def spy(q: Tensor, k: list[Tensor], v: list[Tensor], control: fb.Control, **options) -> Tensor:
        seen.update(k=k, v=v)
        return fb.attention(q, k, v, control, **options)

    monkeypatch.setattr(plan_call, "attention", spy)
    control = fb.Control(fb.Segments(rows=ROWS), fb.Segments(a=4, b=KEYS - 4, more=3))
    run(Plan(control, extra={"more": more}), q, k, v)
    for name, own, extra in (("k", k, more[0]), ("v", v, more[1])):
        a, b, given = seen[name]
        assert (a.data_ptr(), given.data_ptr()) == (own.data_ptr(), extra.data_ptr())
        assert b.data_ptr() == own.data_ptr() + 4 * own.stride(1) * own.element_size()


def test_extra_keys_are_cast_to_the_layers_dtype() -> None:
    q, k, v = (t.bfloat16() for t in inputs())
    more = torch.randn(1, 3, HEADS, DIM).bfloat16()
    control = fb.Control(fb.Segments(rows=ROWS), fb.Segments(own=KEYS, more=3))
    outs = [run(Plan(control, extra={"more": (m, m)}), q, k, v) for m in (more, more.float())]
    assert torch.equal(*outs)


def test_extra_keys_of_a_part_may_be_made_of_all_items() -> None:
    """The function gets k and v of the whole batch, before Part.value."""
    q, k, v = inputs()
    control = fb.Control(fb.Segments(rows=ROWS), fb.Segments(own=KEYS, copies=2))

    def copies(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        assert key is k and value is v
        return key[:1, :2], value[:1, :2] / 2

    part = Part((1,), control=control, extra={"copies": copies}, value=torch.negative)
    out = run(Plan(parts=[part]), q, k, v)
    assert (
        relative(out[1], eager(q[1], torch.cat([k[1], k[0, :2]]), torch.cat([-v[1], v[0, :2] / 2])))
        <= TOLERANCE
    )
    assert relative(out[0], eager(q[0], k[0], v[0])) <= TOLERANCE


def test_extra_keys_of_a_part_match_eager() -> None:
    q, k, v = inputs()
    more = torch.randn(1, 3, HEADS, DIM), torch.randn(1, 3, HEADS, DIM)
    segments = fb.Segments(first=KEYS, more=3, second=KEYS)
    control = fb.Control(fb.Segments(rows=ROWS), segments, bias={("*", "more"): 0.5})
    index = [torch.tensor([1]), torch.tensor([3])]
    part = Part((2,), {"k": index, "v": index}, control, extra={"more": more})
    out = run(Plan(parts=[part]), q, k, v)
    bias = torch.cat([torch.zeros(KEYS), torch.full((3,), 0.5), torch.zeros(KEYS)])
    joined = [torch.cat([t[1], extra[0], t[3]]) for t, extra in zip((k, v), more, strict=True)]
    assert relative(out[2], eager(q[2], *joined, bias)) <= TOLERANCE
    assert relative(out[1], eager(q[1], k[1], v[1])) <= TOLERANCE


# Parts


def test_an_item_in_several_parts_gets_their_sum() -> None:
    q, k, v = inputs()
    mixed = torch.randn(KEYS, KEYS)

    def mix(x: Tensor) -> Tensor:
        return torch.einsum("ij,njhd->nihd", mixed, x)

    gate = torch.rand(2, ROWS)
    parts = [
        Part((3, 1), {"q": torch.tensor([0, 2]), "k": torch.tensor([0, 2])}, value=mix),
        Part((1,), gate=0.7),
        Part((2, 3), gate=gate),
    ]
    expected = torch.stack([eager(q[n], k[n], v[n]) for n in range(BATCH)])
    plain = expected.clone()
    expected[3] = eager(q[0], k[0], mix(v[[3]])[0]) + gate[1, :, None, None] * plain[3]
    expected[1] = eager(q[2], k[2], mix(v[[1]])[0]) + 0.7 * plain[1]
    expected[2] = gate[0, :, None, None] * plain[2]
    assert relative(run(Plan(parts=parts), q, k, v), expected) <= TOLERANCE


def test_the_sum_has_a_gradient() -> None:
    q, k, v = (t.requires_grad_() for t in inputs())
    plan = Plan(parts=[Part((1, 0), {"k": torch.tensor([2, 3])}), Part((0,), gate=0.5)])
    weights = torch.randn(BATCH, ROWS, HEADS, DIM)
    mine = torch.autograd.grad((run(plan, q, k, v) * weights).sum(), (q, k, v))
    rows = [eager(q[0], k[3], v[0]) + 0.5 * eager(q[0], k[0], v[0]), eager(q[1], k[2], v[1])]
    rows += [eager(q[n], k[n], v[n]) for n in (2, 3)]
    theirs = torch.autograd.grad((torch.stack(rows) * weights).sum(), (q, k, v))
    for a, b in zip(mine, theirs, strict=True):
        assert relative(a, b) <= 1e-5


@pytest.mark.parametrize("several", [False, True], ids=["one mask", "a mask for each item"])
def test_keys_sorted_into_groups_match_eager(several: bool) -> None:
    """Two branches on the keys in and outside of a mask, each key read once."""
    q, k, v = inputs()
    mask = torch.rand(2, KEYS) < 0.5
    mask[0, :2], mask[1, :2] = torch.tensor([True, False]), torch.tensor([False, True])
    masks = mask if several else mask[:1].expand(2, -1)
    segments, order, _ = fb.Segments.from_labels(
        (~masks).int() if several else (~masks[0]).int(), ["fg", "bg"]
    )
    gate = torch.rand(2, ROWS)
    control = fb.Control(
        fb.Segments(rows=ROWS),
        segments,
        groups={"fg": ["fg"], "bg": ["bg"]},
        gates={"fg": gate, "bg": 1 - gate},
    )
    part = Part((1, 3), {"k": torch.tensor([0, 2]), "v": torch.tensor([0, 2])}, control, key_order=order)
    out = run(Plan(parts=[part]), q, k, v)
    for i, (item, read) in enumerate([(1, 0), (3, 2)]):
        fg, bg = (eager(q[item], k[read][chosen], v[read][chosen]) for chosen in (masks[i], ~masks[i]))
        mine = gate[i, :, None, None]
        assert relative(out[item], mine * fg + (1 - mine) * bg) <= TOLERANCE
    assert relative(out[0], eager(q[0], k[0], v[0])) <= TOLERANCE


def test_part_with_its_own_attention_matches_eager() -> None:
    """attend() gets the items' q, k and v after source, query and value; its output is gated."""
    q, k, v = inputs()

    def square(q: Tensor, k: Tensor, v: Tensor, *, backend: str) -> Tensor:
        assert backend == "auto"
        logits = torch.einsum("nrhd,nkhd->nhrk", q, k)
        return torch.einsum("nhrk,nkhd->nrhd", logits * logits, v)

    source = {"q": torch.tensor([3, 1]), "k": torch.tensor([2, 2])}
    part = Part((3, 0), source, query=lambda x: 2 * x, value=lambda x: -x, gate=0.5, attend=square)
    out = run(Plan(parts=[part]), q, k, v)
    assert relative(out[3], 0.5 * square(2 * q[[3]], k[[2]], -v[[3]], backend="auto")[0]) <= TOLERANCE
    assert relative(out[0], 0.5 * square(2 * q[[1]], k[[2]], -v[[0]], backend="auto")[0]) <= TOLERANCE
    assert relative(out[1], eager(q[1], k[1], v[1])) <= TOLERANCE


def test_part_s_attention_that_changes_the_shape_raises() -> None:
    q, k, v = inputs()
    part = Part((0,), attend=lambda q, k, v, backend: q[:, 1:])
    with pytest.raises(ValueError, match=r"Part\.attend: expected a tensor of shape \(1, 12, 2, 8\)"):
        run(Plan(parts=[part]), q, k, v)


def test_equal_queries_attend_once(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = inputs(keys=ROWS)
    seen: list[int] = []

    def spy(query, *args, **options):
        seen.append(query.shape[1])
        return fb.attention(query, *args, **options)

    monkeypatch.setattr(plan_call, "attention", spy)
    part = Part((1, 2), query=lambda x: fb.query_blur(x, (3, 4), math.inf))
    out = run(Plan(parts=[part]), q, k, v, cross=False)
    assert sorted(seen) == [1, ROWS]
    for item in (1, 2):
        assert (
            relative(out[item], eager(q[item].mean(0, keepdim=True).expand(ROWS, -1, -1), k[item], v[item]))
            <= TOLERANCE
        )


# Transforms, order and masks


def test_transforms_that_change_the_shape_raise() -> None:
    q, k, v = inputs()
    for name in ("query", "value"):
        cut = {name: lambda x: x[:, 1:]}
        with pytest.raises(ValueError, match=f"Plan.{name}: expected a tensor of shape"):
            run(Plan(**cut), q, k, v)
        with pytest.raises(ValueError, match=f"Part.{name}: expected a tensor of shape"):
            run(Plan(parts=[Part((0,), **cut)]), q, k, v)


def test_an_order_of_cross_attention_sorts_the_rows_alone() -> None:
    q, k, v = inputs()
    labels = torch.arange(ROWS) % 2
    rows, order, _ = fb.Segments.from_labels(labels, ["even", "odd"])
    control = fb.Control(rows, fb.Segments(a=4, b=KEYS - 4), bias={("odd", "a"): -math.inf})
    out = run(Plan(control, order=order), q, k, v, cross=True)
    cut = torch.zeros(ROWS, KEYS)
    cut[1::2, :4] = -math.inf
    for item in range(BATCH):
        assert relative(out[item], eager(q[item], k[item], v[item], cut)) <= TOLERANCE


PAIR = (torch.zeros(1, 3, HEADS, DIM), torch.zeros(1, 3, HEADS, DIM))
WITH_EXTRA = fb.Control(fb.Segments(rows=ROWS), fb.Segments(own=KEYS, more=3))


@pytest.mark.parametrize(
    ("plan", "what"),
    [
        (Plan(WITH_EXTRA, extra={"more": PAIR}), "extra keys"),
        (Plan(parts=[Part((0,))]), "parts"),
        (Plan(order=torch.arange(ROWS)), "order"),
        (Plan(see=print), "see"),
    ],
    ids=["extra keys", "parts", "order", "see"],
)
def test_a_mask_with_fields_that_cannot_have_one_raises(plan: Plan, what: str) -> None:
    mask = torch.ones(1, 1, 1, KEYS, dtype=torch.bool)
    with pytest.raises(NotImplementedError, match=f"attention_mask together with a plan's {what}"):
        run(plan, *inputs(), mask=mask)


# Seen


@pytest.mark.parametrize("plain", [True, False])
def test_see_receives_q_k_v_and_columns_of_the_map(plain: bool) -> None:
    q, k, v = inputs()
    seen: list[Seen] = []
    plan = Plan(see=seen.append, parts=() if plain else [Part((0,), {"k": torch.tensor([1])})])
    out = run(plan, q, k, v)
    prob = torch.softmax(torch.einsum("nrhd,nkhd->nhrk", q, k) / math.sqrt(DIM), -1)
    assert seen[0].q is q and seen[0].k is k and seen[0].v is v
    assert relative(seen[0].probabilities([5, 2]), prob[..., [5, 2]]) <= TOLERANCE
    assert relative(seen[0].column_mass(), prob.sum(2)) <= TOLERANCE
    read = k[[1, 1, 2, 3]] if not plain else k
    assert relative(out, torch.stack([eager(q[n], read[n], v[n]) for n in range(BATCH)])) <= TOLERANCE


def test_see_costs_no_second_attention_where_the_layer_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = inputs()
    maps: list[Tensor] = []
    monkeypatch.setattr(plan_module, "attention", None)
    run(Plan(see=lambda seen: maps.append(seen.probabilities([0]))), q, k, v)
    assert maps[0].shape == (BATCH, HEADS, ROWS, 1)
