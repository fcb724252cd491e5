"""What Triton compiles the attention kernels of two checkouts to; needs no GPU.

    python benchmarks/gpu/compiled_kernels.py BEFORE AFTER [--triton FOLDER ...] [--output FILE]

BEFORE and AFTER are folders with a clone each. FOLDER holds another version of Triton (`pip install --no-deps
--target FOLDER triton==3.6.0`); the installed one is always compared.

`same code`: Triton's last code before LLVM (TTGIR) is the same but for names and the order of parameters.
LLVM and ptxas give such code a few registers more or less when only its parameters come in another order, so
those registers do not count as worse unless a multiprocessor then holds fewer blocks.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TARGETS = ("sm_80", "sm_90", "sm_120")
FORWARD = ("plain", "weighted", "brush", "groups", "words", "contrast", "clip", "key list", "items")
CASES = [
    *(("forward", variant, dim, "bfloat16") for variant in FORWARD for dim in (64, 128)),
    ("forward", "weighted, tma", 128, "bfloat16"),
    *(
        ("backward", variant, dim, "bfloat16")
        for variant in ("weighted", "groups", "words", "items")
        for dim in (64, 128)
    ),
    *(("column_mass", variant, dim, "bfloat16") for variant in ("weighted", "items") for dim in (64, 128)),
    *(("forward", variant, 128, "float16") for variant in ("weighted", "groups", "words", "clip")),
    *(("backward", variant, 128, "float16") for variant in ("weighted", "words")),
    ("column_mass", "weighted", 128, "float16"),
]
COMPARED = ("registers", "stack", "spills", "shared", "narrow reads", "narrow writes", "not specialized")


def compile_all(
    checkout: Path, tests: Path, target: str, triton: Path | None, cases: list
) -> dict[str, dict]:
    """{"operator, variant, D, dtype, kernel": resources}, by the compile_kernels.py in `tests`."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "flashbrush").symlink_to(checkout.resolve())
        paths = [folder, str(tests.resolve()), *([] if triton is None else [str(triton.resolve())])]
        done = subprocess.run(
            [sys.executable, "-m", "support.compile_kernels", target],
            input=json.dumps(cases),
            cwd=folder,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "TRITON_INTERPRET": "0"},
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise RuntimeError(f"{checkout} for {target}: {done.stderr}")
    found = {}
    for report in json.loads(done.stdout):
        operator, variant, dim, dtype = report["case"]
        for kernel in report["kernels"]:
            # Arguments whose value or divisibility is not compiled in.
            kernel["not specialized"] = kernel["arguments"] - kernel["multiples of 16"]
            found[f"{operator}, {variant}, D {dim}, {dtype}, {kernel['kernel']}"] = kernel
    return found


def blocks(kernel: dict) -> int:
    """Blocks that the 65,536 registers of a multiprocessor hold: warps get them in units of 256."""
    return 65536 // (-(-kernel["registers"] * 32 // 256) * 256 * kernel["warps"])


def compare(before: Path, after: Path, target: str, triton: Path | None) -> dict[str, dict[str, Any]]:
    """{kernel: {resource: [before, after]}}"""
    checkouts, tests = (before, after), after / "tests"
    cases = [c for c in CASES if target != "sm_80" or not c[1].endswith("tma")]
    old, new = (compile_all(c, tests, target, triton, cases) for c in checkouts)
    assert old.keys() == new.keys(), old.keys() ^ new.keys()
    return {
        name: {what: [old[name][what], new[name][what]] for what in COMPARED}
        | {"blocks": [blocks(old[name]), blocks(new[name])]}
        | {"same code": old[name]["code"] == new[name]["code"]}
        for name in old
    }


def is_worse(row: dict[str, Any]) -> bool:
    """More of anything, or fewer blocks; registers as the module's docstring says."""
    counted = [row[what] for what in COMPARED if what != "registers" or not row["same code"]]
    return any(new > old for old, new in counted) or row["blocks"][1] < row["blocks"][0]


def print_summary(rows: dict[str, dict[str, Any]]) -> None:
    differing = [row["registers"] for row in rows.values() if row["registers"][0] != row["registers"][1]]
    more = sum(new > old for old, new in differing)
    same = sum(row["same code"] for row in rows.values())
    print(f"  {len(rows)} kernels, {same} with the same code")
    print(f"  registers: more in {more}, fewer in {len(differing) - more}; worse:")
    for name, row in rows.items():
        if is_worse(row):
            print(f"    {name}: {row}")


def version(triton: Path | None) -> str:
    paths = {} if triton is None else {"PYTHONPATH": str(triton.resolve())}
    command = [sys.executable, "-c", "import triton; print(triton.__version__)"]
    return subprocess.check_output(command, text=True, env=os.environ | paths).strip()


def revision(checkout: Path) -> str:
    """The commit, and the subject, which stays when the commit is rebased."""
    return subprocess.check_output(["git", "-C", checkout, "log", "-1", "--format=%h %s"], text=True).strip()


def as_text(result: dict[str, Any]) -> str:
    """JSON with one kernel a line."""
    text = json.dumps(result | {"triton": None}, indent=1)[:-2].removesuffix("null")
    releases = []
    for release, targets in result["triton"].items():
        tables = [
            f'   "{target}": {{\n'
            + ",\n".join(f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
            + "\n   }"
            for target, rows in targets.items()
        ]
        releases.append(f'  "{release}": {{\n' + ",\n".join(tables) + "\n  }")
    return text + "{\n" + ",\n".join(releases) + "\n }\n}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--triton", type=Path, action="append", default=[])
    parser.add_argument("--targets", nargs="*", default=TARGETS)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    table: dict[str, dict] = {}
    for triton in [None, *options.triton]:
        table[version(triton)] = found = {}
        for target in options.targets:
            print(f"Triton {version(triton)}, {target}:", flush=True)
            found[target] = compare(options.before, options.after, target, triton)
            print_summary(found[target])
    if options.output is not None:
        result = {
            "before": revision(options.before),
            "after": revision(options.after),
            "columns": "[before, after]; blocks: as many as the registers of a multiprocessor hold",
            "triton": table,
        }
        options.output.write_text(as_text(result))


if __name__ == "__main__":
    main()
