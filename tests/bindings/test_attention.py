"""Properties of controlled attention on both torch backends, and what attention() itself promises."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import flashbrush as fb
from support.oracle import OracleCall
from support.oracle_calls import library_attention, random_oracle_call, without_clip

BACKENDS = ("reference", "composed")
SEEDS = range(2000, 2060)


def random_call(seed: int, without: tuple[str, ...] = (), contrast: bool = False) -> OracleCall:
    """Without the named options; contrast: keep it, unclipped."""
    call = random_oracle_call(seed)
    for name in (*without, *(() if contrast else ("contrast",))):
        call.options.pop(name, None)
    return without_clip(call)


def assert_close(a: Tensor, b: Tensor, tolerance: float = 1e-6) -> None:
    assert bool(torch.isfinite(a).all()) or not bool(torch.isfinite(b).all())
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def with_joined_keys(call: OracleCall) -> OracleCall:
    """k and v as single tensors of the output batch, sources applied to them."""
    batch = max(t.shape[0] for t in (*call.k, *call.v))

    def join(ts: list[Tensor], index: list[Tensor] | None) -> Tensor:
        return torch.cat(
            [t.expand(batch, *t.shape[1:]) if index is None else t[index[i]] for i, t in enumerate(ts)], 1
        )

    new = copy.copy(call)
    new.k, new.v = [join(call.k, call.source.get("k"))], [join(call.v, call.source.get("v"))]
    new.source = {"q": call.source["q"]} if call.source else {}
    return new


def token_labels(names: list[str], sizes: list[list[int]]) -> Tensor:
    """(batch, tokens): the index of each token's segment."""
    counts = torch.tensor(sizes)
    return torch.stack([torch.repeat_interleave(torch.arange(len(names)), c) for c in counts])


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("backend", BACKENDS)
def test_plain_call_equals_sdpa(backend: str, dtype: torch.dtype) -> None:
    for B, M, N, H, Hkv, D in (
        (1, 5, 5, 1, 1, 1),
        (2, 33, 70, 4, 2, 24),
        (3, 1, 129, 3, 3, 64),
        (1, 64, 1, 2, 1, 40),
    ):
        q, k, v = (
            torch.randn(B, M, H, D, dtype=dtype),
            *(torch.randn(B, N, Hkv, D, dtype=dtype) for _ in range(2)),
        )
        truth = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), enable_gqa=True)
        assert_close(fb.attention(q, k, v, backend=backend), truth.transpose(1, 2), 2e-6)
        segments = fb.Segments(a=N // 2, b=N - N // 2)
        split = fb.Control(fb.Segments(rows=M), segments)
        assert_close(fb.attention(q, k, v, split, backend=backend), truth.transpose(1, 2), 2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_sum_to_one_in_each_group(backend: str) -> None:
    for seed in SEEDS:
        call = random_call(seed, without=("weight", "gain", "head_gain", "gates"))
        call.v = [torch.ones_like(t) for t in call.v]
        out, stats = library_attention(call, backend, return_stats=True)
        groups = (stats.lse != -math.inf).sum(-1)  # (B, H, M)
        assert_close(out, groups.transpose(1, 2)[..., None].expand_as(out).to(out.dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_mass_of_a_row_is_the_number_of_its_groups_with_a_key(backend: str) -> None:
    for seed in SEEDS:
        call = random_call(seed)
        stats = library_attention(call, backend, return_stats=True)[1]
        label = token_labels(call.row_names, call.row_sizes)  # (B, M)
        groups = (stats.lse != -math.inf).sum(-1).to(stats.mass.dtype)
        expected = torch.zeros(stats.mass.shape[:3], dtype=stats.mass.dtype)
        expected.scatter_add_(2, label[:, None].expand_as(groups), groups)
        assert_close(stats.mass.sum(-1), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_neutral_table_entries_change_nothing(backend: str) -> None:
    for seed in SEEDS:
        call = random_call(seed, without=("weight", "bias", "gain", "gates", "valid"), contrast=True)
        plain = library_attention(call, backend, return_stats=True)
        group = next(iter(call.options.get("groups", {"all": 0})))
        call.options |= {
            "weight": {("*", call.key_names[0]): 1.0},
            "bias": {(call.row_names[-1], "*"): 0.0},
            "gain": {call.row_names[0]: 1.0},
            "gates": {group: 1.0},
            "valid": {call.key_names[-1]: torch.tensor([s[-1] for s in call.key_sizes])},
        }
        out, stats = library_attention(call, backend, return_stats=True)
        for a, b in zip((plain[0], *plain[1]), (out, *stats), strict=True):
            assert_close(a, b, 1e-6 if backend == "composed" else 1e-12)


def without_segment(call: OracleCall, name: str) -> OracleCall:
    """The call without the keys of a segment, which stays as an empty one."""
    c, new = call.key_names.index(name), copy.copy(with_joined_keys(call))
    keep = token_labels(call.key_names, call.key_sizes) != c  # (B, N)
    new.k, new.v = ([t[:, keep[0]] for t in ts] for ts in (new.k, new.v))
    if new.mask is not None:
        new.mask = new.mask[..., keep[0]]
    new.key_sizes = [[0 if i == c else n for i, n in enumerate(s)] for s in call.key_sizes]
    new.options = {k: v for k, v in call.options.items() if k != "valid"}
    new.options["valid"] = {n: t for n, t in call.options.get("valid", {}).items() if n != name}
    return new


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_with_bias_minus_inf_are_removed_and_not_read(backend: str) -> None:
    tried = 0
    for seed in SEEDS:
        call = random_call(seed, contrast=True)
        if any(s != call.key_sizes[0] for s in call.key_sizes) or call.source or call.mask is not None:
            continue
        name = call.key_names[seed % len(call.key_names)]
        c = call.key_names.index(name)
        gone = token_labels(call.key_names, call.key_sizes)[0] == c
        if not gone.any() or gone.all():
            continue
        tried += 1
        cut = with_joined_keys(call)
        cut.options = {**call.options, "bias": {**call.options.get("bias", {}), ("*", name): -math.inf}}
        truth = library_attention(without_segment(cut, name), backend, return_stats=True)
        cut.k, cut.v = ([t.masked_fill(gone[:, None, None], math.nan) for t in ts] for ts in (cut.k, cut.v))
        heads = call.q.shape[2]
        for value in (
            -math.inf,
            torch.full((heads,), -math.inf),
        ):  # a number is known when the call is lowered, a tensor's entries are not
            cut.options["bias"]["*", name] = value
            out, stats = library_attention(cut, backend, return_stats=True)
            assert bool(torch.isfinite(out).all())
            assert_close(out, truth[0])
            assert_close(stats.lse, truth[1].lse)
            assert_close(stats.mass, truth[1].mass)
    assert tried >= 12


@pytest.mark.parametrize("backend", BACKENDS)
def test_invalid_keys_are_not_read(backend: str) -> None:
    torch.manual_seed(3)
    q, k, v = torch.randn(2, 7, 2, 8), torch.randn(2, 9, 2, 8), torch.randn(2, 9, 2, 8)
    count = torch.tensor([1, 3])
    control = fb.Control(fb.Segments(r=7), fb.Segments(a=4, b=5), valid={"a": count})
    for b in range(2):
        k[b, count[b] : 4], v[b, count[b] : 4] = math.nan, math.inf
    out = fb.attention(q, k, v, control, backend=backend)
    assert bool(torch.isfinite(out).all())
    for b in range(2):
        keep = [*range(int(count[b])), *range(4, 9)]
        assert_close(
            out[b : b + 1],
            fb.attention(q[b : b + 1], k[b : b + 1, keep], v[b : b + 1, keep], backend=backend),
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_a_key_reaches_only_rows_that_attend_to_it(backend: str) -> None:
    q, k, v = torch.randn(1, 6, 2, 8), torch.randn(1, 9, 2, 8), torch.randn(1, 9, 2, 8)
    rows, keys = fb.Segments(see=2, blind=4), fb.Segments(a=4, b=5)
    control = fb.Control(rows, keys, bias={("blind", "b"): -math.inf})
    clean = fb.attention(q, k, v, control, backend=backend)
    k[:, 6], v[:, 7] = math.nan, math.inf
    out = fb.attention(q, k, v, control, backend=backend)
    assert bool(torch.isnan(out[:, :2]).any(-1).all())
    assert_close(out[:, 2:], clean[:, 2:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_weight_zero_keeps_keys_in_the_sum_without_reading_values(backend: str) -> None:
    q, k, v = torch.randn(1, 6, 2, 8), torch.randn(1, 9, 2, 8), torch.randn(1, 9, 2, 8)
    keys = fb.Segments(a=4, b=5)
    control = fb.Control(fb.Segments(r=6), keys, weight={("*", "b"): 0.0})
    kept = v.clone()
    kept[:, 4:] = 0
    truth = fb.attention(q, k, kept, backend="reference")
    v[:, 5] = math.nan
    assert_close(fb.attention(q, k, v, control, backend=backend), truth)


@pytest.mark.parametrize("where", ("q", "k", "v"))
@pytest.mark.parametrize("value", (math.nan, math.inf, -math.inf))
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_inf_in_allowed_keys_propagate_as_in_sdpa(backend: str, value: float, where: str) -> None:
    tensors = {name: torch.randn(1, 70, 2, 16) for name in "qkv"}
    tensors[where][0, 37, 1, 3] = value
    q, k, v = tensors.values()
    truth = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
    for control in (None, fb.Control(fb.Segments(a=30, b=40))):
        out = fb.attention(q, k, v, control, backend=backend)
        torch.testing.assert_close(out, truth, rtol=2e-6, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_permuting_segments_permutes_the_result(backend: str) -> None:
    for seed in SEEDS:
        call = random_call(seed, contrast=True)
        if any(len({tuple(s) for s in sizes}) > 1 for sizes in (call.row_sizes, call.key_sizes)):
            continue
        out, stats = library_attention(call, backend, return_stats=True)
        generator = torch.Generator().manual_seed(seed)
        row_order, key_order = (
            torch.randperm(len(n), generator=generator) for n in (call.row_names, call.key_names)
        )
        moved = with_joined_keys(call)
        rows, keys = (
            torch.cat([(token_labels(names, sizes)[0] == s).nonzero()[:, 0] for s in order])
            for names, sizes, order in (
                (call.row_names, call.row_sizes, row_order),
                (call.key_names, call.key_sizes, key_order),
            )
        )
        moved.q, moved.k, moved.v = call.q[:, rows], [moved.k[0][:, keys]], [moved.v[0][:, keys]]
        moved.row_names, moved.key_names = (
            [call.row_names[i] for i in row_order],
            [call.key_names[i] for i in key_order],
        )
        moved.row_sizes = [[s[i] for i in row_order] for s in call.row_sizes]
        moved.key_sizes = [[s[i] for i in key_order] for s in call.key_sizes]
        moved.options = dict(call.options)
        if "gates" in call.options:
            gates = call.options["gates"]
            moved.options["gates"] = {n: g[:, rows] if isinstance(g, Tensor) else g for n, g in gates.items()}
        if call.mask is not None:
            moved.mask = call.mask[:, :, rows][..., keys]
        again, again_stats = library_attention(moved, backend, return_stats=True)
        assert_close(again, out[:, rows])
        assert_close(again_stats.lse, stats.lse[:, :, rows])
        assert_close(again_stats.mass, stats.mass[:, :, row_order][..., key_order])


def split(sizes: list[list[int]], at: int) -> list[list[int]]:
    """Sizes with the segment of that index cut into two halves."""
    return [[*s[:at], s[at] // 2, s[at] - s[at] // 2, *s[at + 1 :]] for s in sizes]


@pytest.mark.parametrize("backend", BACKENDS)
def test_splitting_a_segment_changes_nothing(backend: str) -> None:
    for seed in SEEDS:
        call = random_call(seed, without=("valid",), contrast=True)
        call = with_joined_keys(call)
        out, stats = library_attention(call, backend, return_stats=True)
        r, c = seed % len(call.row_names), seed % len(call.key_names)
        fine, row, key = copy.copy(call), call.row_names[r], call.key_names[c]
        fine.row_names = [x for n in call.row_names for x in ([n, "row2"] if n == row else [n])]
        fine.key_names = [x for n in call.key_names for x in ([n, "key2"] if n == key else [n])]
        fine.row_sizes, fine.key_sizes = split(call.row_sizes, r), split(call.key_sizes, c)
        options = dict(call.options)
        for name in ("bias", "weight"):
            entries = {}
            for (a, b), value in call.options.get(name, {}).items():
                for a2 in (a, "row2") if a == row else (a,):
                    for b2 in (b, "key2") if b == key else (b,):
                        entries[a2, b2] = value
            options[name] = entries
        if row in options.get("gain", {}):
            options["gain"] = {**options["gain"], "row2": options["gain"][row]}
        if "groups" in options:
            options["groups"] = {g: [*m, "key2"] if key in m else m for g, m in options["groups"].items()}
        if "head_gain" in options:
            rule = options["head_gain"]
            parts = {
                "rows": (rule.rows, row, "row2"),
                "keys": (rule.keys, key, "key2"),
                "apply_to": (rule.apply_to, row, "row2"),
            }
            wider = {
                k: v if v == "*" else [*([v] if isinstance(v, str) else v), *([new] if old in v else [])]
                for k, (v, old, new) in parts.items()
            }
            options["head_gain"] = fb.HeadGain(**wider, span=rule.span, floor=rule.floor, norm=rule.norm)
        fine.options = options
        again, fine_stats = library_attention(fine, backend, return_stats=True)
        assert_close(again, out)
        # Without statistics the planner joins the halves again.
        assert_close(library_attention(fine, backend), out)
        assert_close(fine_stats.lse, stats.lse)
        merge_rows = [r if n == "row2" else call.row_names.index(n) for n in fine.row_names]
        merge_keys = [c if n == "key2" else call.key_names.index(n) for n in fine.key_names]
        mass = (
            torch.zeros_like(stats.mass[..., :1])
            .expand(-1, -1, -1, len(fine.key_names))
            .index_add(2, torch.tensor(merge_rows), fine_stats.mass)
        )
        assert_close(torch.zeros_like(stats.mass).index_add(3, torch.tensor(merge_keys), mass), stats.mass)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sources_equal_copies_and_lists_equal_concatenations(backend: str) -> None:
    for seed in SEEDS:
        call = random_call(seed, contrast=True)
        if not call.source and len(call.k) == 1:
            continue
        out, stats = library_attention(call, backend, return_stats=True)
        plain = with_joined_keys(call)
        if call.source:
            plain.q, plain.source = call.q[call.source["q"]], {}
        again, again_stats = library_attention(plain, backend, return_stats=True)
        assert_close(again, out)
        assert_close(again_stats.lse, stats.lse)
        assert_close(again_stats.mass, stats.mass)


@pytest.mark.parametrize("layout", ("contiguous", "heads first", "padded"))
@pytest.mark.parametrize("backend", BACKENDS)
def test_out_is_written_and_nothing_beside_it(backend: str, layout: str) -> None:
    for seed in SEEDS:
        call = random_call(seed, contrast=True)
        truth, stats = library_attention(call, backend, return_stats=True)
        B, M, H, D = truth.shape
        if layout == "heads first":
            whole = torch.full((B, H, M, D), math.nan, dtype=truth.dtype)
            out = whole.transpose(1, 2)
        else:
            whole = torch.full((B, M + 2, H, D + 3), math.nan, dtype=truth.dtype)
            out = whole[:, 1:-1, :, :D] if layout == "padded" else torch.full_like(truth, math.nan)
        got, got_stats = library_attention(call, backend, out=out, return_stats=True)
        assert got is out
        assert torch.equal(out, truth)
        assert torch.equal(got_stats.lse, stats.lse) and torch.equal(got_stats.mass, stats.mass)
        if layout == "padded":
            out.fill_(math.nan)
            assert bool(torch.isnan(whole).all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", ("bias", "table", "valid", "empty", "mask"))
def test_row_without_allowed_keys_gives_zero(backend: str, how: str) -> None:
    q, k, v = torch.randn(2, 6, 2, 8), torch.randn(2, 9, 2, 8), torch.randn(2, 9, 2, 8)
    rows, keys = fb.Segments(a=2, b=4), fb.Segments(x=4, y=5)
    groups, mask, options = {"first": ["x"], "second": ["y"]}, None, {}
    if how == "bias":
        options["bias"] = {("*", "x"): -math.inf}
    elif how == "table":
        options["bias"] = {("*", "x"): torch.full((2, 2), -math.inf)}
    elif how == "valid":
        options["valid"] = {"x": torch.zeros(2, dtype=torch.int64)}
    elif how == "empty":
        keys, k, v = fb.Segments(x=0, y=5), k[:, 4:], v[:, 4:]
    else:
        mask = torch.ones(1, 1, 6, 9, dtype=torch.bool)
        mask[..., :4] = False
    for contrast in (None,) if how == "mask" else (None, fb.Contrast(1.67, None)):
        control = fb.Control(rows, keys, groups=groups, contrast=contrast, **options)
        out, stats = fb.attention(q, k, v, control, mask=mask, backend=backend, return_stats=True)
        alone = fb.Control(rows, fb.Segments(y=5), contrast=contrast)
        assert_close(out, fb.attention(q, k[:, -5:], v[:, -5:], alone, backend=backend))
        assert bool((stats.lse[..., 0] == -math.inf).all()) and bool(torch.isfinite(stats.lse[..., 1]).all())
        assert bool((stats.mass[..., 0] == 0).all())
        assert float(stats.mass.sum()) == pytest.approx(2 * 2 * 6)


@pytest.mark.parametrize("backend", (*BACKENDS, "auto"))
def test_calls_without_rows_keys_or_items(backend: str) -> None:
    for B, M, N in ((2, 0, 5), (2, 5, 0), (0, 5, 5), (2, 0, 0)):
        q, k, v = (torch.randn(B, n, 2, 8) for n in (M, N, N))
        control = fb.Control(
            fb.Segments(a=M), fb.Segments(x=N), head_gain=fb.HeadGain("a", "x"), gain={"a": 0.5}
        )
        for c in (None, control):
            out, stats = fb.attention(q, k, v, c, backend=backend, return_stats=True)
            assert out.shape == q.shape and bool((out == 0).all())
            assert stats.lse.shape == (B, 2, M, 1) and bool((stats.lse == -math.inf).all())
            assert stats.mass.shape == (B, 2, 1, 1) and bool((stats.mass == 0).all())
            assert stats.gain.shape == (B, 2, 1) and bool(torch.isfinite(stats.gain).all())
            poisoned = torch.full_like(q, math.nan)
            assert bool((fb.attention(q, k, v, c, backend=backend, out=poisoned) == 0).all())


def test_strided_last_dimension() -> None:
    q, k, v = (torch.randn(2, 8, 2, 2 * 8)[..., ::2] for _ in range(3))
    truth = fb.attention(*(t.contiguous() for t in (q, k, v)), backend="reference")
    assert_close(fb.attention(q, k, v, backend="composed"), truth)


def test_statistics_exclude_weight_gate_contrast_and_gain() -> None:
    q, k, v = torch.randn(1, 6, 2, 8), torch.randn(1, 9, 2, 8), torch.randn(1, 9, 2, 8)
    rows, keys = fb.Segments(a=2, b=4), fb.Segments(x=4, y=5)
    plain = fb.attention(q, k, v, fb.Control(rows, keys), backend="reference", return_stats=True)[1]
    options = {
        "weight": {("a", "x"): 3.0},
        "gates": {"all": 0.5},
        "gain": {"b": 2.0},
        "contrast": fb.Contrast(2.0),
    }
    stats = fb.attention(q, k, v, fb.Control(rows, keys, **options), backend="reference", return_stats=True)[
        1
    ]
    assert_close(stats.lse, plain.lse)
    assert_close(stats.mass, plain.mass)
    assert stats.gain.tolist() == [[[1.0, 2.0], [1.0, 2.0]]]


@pytest.mark.parametrize("compiled", (False, True))
def test_autocast_casts_as_sdpa(compiled: bool) -> None:
    q, v = (torch.randn(2, 6, 2, 8, requires_grad=True) for _ in range(2))
    k = torch.randn(2, 6, 2, 8).bfloat16()
    call = torch.compile(fb.attention, backend="aot_eager", fullgraph=True) if compiled else fb.attention
    with pytest.raises(TypeError, match="k: expected q's dtype"):
        fb.attention(q, k, v)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            stock = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
            out = call(q, k, v)
            total = fb.attention_sum([fb.Branch(q, k, v)])
        assert out.dtype == total.dtype == stock.dtype == dtype
        expected = fb.attention(q.to(dtype), k.to(dtype), v.to(dtype))
        assert torch.equal(out, expected) and torch.equal(total, expected)
        got, wanted = (torch.autograd.grad(x.float().sum(), (q, v)) for x in (out, expected))
        assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        assert fb.attention(*(t.detach().double() for t in (q, k, v))).dtype == torch.float64
        assert fb.attention(*(t.detach().to("meta") for t in (q, q, v))).shape == q.shape
