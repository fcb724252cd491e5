"""What every host must do, once per entry of entries.py."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention
from torch import Tensor

import flashbrush as fb
from flashbrush.integrations.diffusers import Handle, Layer, Part, Plan, Step, apply
from flashbrush.integrations.diffusers.hosts.registry import find_host

from ...methods.eager import plain, run, sites_of, worst_layer
from ...tiny import relative
from .entries import ENTRIES, Entry
from .plans import BATCH, CASES

TOLERANCE = 1e-5  # float32, relative to the largest output


@pytest.fixture(params=ENTRIES)
def host(request: pytest.FixtureRequest) -> Entry:
    return ENTRIES[request.param]


class CountingBackend:
    """A torch.compile backend that runs graphs as they are and counts them."""

    count = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        self.count += 1
        return graph.forward


@pytest.fixture
def recompilations() -> Iterator[CountingBackend]:
    torch._dynamo.reset()
    yield CountingBackend()
    torch._dynamo.reset()


class Weighted:
    """A method: the first third of the keys has a weight of its own for the last rows; 1 is neutral."""

    def __init__(self, weight: float = 3.0) -> None:
        self.weight = weight
        self.asked: list[tuple[Layer, Step]] = []

    def plan(self, layer: Layer, step: Step) -> Plan:
        self.asked.append((layer, step))
        rows = fb.Segments(first=layer.rows // 2, last=layer.rows - layer.rows // 2)
        keys = fb.Segments(heavy=layer.keys // 3, other=layer.keys - layer.keys // 3)
        return Plan(fb.Control(rows, keys, weight={("last", "heavy"): self.weight}))


class Swapped:
    """A method: the last item reads the keys of item 0 in a call of its own."""

    def plan(self, layer: Layer, step: Step) -> Plan:
        return Plan(parts=[Part((layer.batch - 1,), {"k": torch.tensor([0])}, scale=0.2)])


class OnePlan:
    """A method that makes its plan with a function of the layer."""

    def __init__(self, plan: Callable[[Layer], Plan]) -> None:
        self.make = plan

    def plan(self, layer: Layer, step: Step) -> Plan:
        return self.make(layer)


def processors(model: Any) -> list[Any]:
    return list(model.attn_processors.values())


def in_dtype(call: dict, dtype: torch.dtype) -> dict:
    floats = {n: t for n, t in call.items() if isinstance(t, Tensor) and t.is_floating_point()}
    return call | {n: t.to(dtype) for n, t in floats.items() if not n.endswith("ids")}


# A drop-in


VARIANTS = [(name, variant) for name, entry in ENTRIES.items() for variant in ("default", *entry.variants)]


def build(name: str, variant: str) -> Any:
    entry = ENTRIES[name]
    return entry.model() if variant == "default" else entry.variants[variant]()


@pytest.mark.parametrize(("name", "variant"), VARIANTS, ids=[", ".join(case) for case in VARIANTS])
@pytest.mark.parametrize("batch", [1, 3])
def test_plain_equals_the_stock_model_and_removal_restores_it(name: str, variant: str, batch: int) -> None:
    host = ENTRIES[name]
    model = build(name, variant)
    call, before, keys = host.call(model, batch), processors(model), set(model.state_dict())
    stock = run(model, call)
    handle = apply(model)
    assert Handle.of(model) is handle and set(model.state_dict()) == keys
    assert {type(p) for p in processors(model)} == {host.processor}
    assert relative(run(model, call), stock) <= TOLERANCE and handle.stats == []
    handle.remove()
    handle.remove()
    assert all(a is b for a, b in zip(processors(model), before, strict=True))
    assert Handle.of(model) is None and not model._forward_hooks and not model._forward_pre_hooks
    assert torch.equal(run(model, call), stock)


@pytest.mark.parametrize(("name", "variant"), VARIANTS, ids=[", ".join(case) for case in VARIANTS])
def test_every_kind_of_layer_affects_the_output(name: str, variant: str) -> None:
    """Otherwise equal outputs would not show that the layers are equal."""
    model = build(name, variant)
    call = ENTRIES[name].call(model, 2)
    stock = run(model, call)
    for kind in {site.kind for site in find_host(model).sites(model)}:
        with apply(model, OnePlan(lambda layer: Plan(query=torch.zeros_like)), layers=kind):
            assert relative(run(model, call), stock) > 1e-3, kind


def test_signature_is_the_stock_processor_s(host: Entry) -> None:
    stock, mine = (
        {n: p.default for n, p in inspect.signature(c.__call__).parameters.items() if "args" not in n}
        for c in (host.stock, host.processor)
    )
    assert mine == stock and list(mine) == list(stock)


def test_fused_projections_equal_the_stock_model(host: Entry) -> None:
    model = host.fusable()
    call = host.call(model, 2)
    stock = run(model, call)
    model.fuse_qkv_projections()
    fused = run(model, call)
    with apply(model):
        assert relative(run(model, call), fused) <= TOLERANCE
    assert {type(p) for p in processors(model)} == {host.fused}
    model.unfuse_qkv_projections()
    for module in model.modules():  # the stock model may leave the fused weights behind
        for name in ("to_qkv", "to_kv", "to_added_qkv"):
            if isinstance(module, Attention | AttentionModuleMixin) and hasattr(module, name):
                getattr(module, name).weight.data.fill_(torch.nan)
    with apply(model):
        assert relative(run(model, call), stock) <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits_err_no_more_than_the_stock_model(host: Entry, dtype: torch.dtype) -> None:
    model = host.model()
    call = host.call(model, 2)
    truth = run(model, call)
    model.to(dtype)
    stock = relative(run(model, in_dtype(call, dtype)).float(), truth)
    with apply(model):
        mine = run(model, in_dtype(call, dtype))
    assert mine.dtype == dtype and relative(mine.float(), truth) <= 1.5 * stock


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_autocast_errs_no_more_than_the_stock_model(host: Entry) -> None:
    model = host.model()
    call = host.call(model, 2)
    truth = run(model, call)
    with torch.autocast("cpu", torch.bfloat16):
        stock = relative(run(model, call).float(), truth)
        for method in (None, Weighted(1.0)):
            with apply(model, method):
                assert relative(run(model, call).float(), truth) <= 1.5 * stock


def test_attention_mask_equals_the_stock_model_or_raises(host: Entry) -> None:
    model = host.model()
    call = host.call(model, 2)
    if host.masked is None:
        call[host.processor_kwargs] = {"attention_mask": torch.zeros(2, 1, 1, 1)}
        with apply(model), pytest.raises(NotImplementedError, match="attention_mask"):
            run(model, call)
        return
    masked = host.masked(model, call)
    stock = run(model, masked)
    assert relative(stock, run(model, call)) > 1e-3
    with apply(model):
        assert relative(run(model, masked), stock) <= TOLERANCE
    with apply(model, Weighted(1.0), backend="composed"):
        assert relative(run(model, masked), stock) <= TOLERANCE
    with apply(model, Swapped()), pytest.raises(NotImplementedError, match="attention_mask together"):
        run(model, masked)


def test_lora_acts_under_control(host: Entry) -> None:
    peft = pytest.importorskip("peft")
    model = host.model()
    call = host.call(model, 2)
    halved = call | {host.processor_kwargs: {"scale": 0.5}}
    with apply(model, Weighted()):
        controlled = run(model, call)
        model.add_adapter(peft.LoraConfig(r=4, target_modules=host.lora, init_lora_weights=False))
        adapted = run(model, call)
        assert relative(adapted, controlled) > 1e-3
        assert relative(run(model, halved), adapted) > 1e-3
        model.disable_adapters()
        assert torch.equal(run(model, call), controlled)
        model.enable_adapters()
    stock, stock_half = run(model, call), run(model, halved)
    with apply(model):
        assert relative(run(model, call), stock) <= TOLERANCE
        assert relative(run(model, halved), stock_half) <= TOLERANCE


@pytest.mark.parametrize("sequential", [False, True], ids=["model", "layer by layer"])
def test_offloading_does_not_change_the_output(host: Entry, sequential: bool) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = host.model()
    call = host.call(model, 2)
    with apply(model, Weighted()):
        expected = run(model, call)
    if sequential:  # the weights of a layer are on "meta" until its hook brings them
        accelerate.cpu_offload(model, torch.device("cpu"))
    else:
        model, _ = accelerate.cpu_offload_with_hook(model, torch.device("cpu"))
    with apply(model, Weighted()):
        assert relative(run(model, call), expected) <= TOLERANCE


@pytest.mark.parametrize("way", ["deep copy", "pickle"])
def test_a_copy_of_the_model_has_its_own_control(host: Entry, way: str) -> None:
    model = host.model()
    call = host.call(model, 2)
    stock = run(model, call)
    with apply(model, Weighted()) as handle:
        controlled = run(model, call)
        assert relative(controlled, stock) > 1e-3
        twin = copy.deepcopy(model) if way == "deep copy" else pickle.loads(pickle.dumps(model))
    own = Handle.of(twin)
    assert own is not None and own is not handle
    assert torch.equal(run(twin, call), controlled) and torch.equal(run(model, call), stock)
    own.remove()
    assert torch.equal(run(twin, call), stock)


# Plans


@pytest.mark.parametrize("case", CASES)
def test_a_plan_equals_its_eager_form(host: Entry, case: str) -> None:
    model = host.model()
    call = host.call(model, BATCH)
    with apply(model, OnePlan(CASES[case].plan)):
        assert worst_layer(model, call, CASES[case].core) <= TOLERANCE
        out = run(model, call)
    assert relative(out, run(model, call)) > 1e-3


def test_an_empty_plan_is_plain_attention(host: Entry) -> None:
    model = host.model()
    with apply(model, OnePlan(lambda layer: Plan())):
        assert worst_layer(model, host.call(model, 2), plain) <= TOLERANCE


def test_method_receives_the_layers_and_steps_of_the_model(host: Entry) -> None:
    model, method = host.model(), Weighted()
    with apply(model, method) as handle:
        run(model, host.call(model, 2))
        run(model, host.call(model, 2))
        handle.set_step(5, 9, 0.25)
        run(model, host.call(model, 3))
    layers, steps = zip(*method.asked, strict=True)
    count = len(host.kinds)
    assert [layer.index for layer in layers[:count]] == list(range(count))
    assert [layer.kind for layer in layers] == host.kinds * (len(layers) // count)
    assert [step.index for step in steps[: 2 * count]] == [0] * count + [1] * count
    assert steps[-1] == Step(5, 9, 0.25) and layers[-1].batch == 3
    for layer, image_len, site in zip(layers[:count], host.image_lens, sites_of(model), strict=True):
        text_len = 0 if layer.kind == "self" else host.text_len
        assert (layer.text_len, layer.image_len, layer.batch) == (text_len, image_len, 2)
        assert layer.heads * layer.head_dim == site.attn.inner_dim
        assert layer.grid is None or layer.grid[0] * layer.grid[1] == image_len


def test_layers_are_selected_by_kind_and_by_index(host: Entry) -> None:
    model, method = host.model(), Weighted()
    kind = host.kinds[-1]
    expected = [i for i, k in enumerate(host.kinds) if k == kind or i == 1]
    with apply(model, method, layers=[kind, 1], stats=True) as handle:
        run(model, host.call(model, 2))
        assert [layer.index for layer, _ in method.asked] == expected
        assert [(r.layer, r.kind) for r in handle.stats] == [(i, host.kinds[i]) for i in expected]


def test_statistics_have_one_record_per_controlled_call(host: Entry) -> None:
    """The mass of a row segment is its number of rows; parts have their own records."""
    model, method = host.model(), Weighted()
    with apply(model, method, stats=("lse", "mass")) as handle:
        run(model, host.call(model, 2))
        records = handle.stats
    assert [(r.step, r.layer, r.items) for r in records] == [(0, i, None) for i in range(len(host.kinds))]
    for record, (layer, _) in zip(records, method.asked, strict=True):
        assert record.stats.lse.shape == (2, layer.heads, layer.rows, 1) and not record.stats.gain.numel()
        rows = torch.tensor([float(layer.rows // 2), float(layer.rows - layer.rows // 2)])
        torch.testing.assert_close(record.stats.mass.sum(3), rows.expand(2, layer.heads, 2))

    def in_a_part(layer: Layer) -> Plan:
        tables = fb.Control(fb.Segments(rows=layer.rows), fb.Segments(keys=layer.keys))
        return Plan(parts=[Part((1,), control=tables)])

    with apply(model, OnePlan(in_a_part), stats=True) as handle:
        run(model, host.call(model, 2))
        assert [record.items for record in handle.stats] == [(1,)] * len(host.kinds)


# Gradients


def gradient(host: Entry, model: Any, call: dict) -> Tensor:
    image = call[host.image].detach().requires_grad_()
    out = model(**call | {host.image: image}, return_dict=False)[0]
    return torch.autograd.grad(out.square().sum(), image)[0]


def test_gradients_equal_the_stock_model_and_the_reference_backend(host: Entry) -> None:
    model = host.model().requires_grad_(False)
    call = host.call(model, 2)
    stock = gradient(host, model, call)
    for method in (None, Weighted(1.0)):
        with apply(model, method):
            assert relative(gradient(host, model, call), stock) <= 1e-4
    with apply(model, Swapped()):
        swapped = gradient(host, model, call)
    with apply(model, Swapped(), backend="reference"):
        assert relative(gradient(host, model, call), swapped) <= 1e-4
    assert relative(swapped, stock) > 1e-3


def test_gradient_checkpointing_keeps_plans_and_gradients(host: Entry) -> None:
    """The backward pass runs layers again with the same plans, and leaves no statistics."""
    model = host.model().requires_grad_(False)
    call = host.call(model, 2)
    with apply(model, Weighted()):
        expected = gradient(host, model, call)
    model.train()
    model.enable_gradient_checkpointing()
    with apply(model, Weighted(), stats=True) as handle:
        for step in (0, 1):
            assert relative(gradient(host, model, call), expected) <= TOLERANCE
            assert [r.step for r in handle.stats] == [s for s in range(step + 1) for _ in host.kinds]


# torch.compile


def test_compiled_blocks_share_compilations(host: Entry, recompilations: CountingBackend) -> None:
    """Compiled without graph breaks, and not again for other numbers, methods' objects or steps."""
    model = host.model()
    call, expected = host.call(model, 2), []
    for weight in (3.0, 0.2):
        with apply(model, Weighted(weight)):
            expected.append(run(model, call))
    for block in host.blocks(model):
        block.compile(fullgraph=True, backend=recompilations)
    with apply(model, Weighted(3.0), stats=True) as handle:
        assert relative(run(model, call), expected[0]) <= TOLERANCE
        assert 0 < recompilations.count <= host.compilations
        before = recompilations.count
        handle.method = Weighted(0.2)
        handle.set_step(7, 20, 0.3)
        assert relative(run(model, call), expected[1]) <= TOLERANCE
        assert recompilations.count == before and len(handle.stats) == 2 * len(host.kinds)


def test_whole_model_compiled_equals_eager(host: Entry, recompilations: CountingBackend) -> None:
    """Its wrapper before apply(), itself before apply(), and its wrapper after, with prepare()."""
    model = host.whole()
    call = host.call(model, 2)
    with apply(model, Swapped()):
        expected = run(model, call)
    wrapped = torch.compile(model, backend=recompilations)
    with apply(wrapped, Swapped()):
        assert relative(run(wrapped, call), expected) <= TOLERANCE
    torch._dynamo.reset()
    with apply(model, Weighted()):
        expected = run(model, call)
    with apply(model, Weighted(), stats=True) as handle:
        wrapped = torch.compile(model, backend=recompilations)
        with pytest.raises(RuntimeError, match=r"call handle\.prepare"):
            run(wrapped, call)
        torch._dynamo.reset()
        handle.prepare(**host.sizes, batch=2)
        assert relative(run(wrapped, call), expected) <= TOLERANCE
        assert [r.layer for r in handle.stats] == list(range(len(handle.stats))) and handle.stats


# What it refuses


def test_foreign_processors_are_refused(host: Entry) -> None:
    model = host.model()
    host.foreign(model)
    before = processors(model)
    with pytest.raises(TypeError, match=r"model: layer \d+ .* has a \w+, which apply\(\) would replace"):
        apply(model)
    assert all(a is b for a, b in zip(processors(model), before, strict=True))


def test_model_with_a_control_is_refused(host: Entry) -> None:
    model = host.model()
    with apply(model), pytest.raises(RuntimeError, match="already has a flashbrush control"):
        apply(model)


def test_processors_replaced_under_control_raise_and_stay(host: Entry) -> None:
    model = host.model()
    handle = apply(model, Weighted())
    host.foreign(model)
    mine = processors(model)
    with pytest.raises(RuntimeError, match="were replaced after apply"):
        run(model, host.call(model, 2))
    handle.remove()
    kept = [p for p in mine if type(p) is not host.processor]
    assert kept and all(any(p is q for q in processors(model)) for p in kept)


def test_processors_put_back_after_removal_are_plain(host: Entry) -> None:
    model = host.model()
    call = host.call(model, 2)
    stock = run(model, call)
    handle = apply(model, Weighted())
    saved = model.attn_processors
    handle.remove()
    model.set_attn_processor(saved)
    assert relative(run(model, call), stock) <= TOLERANCE
    with apply(model, Weighted()):
        assert relative(run(model, call), stock) > 1e-3
    assert host.processor not in {type(p) for p in processors(model)}


def test_context_parallelism_raises(host: Entry) -> None:
    model = host.model()
    handle = apply(model)
    processors(model)[0]._parallel_config = SimpleNamespace(context_parallel_config=object())
    with pytest.raises(NotImplementedError, match="context parallelism"):
        run(model, host.call(model, 2))
    handle.remove()
    model._parallel_config = SimpleNamespace(context_parallel_config=object(), tensor_parallel_config=None)
    with pytest.raises(NotImplementedError, match="context parallelism"):
        apply(model)


def test_prepare_refuses_sizes_that_the_model_does_not_take(host: Entry) -> None:
    handle = apply(host.model(), Weighted())
    image = {n: size for n, size in host.sizes.items() if n != "text_len"}
    for sizes in ({}, host.other_sizes, host.other_sizes | image):
        with pytest.raises(ValueError, match=f"prepare: .* needs {next(iter(image))}"):
            handle.prepare(text_len=host.text_len, **sizes)
    handle.prepare(**host.sizes)


def test_plan_that_does_not_fit_the_layer_raises(host: Entry) -> None:
    model = host.model()
    wrong = OnePlan(lambda layer: Plan(fb.Control(fb.Segments(all=layer.rows + 1))))
    with apply(model, wrong), pytest.raises(ValueError, match=r"Plan\.control\.rows: \d+ tokens for layer 0"):
        run(model, host.call(model, 2))
