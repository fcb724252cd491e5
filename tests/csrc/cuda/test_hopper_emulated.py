"""The emulated functions of Hopper alone: layouts, sums, and that each mistake in using them is found."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from support.hopper import build

pytestmark = pytest.mark.compiled
SOURCE = Path(__file__).with_name("hopper_selftest.cpp")
OK, MISUSE, DEADLOCK = 0, 1, 2
SEEDS = 8
DTYPES = [torch.bfloat16, torch.float16]
MISTAKES = [
    "none",
    "no_await",
    "early_release",
    "no_wait",
    "no_copy",
    "other_count",
    "fewer_bytes",
    "early_read",
    "early_write",
    "early_operand",
    "extra_copy",
    "no_commit",
    "other_operand",
    "out_of_bounds",
    "too_many_registers",
    "half_a_warp",
]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return ctypes.CDLL(str(build(SOURCE, tmp_path_factory.mktemp("hopper") / "selftest.so")))


def address(x: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


def start(library: ctypes.CDLL, seed: int) -> None:
    library.flashbrush_emulation_seed(ctypes.c_uint64(seed))


# Layouts and sums


def multiply_rows(
    library: ctypes.CDLL,
    q: torch.Tensor,
    k: torch.Tensor,
    columns: int,
    row: int = 0,
    head: int = 0,
    item: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q k^T (64, columns) for the keys from `row` on, and its rounded copy.

    q: (64, dim); k: (2 items, rows, 2 heads, dim).
    """
    out, rounded = torch.empty(64, columns), torch.empty(64, columns, dtype=q.dtype)
    error = library.selftest_rows(
        int(q.dtype == torch.float16),
        q.shape[1],
        columns,
        address(q),
        address(k),
        ctypes.c_int64(k.shape[1]),
        row,
        head,
        item,
        address(out),
        address(rounded),
    )
    assert error == OK
    return out, rounded


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("columns", [64, 128, 176, 192])
def test_rows_times_rows(library: ctypes.CDLL, dtype: torch.dtype, dim: int, columns: int) -> None:
    q, k = torch.randn(64, dim).to(dtype), torch.randn(2, 200, 2, dim).to(dtype)
    for seed in range(3):
        start(library, seed)
        out, rounded = multiply_rows(library, q, k, columns, 3, 1, 1)
        torch.testing.assert_close(out, q.float() @ k[1, 3 : 3 + columns, 1].float().T, atol=1e-4, rtol=1e-5)
        if columns <= dim:
            assert torch.equal(rounded, out.to(dtype))


@pytest.mark.parametrize(
    ("row", "head", "item"), [(150, 0, 0), (-7, 1, 1), (200, 0, 1), (0, 2, 0), (0, -1, 0), (0, 0, 2)]
)
def test_copies_are_zero_outside_the_tensor(library: ctypes.CDLL, row: int, head: int, item: int) -> None:
    q, k = torch.randn(64, 64).bfloat16(), torch.randn(2, 200, 2, 64).bfloat16()
    inside = torch.zeros(64, 64)
    if 0 <= head < 2 and 0 <= item < 2:
        rows = range(max(row, 0), min(row + 64, 200))
        inside[rows.start - row : rows.start - row + len(rows)] = k[
            item, rows.start : rows.stop, head
        ].float()
    out, _ = multiply_rows(library, q, k, 64, row, head, item)
    torch.testing.assert_close(out, q.float() @ inside.T, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [64, 128, 192])
def test_registers_times_columns(library: ctypes.CDLL, dtype: torch.dtype, columns: int) -> None:
    a, v = torch.randn(64, 80), torch.randn(80, columns).to(dtype)
    for seed in range(3):
        start(library, seed)
        out = torch.empty(64, columns)
        half = int(dtype == torch.float16)
        assert library.selftest_columns(half, columns, address(a), address(v), address(out)) == OK
        torch.testing.assert_close(out, 2 + a.to(dtype).float() @ v.float(), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_are_rounded_as_torch_does(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    special = [
        0.0,
        -0.0,
        65519.0,
        65520.0,
        1e9,
        2.0**-24,
        2.0**-25,
        1.5 * 2.0**-24,
        2.0**-14,
        float("inf"),
        -float("inf"),
    ]
    x = torch.cat([torch.tensor(special), torch.randn(500), torch.randn(500) * 2.0**-16])
    library.selftest_round.restype = ctypes.c_uint32
    half = int(dtype == torch.float16)
    ours = [library.selftest_round(half, ctypes.c_float(value)) for value in x.tolist()]
    assert torch.tensor(ours, dtype=torch.int32).equal(x.to(dtype).view(torch.int16).int() & 0xFFFF)


@pytest.mark.parametrize(
    ("base", "rows", "stride", "box", "fine"),
    [
        (4096, 10, 128, 64, True),
        (4104, 10, 128, 64, False),
        (4096, 0, 128, 64, False),
        (4096, 2**32 + 1, 128, 64, False),
        (4096, 10, 136, 64, False),
        (4096, 10, 2**40, 64, False),
        (4096, 10, 128, 257, False),
        (4096, 10, 128, 0, False),
    ],
)
def test_refuses_invalid_maps(
    library: ctypes.CDLL, base: int, rows: int, stride: int, box: int, fine: bool
) -> None:
    values = [ctypes.c_int64(value) for value in (base, rows, stride)]
    assert bool(library.selftest_map(*values, box)) == fine


# Mistakes

BLOCKS, TILES = 2, 5


def run_ring(library: ctypes.CDLL, mistake: str, seed: int) -> tuple[int, bool]:
    """Returns the error of launch(), and whether the sum of the products is right."""
    start(library, seed)
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(128 * BLOCKS, 64, generator=generator).bfloat16()
    k = torch.randn(64 * TILES, 64, generator=generator).bfloat16()
    out = torch.full((128 * BLOCKS, 64), float("nan"))
    error = library.selftest_ring(
        MISTAKES.index(mistake), BLOCKS, TILES, address(q), address(k), address(out)
    )
    right = (q.float() @ k.float().view(TILES, 64, 64).sum(0).T).bfloat16().float()
    return error, torch.allclose(out, right, atol=0.01, rtol=0.01)


def test_right_with_every_seed(library: ctypes.CDLL) -> None:
    assert {run_ring(library, "none", seed) for seed in range(40)} == {(OK, True)}


@pytest.mark.parametrize("mistake", ["no_await", "early_release", "no_wait", "early_read", "extra_copy"])
def test_missing_waits_are_wrong_or_errors(library: ctypes.CDLL, mistake: str) -> None:
    assert {run_ring(library, mistake, seed) for seed in range(SEEDS)} - {(OK, True)}


def test_a_missing_wait_is_wrong_with_some_seeds_only(library: ctypes.CDLL) -> None:
    found = {run_ring(library, "no_wait", seed) for seed in range(40)}
    assert {(OK, True), (OK, False)} <= found


def test_same_seed_same_outcome(library: ctypes.CDLL, capfd: pytest.CaptureFixture[str]) -> None:
    def outcome(seed: int) -> tuple[tuple[int, bool], str]:
        return run_ring(library, "early_release", seed), capfd.readouterr().err

    assert [outcome(seed) for seed in range(SEEDS)] == [outcome(seed) for seed in range(SEEDS)]


@pytest.mark.parametrize(
    ("mistake", "error", "message"),
    [
        ("no_copy", DEADLOCK, "threads 128-383: barrier at shared offset 0, parity 0"),
        ("fewer_bytes", DEADLOCK, "-128 bytes"),
        ("too_many_registers", DEADLOCK, "248 registers"),
        ("half_a_warp", DEADLOCK, "bar.sync: the rest of the warp"),
        ("other_count", MISUSE, "for those that came before"),
        ("early_write", MISUSE, "accumulators changed"),
        ("early_operand", MISUSE, "registers of A changed"),
        ("no_commit", MISUSE, "not awaited"),
        ("other_operand", MISUSE, "another one than for other threads"),
        ("out_of_bounds", MISUSE, "out of shared memory"),
    ],
)
def test_names_mistakes(
    library: ctypes.CDLL, capfd: pytest.CaptureFixture[str], mistake: str, error: int, message: str
) -> None:
    for seed in range(3):
        assert run_ring(library, mistake, seed)[0] == error
        assert message in capfd.readouterr().err
