"""Parts of a batch, and what a plan sees and attaches: the processor's call against eager arithmetic."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

import flashbrush as fb
from flashbrush.integrations import InContextBrush
from flashbrush.integrations.diffusers import Handle, Layer, Part, Plan, Seen, apply, compose
from flashbrush.integrations.diffusers.protocol import plan_call
from flashbrush.integrations.diffusers.protocol.plan_call import PlanCall

from ...tiny import forward, relative, tiny_call, tiny_flux
from ..tiny_images import sd3_call, tiny_sd3, tiny_unet, unet_call

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
def test_sorted_keys_split_into_groups(several: bool) -> None:
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


def test_extra_keys_of_a_part() -> None:
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


def test_a_part_with_an_attention_of_its_own() -> None:
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


def test_an_attention_of_a_part_keeps_the_shape_of_q() -> None:
    q, k, v = inputs()
    part = Part((0,), attend=lambda q, k, v, backend: q[:, 1:])
    with pytest.raises(ValueError, match=r"Part\.attend: expected a tensor of shape \(1, 12, 2, 8\)"):
        run(Plan(parts=[part]), q, k, v)


def test_queries_that_are_all_the_same_attend_once(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_part_s_transforms_keep_the_shape() -> None:
    q, k, v = inputs()
    for name in ("query", "value"):
        with pytest.raises(ValueError, match=f"Part.{name}"):
            run(Plan(parts=[Part((0,), **{name: lambda x: x[:, 1:]})]), q, k, v)


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


@pytest.mark.parametrize("plain", [True, False])
def test_what_a_plan_sees(plain: bool) -> None:
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


def test_what_is_seen_costs_no_second_attention_where_the_layer_is_plain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    q, k, v = inputs()
    maps: list[Tensor] = []
    from flashbrush.integrations.diffusers.protocol import plan as plan_module

    monkeypatch.setattr(plan_module, "attention", None)
    run(Plan(see=lambda seen: maps.append(seen.probabilities([0]))), q, k, v)
    assert maps[0].shape == (BATCH, HEADS, ROWS, 1)


class Late:
    """A method whose second self-attention follows what its first one saw in the same call."""

    def __init__(self, wrong: bool = False) -> None:
        self.wrong, self.scale = wrong, 0.0

    def plan(self, layer: Layer, step) -> Plan | Callable[[], Plan | None] | None:
        if layer.kind != "self":
            return None
        return (
            Plan(see=self.see)
            if layer.index == 0
            else (lambda: self.decide(layer))
            if layer.index == 2
            else None
        )

    def see(self, seen: Seen) -> None:
        self.scale = float(seen.q.detach().abs().mean())

    def decide(self, layer: Layer) -> Plan | None:
        return Plan(scale=torch.ones(7)) if self.wrong else Plan(scale=self.scale)


def test_a_late_plan_is_made_when_its_layer_is_reached() -> None:
    model = tiny_unet()
    call, method = unet_call(model), Late()
    layers: Any = model.down_blocks
    first, second = (block.attentions[0].transformer_blocks[0].attn1 for block in layers)
    seen: dict[str, Tensor] = {}
    first.to_q.register_forward_hook(lambda module, args, output: seen.update(q=output))
    second.register_forward_hook(lambda module, args, output: seen.update(x=args[0], out=output))
    with apply(model, method), torch.no_grad():
        for scale in (1.0, 2.0):
            model(**(call | {"sample": scale * call["sample"]}))
            assert method.scale == pytest.approx(float(seen["q"].abs().mean()))
            q, k, v = (
                f(seen["x"]).unflatten(-1, (second.heads, -1))
                for f in (second.to_q, second.to_k, second.to_v)
            )
            prob = torch.softmax(torch.einsum("nrhd,nkhd->nhrk", q, k) * method.scale, -1)
            expected = second.to_out[0](torch.einsum("nhrk,nkhd->nrhd", prob, v).flatten(2))
            assert relative(seen["out"], expected) <= TOLERANCE


def test_a_late_plan_is_checked() -> None:
    model = tiny_unet()
    with apply(model, Late(wrong=True)), pytest.raises(ValueError, match="scale"):
        model(**unet_call(model))


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"items": (1,), "gate": math.nan}, "gate: expected a finite number"),
        ({"items": (1,), "key_order": torch.zeros(3)}, "key_order: expected an int64"),
        ({"items": (1,), "attend": 2}, "attend: expected a callable"),
        ({"items": (1,), "attend": abs, "scale": 0.5}, "attend: expected no control, scale,"),
        ({"items": (1,), "value": 3}, "value: expected a callable"),
        (
            {"items": (1,), "extra": {"more": (torch.zeros(1), torch.zeros(1))}},
            "extra: 'more' is no key segment",
        ),
        (
            {
                "items": (1,),
                "source": {"k": [torch.tensor([0])] * 2, "v": [torch.tensor([0])] * 2},
                "value": abs,
            },
            "one index of k and v together with value",
        ),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:20],
)
def test_malformed_parts(fields: dict[str, Any], match: str) -> None:
    with pytest.raises((TypeError, ValueError), match=match):
        Part(**fields)


@pytest.mark.parametrize(
    ("part", "match"),
    [
        (Part((1,), key_order=torch.arange(KEYS + 1)), "Part.key_order: expected a shape"),
        (Part((1,), gate=torch.ones(1, ROWS + 1)), "Part.gate: expected a shape"),
    ],
    ids=["key_order", "gate"],
)
def test_parts_that_do_not_fit_the_layer(part: Part, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Plan(parts=[part]).check(layer())


class Shuffled:
    """A method whose image tokens are projected from each other's hidden states."""

    def __init__(self, kinds: tuple[str, ...]) -> None:
        self.kinds = kinds
        self.shapes: list[tuple[str, tuple[int, ...], int, int]] = []

    def plan(self, layer: Layer, step) -> Plan | None:
        if layer.kind not in self.kinds:
            return None

        def hidden(x: Tensor) -> Tensor:
            self.shapes.append((layer.kind, tuple(x.shape), layer.text_len, layer.image_len))
            text = layer.text_len if layer.kind == "single" else 0
            return torch.cat([x[:, :text], x[:, text:].flip(1)], 1)

        return Plan(hidden=hidden)


@pytest.mark.parametrize("kind", ["double", "single"])
def test_hidden_states_of_flux(kind: str) -> None:
    model = tiny_flux()
    call = tiny_call(model)
    method = Shuffled((kind,))
    with apply(model, method):
        mine = forward(model, call)
    for _, (_, tokens, _), text, image in method.shapes:
        assert tokens == (text + image if kind == "single" else image)

    def flip(module, args, kwargs):
        x, text = kwargs["hidden_states"], 0 if kind == "double" else call["encoder_hidden_states"].shape[1]
        return args, kwargs | {"hidden_states": torch.cat([x[:, :text], x[:, text:].flip(1)], 1)}

    blocks = model.transformer_blocks if kind == "double" else model.single_transformer_blocks
    for block in blocks:
        block.attn.register_forward_pre_hook(flip, with_kwargs=True)  # type: ignore[union-attr]
    assert relative(mine, forward(model, call)) <= 1e-5


def test_hidden_states_of_images() -> None:
    for model, call, attention in (
        (tiny_unet(), unet_call, "attn1"),
        (tiny_sd3(), sd3_call, "attn"),
    ):
        arguments = call(model) if attention == "attn1" else call()
        with apply(model, Shuffled(("self", "joint"))), torch.no_grad():
            mine = model(**arguments, return_dict=False)[0]
        for name, module in model.named_modules():
            if name.endswith(f".{attention}"):
                module.register_forward_pre_hook(_flip, with_kwargs=True)
        with torch.no_grad():
            assert relative(mine, model(**arguments, return_dict=False)[0]) <= 1e-5


def _flip(module, args, kwargs):
    if args:
        return (args[0].flip(1), *args[1:]), kwargs
    return args, kwargs | {"hidden_states": kwargs["hidden_states"].flip(1)}


class Attached:
    """A method that also doubles what the model's output projection is given."""

    def plan(self, layer: Layer, step) -> None: ...

    def attach(self, model: FluxTransformer2DModel) -> list:
        return [model.proj_out.register_forward_pre_hook(lambda module, args: (2 * args[0],))]


def test_what_a_method_attaches_goes_with_it() -> None:
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


def test_what_knows_one_model_controls_the_last_one() -> None:
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
