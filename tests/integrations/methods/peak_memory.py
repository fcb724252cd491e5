"""python -m integrations.methods.peak_memory FORM...: peak memory of one call of a tiny UNet, in bytes.

Prints a line for each FORM: plain (without a method), clipped, unclipped or eager. The call has 64 x 64
latents, three pairs and one head; the figure is the peak above what is resident before it. Each form runs
in a process of its own, forked after all imports.
"""

from __future__ import annotations

import os
import sys

import torch

from flashbrush.integrations import InContextRoles, VisualInContext
from flashbrush.integrations.diffusers import apply

from ..diffusers.tiny_images import tiny_unet, unet_call
from .eager import Reader, eagerly, reading, run


def status(field: str) -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field + ":"))


def main(forms: list[str]) -> int:
    for form in forms:
        if (child := os.fork()) == 0:
            measure(form)
            sys.stdout.flush()
            os._exit(0)
        if os.waitpid(child, 0)[1] != 0:
            return 1
    return 0


def measure(form: str) -> None:
    torch.set_num_threads(1)
    model = tiny_unet(attention_head_dim=1)
    if form == "eager":
        core = reading(Reader(8, 6, (0, 2, 4), (1, 3, 5), 0.4, 1.67, (0.0, 1.0)))
        context = eagerly(model, core, lambda site: site.is_self and site.name.startswith("up_blocks"))
    else:
        method = VisualInContext(
            clip=(0.0, 1.0) if form == "clipped" else None, items=InContextRoles.stacked(3)
        )
        context = apply(model, None if form == "plain" else method)
    with context:
        run(model, unet_call(model, batch=9))  # loads libraries and fills caches that remain
        call = unet_call(model, batch=9, side=(64, 64))
        with open("/proc/self/clear_refs", "w") as reset:
            reset.write("5")
        before = status("VmRSS")
        run(model, call)
    print(status("VmHWM") - before)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
