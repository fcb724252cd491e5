"""The shapes that are measured on a GPU."""

from __future__ import annotations

from dataclasses import replace

from ..cases.shapes import SHAPES, Shape, by_name, diptych

# FLUX: 512 text tokens, 16 x 16 pixels to an image token. SD3: 77 + 256 text tokens. SD 1.5's self-attention
# is that of a UNet at 64 x 64 and at 32 x 32 latents, with its tokens cut into a diptych's segments.
GPU_SHAPES: dict[str, Shape] = by_name(
    diptych("flux-1024", 24, 512, 2048, 128),
    SHAPES["flux-768-diptych"],
    diptych("flux-1024-diptych", 24, 512, 4096, 128),
    replace(diptych("sd15-64", 8, 128, 1984, 40), batch=8),
    replace(diptych("sd15-32", 8, 64, 480, 80), batch=8),
    replace(diptych("sd3-1024", 24, 333, 2048, 64), batch=2),
    diptych("tokens-16k", 24, 512, 7936, 128),
    diptych("tokens-64k", 24, 512, 32512, 128),
)
MAIN = "flux-768-diptych"
LAYERS = ("flux-768-diptych", "flux-1024-diptych")
LONG = ("tokens-16k", "tokens-64k")
SMALL = (
    "sd15-32",
    "sd15-64",
    "sd3-1024",
)  # timed within a CUDA graph too: a launch takes about as long as its work


def dry(shape: Shape) -> Shape:
    """The same segments at a size that a CPU core computes in milliseconds."""
    lengths = {"prompt": 11, "subject": 24, "target": 24}
    return replace(shape, batch=min(shape.batch, 2), heads=min(shape.heads, 2), rows=lengths, keys=lengths)
