"""Layer and Step: what a method is told of where it is asked for a plan."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layer:
    """One attention layer during one forward call.

    A method sees the joint sequence as [text ; image] whatever the architecture's own order: attention is
    permutation-equivariant, and a processor joins its streams in this order.

    The kinds differ in their rows and keys: image tokens attend to image tokens in "self", to text in
        "cross", to
    [text ; image] in "added" (DeepFloyd IF's and Kandinsky's UNets); elsewhere [text ; image] attends to
    itself.
    """

    index: int  # place among the model's attention layers, in the order of the forward pass
    kind: str  # "double" or "single" (FLUX), "joint" or "self" (SD3), "self", "cross" or "added" (UNet)
    place: str | None  # "down", "mid" or "up" in a UNet, None elsewhere
    heads: int
    head_dim: int
    text_len: int  # text tokens of the layer, padding included; 0 where it is "self"
    image_len: int  # image tokens
    batch: int = 1  # items of the call, both halves of a classifier-free guidance included
    grid: tuple[int, int] | None = (
        None  # (rows, columns) of the image tokens; FLUX: where the handle has been told
    )

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
    """One denoising step, as far as it is known without asking the GPU."""

    index: int  # 0, 1, ...
    count: int | None = None  # steps of the run
    sigma: float | None = None  # noise level at which the model is evaluated
