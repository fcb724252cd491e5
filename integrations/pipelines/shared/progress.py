"""The progress bar of a pipeline's own loops."""

from __future__ import annotations

from typing import Any


def progress_bar(pipe: Any, what: str, total: int, progress: bool) -> Any:
    """A tqdm bar with the settings of diffusers' `set_progress_bar_config`.

    Args:
        pipe: the wrapped diffusers pipeline.
        what: the bar's description.
        total: steps.
        progress: False: the bar is not shown.
    """
    from tqdm.auto import tqdm

    config: dict[str, Any] = {"desc": what, **getattr(pipe, "_progress_bar_config", {})}
    return tqdm(total=total, **(config if progress else {**config, "disable": True}))
