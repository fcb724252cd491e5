"""The CUDA forward kernel against float64 of the reference: on a Hopper GPU, else in an emulation of its
instructions.

In the emulation a seed decides when copies and products are performed and which warp runs next. It shows
nothing about speed.
"""

from __future__ import annotations

import ctypes
import math
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
from hypothesis import assume, given, settings, strategies as st
from torch import Tensor

import flashbrush as fb
from flashbrush.bindings.backends import cuda as cuda_package, triton as triton_package
from flashbrush.bindings.backends.cuda import attention as cuda
from flashbrush.bindings.backends.planner import FUSED
from flashbrush.bindings.backends.shared_library import build_report
from support.calls import Call, examples, random_calls
from support.error_bars import check_result
from support.gradients import check_gradients
from support.hopper import build

SOURCE = Path(__file__).parents[3] / "csrc" / "cuda" / "attention.cu"
HARDWARE = torch.cuda.is_available() and not cuda.available()
DEVICE = "cuda" if HARDWARE else "cpu"
DTYPES = (torch.bfloat16, torch.float16)
COMPILED = cuda.LIBRARY

pytestmark = [
    pytest.mark.compiled,
    pytest.mark.skipif(bool(triton_package.available()), reason="; ".join(triton_package.available())),
]


@pytest.fixture(scope="module", autouse=True)
def seed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], None]]:
    """Seeds the order in which the emulation does things; on hardware it does nothing."""
    if HARDWARE:
        yield lambda _: None
        return
    path = build(SOURCE, tmp_path_factory.mktemp("cuda") / "emulated.so")
    library = ctypes.CDLL(str(path))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "LIBRARY", path)
        patch.setattr(cuda_package, "available", lambda: [])
        patch.setattr(cuda, "multiprocessors", lambda _: 2)
        yield lambda value: library.flashbrush_emulation_seed(ctypes.c_uint64(value))


def run(call: Call) -> tuple[Tensor, fb.Stats]:
    call = call.on(torch.device(DEVICE))
    out = torch.full_like(call.run("reference"), float("nan"))
    _, stats = call.run("cuda", return_stats=True, out=out)
    check_result(call, out, stats)
    check_result(call, call.run("cuda"))
    return out, stats


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    return [torch.randn(shape).to(dtype) for shape in shapes]


def everything(dim: int = 128, dtype: torch.dtype = torch.bfloat16) -> Call:
    """Tiles with tails, a removed pair, weights (one is 0), softmax groups, a gate and a gain."""
    rows, keys = fb.Segments(a=230, b=40), fb.Segments(c=165, d=1, e=129)
    control = fb.Control(
        rows,
        keys,
        weight={("a", "d"): 1.3, ("b", "e"): 0.0, ("a", "e"): 0.4},
        bias={("b", "c"): -math.inf},
        groups={"x": ["c", "d"], "y": ["e"]},
        gates={"x": 0.3},
        gain={"a": 0.7},
    )
    return Call(*tensors((2, 270, 2, dim), (2, 295, 1, dim), (2, 295, 1, dim), dtype=dtype), control)


@pytest.mark.parametrize("longest", (40, 150, 400))
def test_random_calls(seed: Callable[[int], None], longest: int) -> None:
    @hypothesis.seed(longest)
    @settings(max_examples=examples(40 if not HARDWARE else 400), derandomize=False, database=None)
    @given(
        random_calls(longest=longest, dims=(8, 40, 64, 80, 128), dtypes=DTYPES, clip=False),
        st.integers(0, 2**60),
    )
    def check(call: Call, order: int) -> None:
        assume(not cuda.why_not(call.on(torch.device(DEVICE)).problem()))
        seed(order)
        run(call)

    check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", (40, 64, 96, 128))
def test_everything_at_once(dim: int, dtype: torch.dtype) -> None:
    run(everything(dim, dtype))


@pytest.mark.skipif(HARDWARE, reason="benchmarks/gpu/run.py builds and checks them there")
def test_other_tile_sizes(tmp_path: Path) -> None:
    numbers = {"GROUPS_128": 3, "KEYS_128": 80, "GROUPS_64": 2, "KEYS_64": 176, "POLYNOMIAL_64": 6}
    flags = [f"-DFLASHBRUSH_{name}={value}" for name, value in numbers.items()]
    with cuda.trial(build(SOURCE, tmp_path / "other.so", *flags)):
        for dim in (64, 128):
            run(everything(dim))
            run(Call(*tensors(*[(1, 400, 2, dim)] * 3), None))


def test_derived_gain() -> None:
    segments = fb.Segments(prompt=33, subject=130, target=140)
    control = fb.Control(
        segments,
        weight={("target", "prompt"): 1.3, ("target", "subject"): 1.2},
        head_gain=fb.HeadGain(rows="target", keys="prompt", apply_to="target"),
    )
    run(Call(*tensors(*[(1, 303, 3, 64)] * 3), control))


@pytest.mark.parametrize("grouped", (False, True))
def test_same_bits_in_any_order(
    seed: Callable[[int], None], grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = (
        everything() if grouped else Call(*tensors((1, 300, 2, 64), (1, 400, 2, 64), (1, 400, 2, 64)), None)
    )
    call = call.on(torch.device(DEVICE))
    first, stats = call.run("cuda", return_stats=True)
    for order in range(40 if HARDWARE else 12):
        seed(order)
        monkeypatch.setattr(cuda, "multiprocessors", lambda _, n=1 + order % 5: n)
        again, other = call.run("cuda", return_stats=True)
        assert torch.equal(first, again)
        for one, two in zip(stats, other, strict=True):
            assert torch.equal(one, two)


def test_more_tiles_and_blocks_than_buffers(seed: Callable[[int], None]) -> None:
    seed(5)
    run(Call(*tensors((1, 600, 2, 64), (1, 1500, 2, 64), (1, 1500, 2, 64)), None, {"scale": 0.5}))


def test_broadcast_items_read_by_index() -> None:
    q, k, v = tensors((1, 70, 2, 64), (1, 90, 2, 64), (3, 90, 2, 64))
    source = {"q": torch.tensor([2, 0]), "k": torch.tensor([1, 2]), "v": torch.tensor([2, 1])}
    run(Call(q.expand(3, -1, -1, -1), k.expand(3, -1, -1, -1), v, None, {"source": source}))


def test_negative_and_zero_scales() -> None:
    q, k, v = tensors(*[(2, 150, 2, 64)] * 3)
    run(Call(q, k, v, None, {"scale": torch.tensor([[0.3, -0.2], [0.0, -0.1]])}))


@pytest.mark.parametrize(
    ("a", "b"), [(1e-30, 1.4e-31), (1e-12, 1.0), (1e12, 1e11), (1e30, 1.0), (1e30, 1e-30), (1e-30, 1e30)]
)
def test_weights_beyond_the_exponent(a: float, b: float) -> None:
    """Weights outside 2^-30 .. 2^30: alone, beside ordinary ones, and both extremes in either order."""
    segments = fb.Segments(a=100, b=150)
    control = fb.Control(segments, weight={("*", "a"): a, ("*", "b"): b})
    call = Call(*tensors(*[(1, 250, 1, 64)] * 3), control)
    out, stats = call.on(torch.device(DEVICE)).run("cuda", return_stats=True)
    truth, expected = call.to(torch.float64).run("reference", return_stats=True)
    torch.testing.assert_close(out.double().cpu(), truth, rtol=0.02, atol=0.01 * float(truth.abs().max()))
    torch.testing.assert_close(stats.lse.double().cpu(), expected.lse, rtol=0, atol=1e-4)
    torch.testing.assert_close(stats.mass.double().cpu(), expected.mass, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dim", (64, 80, 128))
def test_removed_keys_are_not_read(dim: int) -> None:
    q, k, v = tensors((1, 70, 2, dim), (1, 200, 2, dim), (1, 200, 2, dim))
    rows, keys = fb.Segments(a=40, b=30), fb.Segments(x=10, y=5, z=150, end=35)
    control = fb.Control(
        rows,
        keys,
        bias={("*", "y"): -math.inf, ("b", "z"): -math.inf},
        weight={("a", "z"): 0.0},
        valid={"end": torch.tensor([3])},
    )
    clean = Call(q, k, v, control).on(torch.device(DEVICE)).run("cuda", return_stats=True)
    for t in (k, v):
        t[:, 10:15] = t[:, 168:] = math.nan
    v[:, 15:165] = math.nan  # of weight 0, or removed
    poisoned = Call(q, k, v, control).on(torch.device(DEVICE)).run("cuda", return_stats=True)
    for before, after in zip((clean[0], *clean[1]), (poisoned[0], *poisoned[1]), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("value", (math.nan, math.inf, -math.inf), ids=str)
@pytest.mark.parametrize("which", ("q", "k", "v"))
def test_not_finite_where_sdpa_is_not(which: str, value: float) -> None:
    given = dict(zip("qkv", tensors(*[(1, 150, 2, 64)] * 3), strict=True))
    given["q"] = given["q"].abs()  # an infinite key then has an infinite logit of one sign in every row
    given[which][0, 20, 1, 3] = value
    out = Call(*given.values(), None).on(torch.device(DEVICE)).run("cuda").cpu()
    heads_first = [t.double().transpose(1, 2) for t in given.values()]
    truth = torch.nn.functional.scaled_dot_product_attention(*heads_first).transpose(1, 2)
    assert torch.equal(torch.isnan(out), torch.isnan(truth)) and torch.equal(
        torch.isinf(out), torch.isinf(truth)
    )
    finite = torch.isfinite(truth)
    torch.testing.assert_close(out.double()[finite], truth[finite], rtol=0, atol=0.05)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_of_ten_thousand_and_one_huge_key(dtype: torch.dtype) -> None:
    q, k, v = tensors(*[(1, 200, 2, 64)] * 3, dtype=dtype)
    few = [(t * 2).round().clamp(-4, 4) for t in (q, k)]  # few bits: products and sums are exact
    run(Call(*few, v, None, {"scale": 60.0}))
    k[:, 150] = 300.0
    out = Call(q.abs(), k, v, None).on(torch.device(DEVICE)).run("cuda").cpu()
    torch.testing.assert_close(out, v[:, 150:151].expand_as(out), rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_rows_without_keys_are_zero() -> None:
    segments = fb.Segments(a=30, b=40)
    control = fb.Control(segments, bias={("a", "*"): -math.inf})
    call = Call(*tensors(*[(1, 70, 1, 64)] * 3), control).on(torch.device(DEVICE))
    out, stats = call.run("cuda", return_stats=True)
    assert bool((out[:, :30] == 0).all()) and bool((stats.lse[:, :, :30] == -math.inf).all())
    assert bool((stats.mass[:, :, 0] == 0).all()) and bool(torch.isfinite(out).all())


def test_gradients() -> None:
    """Computed by the Triton backend, whose own tests draw more calls."""
    rows, keys = fb.Segments(a=30, b=10), fb.Segments(c=20, d=40)
    control = fb.Control(rows, keys, weight={("a", "d"): 1.3}, groups={"x": ["c"], "y": ["d"]})
    call = Call(*tensors((1, 40, 2, 64), (1, 60, 1, 64), (1, 60, 1, 64)), control)
    check_gradients(call.on(torch.device(DEVICE)), "cuda")


def test_why_not() -> None:
    def reasons(dim: int = 64, dtype: torch.dtype = torch.bfloat16, **kwargs) -> str:
        segments = fb.Segments(**{f"s{i}": 1 for i in range(kwargs.pop("segments", 2))})
        control = fb.Control(segments, **kwargs)
        return "; ".join(
            cuda.why_not(Call(*tensors(*[(1, segments.total, 1, dim)] * 3, dtype=dtype), control).problem())
        )

    assert reasons() == ""
    assert "head dim 36" in reasons(dim=36) and "head dim 160" in reasons(dim=160)
    assert "float32" in reasons(dtype=torch.float32)
    assert "clip" in reasons(contrast=fb.Contrast(beta=1.5, clip=(0.0, 1.0)))
    assert "33 key segments" in reasons(segments=33, weight={("s0", f"s{i}"): 1 + i / 50 for i in range(33)})
    q = torch.randn(1, 8, 1, 67).bfloat16()[..., :64]
    assert "16 bytes" in "; ".join(cuda.why_not(Call(q, q, q, None).problem()))


def test_is_not_chosen_by_default() -> None:
    assert cuda_package is not FUSED["cuda"], "name the hardware it was verified on in README.md"


def test_raises_for_another_abi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "ABI", 0)
    with pytest.raises(RuntimeError, match="another version"):
        Call(*tensors(*[(1, 8, 1, 64)] * 3), None).on(torch.device(DEVICE)).run("cuda")


def test_registers_of_the_compiled_kernels() -> None:
    report = build_report().get("cuda", {})
    if report.get("error") is not None or not report:
        pytest.skip(f"the CUDA library was not built: {report.get('error')}")
    assert report["warnings"] == []  # for example that ptxas serialises products
    assert len(report["kernels"]) == 8
    # With three computing warp groups the loading one has 32 registers a thread, and spills a few values.
    spills = {name: kernel["spills"] for name, kernel in report["kernels"].items()}
    assert max(spills.values()) <= 40, spills
    assert all(
        spill == 0 for name, spill in spills.items() if "Li128ELi128" in name or "Li128ELi64" in name
    ), spills


def test_exponentials_overlap_with_products() -> None:
    """Read from the machine code: the emulation does not show how instructions move around waits."""
    import triton as package

    tool = Path(package.__file__).with_name("backends") / "nvidia" / "bin" / "cuobjdump"
    if not COMPILED.exists() or not tool.exists():
        pytest.skip("the CUDA library was not built, or cuobjdump is not there")
    text = subprocess.run([tool, "-sass", COMPILED], capture_output=True, text=True, check=True).stdout
    kernels = re.split(r"Function : (\w+)", text)[1:]
    for name, code in zip(kernels[::2], kernels[1::2], strict=True):
        keys = int(re.search(r"Li\d+ELi(\d+)E", name)[1])  # type: ignore[index]
        # The first wait leaves P V running, the next one completes it.
        (after,) = code.split("WARPGROUP.DEPBAR.LE gsb0, 0x1 ;")[1:]
        during = after.split("WARPGROUP.DEPBAR.LE gsb0, 0x0 ;")[0]
        assert during.count("MUFU.EX2") >= keys // 2, name
    assert len(kernels) == 2 * 8
