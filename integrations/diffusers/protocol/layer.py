"""Layer and Step: where a method is asked for a plan."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layer:
    """One attention layer in one forward call.

    Tokens are in the order [text ; image] whatever the model's own order. Attention is
    permutation-equivariant, so a processor may join its streams this way.

    Rows and keys by kind: "self": image tokens attend to image tokens. "cross": image tokens attend to text.
    "added" (the UNets of DeepFloyd IF and Kandinsky): image tokens attend to [text ; image]. All others:
    [text ; image] attends to itself.

    Attributes:
        index: position among the model's attention layers, in the order of the forward pass.
        kind: "double" or "single" (FLUX), "joint" or "self" (SD 3), "self", "cross" or "added" (UNet).
        place: "down", "mid" or "up" in a UNet; None in other models.
        heads: attention heads, on all ranks together.
        head_dim: channels of a head.
        text_len: text tokens, padding included; 0 in "self".
        image_len: image tokens.
        batch: items of the call; with classifier-free guidance both halves.
        grid: (rows, columns) of the image tokens; in FLUX None unless `Handle.grid` is set.

    Examples:
        >>> from flashbrush.integrations.diffusers import Layer
        >>> layer = Layer(0, "double", None, heads=24, head_dim=128, text_len=512, image_len=4096)
        >>> layer.rows, layer.keys
        (4608, 4608)
    """

    index: int
    kind: str
    place: str | None
    heads: int
    head_dim: int
    text_len: int
    image_len: int
    batch: int = 1
    grid: tuple[int, int] | None = None

    @property
    def rows(self) -> int:
        """The number of tokens that attend."""
        return self.image_len if self.kind in ("self", "cross", "added") else self.text_len + self.image_len

    @property
    def keys(self) -> int:
        """The number of tokens that are attended to."""
        return self.text_len if self.kind == "cross" else self.text_len + self.image_len


@dataclass(frozen=True)
class Step:
    """One denoising step, as far as it is known without reading from the GPU.

    Attributes:
        index: 0 for the first step.
        count: steps of the run; None: unknown.
        sigma: noise level at which the model is evaluated; None: unknown.
    """

    index: int
    count: int | None = None
    sigma: float | None = None
