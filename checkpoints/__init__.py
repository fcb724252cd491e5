"""Models that come with the package."""

from __future__ import annotations

from pathlib import Path


def tiny_fill() -> Path:
    """The folder of a tiny FLUX.1-Fill that comes with the package, in diffusers' format.

    A 16 MB stand-in for the real one: 64 x 64 pixel panels, trained on synthetic subjects. For tests and demos, not
    for real use. Its README.md says how it was trained and what it does.

    Returns:
        What the from_pretrained of diffusers and of the pipelines takes.

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
