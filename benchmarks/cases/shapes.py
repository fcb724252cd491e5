"""The named shapes that are measured, each with the control that a method puts on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ...bindings import Contrast, Control, HeadGain, Segments

Pair = tuple[str, str]

# In-Context Brush as released (arXiv 2505.20271): the target's rows weight prompt and subject by 1.3. All
# rows of a head are multiplied by its gain: 1 for the head whose target attends least to the prompt, 1.2 for
# the one whose target attends most.
BRUSH: Mapping[Pair, float] = {("target", "prompt"): 1.3, ("target", "subject"): 1.3}
BRUSH_GAIN = HeadGain(rows="target", keys="prompt", span=0.2, floor=1.0, norm="minmax", apply_to="*")


@dataclass(frozen=True)
class Shape:
    """Sizes of q (batch, rows, heads, dim), k and v (batch, keys, heads, dim), and a control for them.

    Attributes:
        name: of the shape in the results.
        batch: items.
        heads: of q, k and v.
        dim: of a head.
        rows: tokens of each row segment.
        keys: tokens of each key segment.
        weight: as in flashbrush.Control, as are the following.
        head_gain: derived gain.
        groups: softmax groups.
        gates: of the groups.
        contrast: of the probabilities.
    """

    name: str
    batch: int
    heads: int
    dim: int
    rows: Mapping[str, int]
    keys: Mapping[str, int]
    weight: Mapping[Pair, float] = field(default_factory=lambda: BRUSH)
    head_gain: HeadGain | None = BRUSH_GAIN
    groups: Mapping[str, Sequence[str]] | None = None
    gates: Mapping[str, float] = field(default_factory=dict)
    contrast: Contrast | None = None

    @property
    def n_rows(self) -> int:
        return sum(self.rows.values())

    @property
    def n_keys(self) -> int:
        return sum(self.keys.values())

    @property
    def flops(self) -> int:
        """Floating-point operations of the two matrix products, QK^T and PV."""
        return 4 * self.batch * self.heads * self.n_rows * self.n_keys * self.dim

    @property
    def size(self) -> str:
        """The text (batch,heads,tokens,dim); tokens is ROWSxKEYS where they differ."""
        tokens = str(self.n_rows) if self.n_rows == self.n_keys else f"{self.n_rows}x{self.n_keys}"
        return f"({self.batch},{self.heads},{tokens},{self.dim})"

    def control(self) -> Control:
        rows = Segments(dict(self.rows))
        keys = rows if self.keys == self.rows else Segments(dict(self.keys))
        return Control(
            rows,
            keys,
            weight=dict(self.weight),
            head_gain=self.head_gain,
            groups=self.groups,
            gates=self.gates,
            contrast=self.contrast,
        )

    def shrunk(self, longest: int = 40, heads: int = 3) -> Shape:
        """The same structure with short segments and few heads, for warming up and for checks in full."""
        rows = {name: min(n, longest) for name, n in self.rows.items()}
        keys = {name: min(n, longest) for name, n in self.keys.items()}
        return replace(self, name=f"{self.name} (shrunk)", heads=min(self.heads, heads), rows=rows, keys=keys)


def diptych(name: str, heads: int, prompt: int, panel: int, dim: int) -> Shape:
    """In-context insertion on FLUX: joint attention over a prompt and two image panels."""
    tokens = {"prompt": prompt, "subject": panel, "target": panel}
    return Shape(name, 1, heads, dim, tokens, tokens)


def text_cross_attention(name: str, batch: int, heads: int, rows: int, words: int, dim: int) -> Shape:
    """Prompt-to-Prompt's re-weighting on a UNet: each token of the prompt is a key segment of its own."""
    keys = {f"word_{i}": 1 for i in range(words)}
    weight = {("image", word): 0.5 + 1.5 * i / (words - 1) for i, word in enumerate(keys)}
    return Shape(name, batch, heads, dim, {"image": rows}, keys, weight, None)


def by_name(*shapes: Shape) -> dict[str, Shape]:
    return {shape.name: shape for shape in shapes}


SHAPES: dict[str, Shape] = by_name(
    *(diptych(f"h8-1024-d{d}", 8, 128, 448, d) for d in (64, 128)),
    *(diptych(f"h4-2048-d{d}", 4, 256, 896, d) for d in (64, 128)),
    *(diptych(f"h24-1536-d{d}", 24, 512, 512, d) for d in (64, 128)),
    diptych("flux-768-diptych-d64", 24, 512, 2304, 64),
    # FLUX: 512 text tokens and two panels of 768 x 768 pixels, 48 x 48 tokens each.
    diptych("flux-768-diptych", 24, 512, 2304, 128),
    text_cross_attention("sd15-text-cross", 8, 8, 4096, 77, 40),
)
QUICK: dict[str, Shape] = by_name(
    diptych("quick-diptych-d64", 2, 33, 80, 64),
    diptych("quick-diptych-d128", 3, 40, 64, 128),
    text_cross_attention("quick-text-cross", 2, 2, 150, 77, 40),
)
EVERY: dict[str, Shape] = {**SHAPES, **QUICK}
