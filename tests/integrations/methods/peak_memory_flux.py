"""python -m integrations.methods.peak_memory_flux: peak memory of one call of a tiny FLUX under each method.

Prints {name: bytes} as JSON. The call has 4,096 image tokens and one head; the figure is the peak above
what is resident before it. "plain" is without a method, "eager" with attention maps.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack

import torch
from torch import Tensor

from flashbrush.integrations import (
    ICCustom,
    ICCustomParameters,
    KVEdit,
    OminiControl,
    PersonalizeAnything,
    PersonalSubject,
)
from flashbrush.integrations.diffusers import apply

from ..tiny import COLUMNS, forward, tiny_call, tiny_flux
from .eager import eagerly, plain
from .peak_memory import status

ROWS = 4096 // COLUMNS


def peak(context: AbstractContextManager, model, call: dict[str, Tensor], before: Callable[[], None]) -> int:
    with context:
        before()
        forward(model, call)  # loads libraries and fills caches that remain
        with open("/proc/self/clear_refs", "w") as reset:
            reset.write("5")
        resident = status("VmRSS")
        forward(model, call)
        return status("VmHWM") - resident


def main() -> None:
    torch.set_num_threads(1)
    model = tiny_flux(double=1, single=1, heads=1)
    half = torch.arange(4096) % 7 < 3
    subject = PersonalSubject(half.reshape(ROWS, COLUMNS))
    call, pair = tiny_call(model, rows=ROWS), tiny_call(model, rows=ROWS, batch=2)
    tokens = half.nonzero()[:, 0]
    masked = call | {"hidden_states": call["hidden_states"][:, tokens], "img_ids": call["img_ids"][tokens]}
    invert, edit = KVEdit(half, (0.5, 0.0), masked_inversion=True), KVEdit(half, (0.5, 0.0))
    with apply(model, edit):
        forward(model, call)
    edit.phase = "edit"
    forms = {
        "plain": (None, call),
        "plain pair": (None, pair),
        "inversion": (invert, call),
        "edit": (edit, masked),
        "ic_custom": (ICCustom(ICCustomParameters(32), grid=(ROWS, COLUMNS)), call),
        "omini_control": (OminiControl(2048, 0.5), call),
        "personalize": (PersonalizeAnything(subject, concatenation="target"), pair),
    }
    with eagerly(model, plain):
        peaks = {"eager": peak(ExitStack(), model, call, lambda: None)}
    for name, (method, given) in forms.items():
        handle = apply(model, method)
        peaks[name] = peak(handle, model, given, lambda handle=handle: handle.set_step(0, 1))
    print(json.dumps(peaks))


if __name__ == "__main__":
    main()
