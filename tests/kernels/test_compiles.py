"""The Triton kernels compiled for GPUs that are not there: tensor cores in use, no spilled register, memory
that fits.
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton")
from support.compiled import compile_elsewhere
from support.small_operator_calls import SMALL_OPERATOR_CALLS

SHARED = {
    "sm_80": 163 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "gfx942": 64 << 10,
}  # bytes a block may ask for
TENSOR_CORES = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}
# Bytes a thread. Blackwell's accumulators pass through registers; two of 64 x 256 fill all that there are.
SPILLS = {"sm_100": 64}
# From 3.7 on Triton asks ptxas for --regAllocOptLevel=2. Without it these spill 72 bytes and none.
WIDE_SPILLS = 400
SPILLING = {("sm_90", "forward", "words", 40, "bfloat16"): 24}
ATTENTION = ("attention_forward_kernel", "query_gradient_kernel", "key_gradient_kernel", "column_mass_kernel")

# One of each kind on every target; the table of tiles where it was made for, whole on one.
COMMON = [
    ("forward", "plain", 128, "bfloat16"),
    ("forward", "brush", 64, "bfloat16"),
    ("forward", "groups", 128, "bfloat16"),
    ("backward", "brush", 128, "bfloat16"),
    ("backward", "groups", 64, "bfloat16"),
    ("column_mass", "plain", 128, "bfloat16"),
    ("norm_rope", "interleaved", 128, "bfloat16"),
    ("norm_rope", "backward half", 64, "float16"),
    *(("light", name, 128, "bfloat16") for name in ("adain", "query_blur")),
]
TABLE = [
    *(
        ("forward", control, dim, "bfloat16")
        for dim in (64, 128)
        for control in ("plain", "weighted", "brush", "groups", "clip")
    ),
    ("forward", "words", 40, "bfloat16"),
    ("forward", "words", 128, "float16"),
    ("forward", "contrast", 128, "float16"),
    ("forward", "plain", 80, "bfloat16"),
    ("forward", "brush", 256, "float16"),
    ("forward", "clip", 128, "float32"),
    ("forward", "brush", 64, "float32"),
    ("backward", "words", 64, "bfloat16"),
    ("backward", "groups", 128, "bfloat16"),
    ("backward", "brush", 160, "bfloat16"),
    ("backward", "brush", 256, "float16"),
    ("backward", "brush", 128, "float32"),
    ("backward", "plain", 64, "float32"),
    ("column_mass", "plain", 256, "bfloat16"),
    ("column_mass", "brush", 128, "float32"),
    ("norm_rope", "half", 64, "float32"),
    ("norm_rope", "backward interleaved", 128, "bfloat16"),
    *(("light", name, 128, "bfloat16") for name in SMALL_OPERATOR_CALLS),
]
SHORTER = [
    case
    for case in TABLE
    if case[1] not in ("weighted", "brush") and case[3] != "float32" and case[0] != "light"
]
CASES = {
    "sm_80": list(dict.fromkeys(COMMON + SHORTER)),
    "sm_90": list(dict.fromkeys(COMMON + TABLE)),
    "sm_100": COMMON,
    "gfx942": COMMON,
}


@pytest.mark.compiled
@pytest.mark.parametrize("target", sorted(CASES))
def test_kernels_fit(target: str) -> None:
    reports = compile_elsewhere(target, CASES[target])
    assert [tuple(report["case"]) for report in reports] == CASES[target]
    wrong = []
    for report in reports:
        assert report["kernels"], f"{target} {report['case']} launches nothing"
        for kernel in report["kernels"]:
            where = f"{target} {report['case']} {kernel}"
            print(where)
            most = WIDE_SPILLS if report["case"][2] > 160 else SPILLS.get(target, 0)
            most = SPILLING.get((target, *report["case"]), most)
            if kernel["shared"] > SHARED[target] or kernel["spills"] > most:
                wrong.append(where)
    assert not wrong, "\n".join(wrong)
    check_tensor_cores(target, reports)
    check_launches(target, reports)


def check_tensor_cores(target: str, reports: list[dict]) -> None:
    for report in reports:
        operator, _, dim, dtype = report["case"]
        if operator in ("forward", "backward", "column_mass") and dtype != "float32" and dim <= 160:
            found = [k["tensor_cores"] for k in report["kernels"] if k["kernel"] in ATTENTION]
            assert found == [TENSOR_CORES[target]] * (2 if operator == "backward" else 1), (
                f"{target} {report['case']}"
            )


def check_launches(target: str, reports: list[dict]) -> None:
    """A control launches only light kernels more."""
    launched = {tuple(report["case"]): [k["kernel"] for k in report["kernels"]] for report in reports}
    assert launched["forward", "plain", 128, "bfloat16"] == ["attention_forward_kernel"]
    light = ["sum_mass_kernel", "head_gain_kernel", "scale_rows_kernel"]
    assert launched["forward", "brush", 64, "bfloat16"] == ["attention_forward_kernel", *light]
    if ("forward", "weighted", 128, "bfloat16") in CASES[target]:
        assert launched["forward", "weighted", 128, "bfloat16"] == ["attention_forward_kernel"]
