"""Models that come with the package."""

from __future__ import annotations

from pathlib import Path


def tiny_fill() -> Path:
    """The folder of a tiny FLUX.1-Fill in diffusers' format, trained from nothing for this package (its
    README.md).

    It inserts subjects of a few shapes, colours and patterns, and pieces of photos, into 64 x 64 pixels: for
    trying, testing and studying what is meant for the real one, not for pictures.

    Raises:
        FileNotFoundError: the package was installed without it.
    """
    folder = Path(__file__).parent / "tiny_fill"
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"tiny_fill: the checkpoint is not in {folder}: the package was installed without its data"
        )
    return folder
