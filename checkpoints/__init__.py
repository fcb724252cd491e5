"""Models that come with the package."""

from __future__ import annotations

from pathlib import Path


def tiny_fill() -> Path:
    """The folder of a 16 MB stand-in for FLUX.1-Fill, for tests and demos, not for real use.

    A checkpoint in diffusers' format with panels of 64 x 64 pixels, trained on synthetic subjects; see
    README.md in the folder.

    Returns:
        The path of the folder.

    Raises:
        FileNotFoundError: the package was installed without it.

    Examples:
        >>> import flashbrush as fb
        >>> (fb.tiny_fill() / "model_index.json").is_file()
        True
    """
    folder = Path(__file__).parent / "tiny_fill"
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"tiny_fill: the checkpoint is not in {folder}: the package was installed without its data"
        )
    return folder
