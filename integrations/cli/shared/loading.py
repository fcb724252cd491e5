"""Load a pipeline for a command; anything wrong with the arguments or the checkpoint is one ValueError."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import Dtype

if TYPE_CHECKING:
    from PIL import Image


def load(
    kind: str, model: str, dtype: Dtype, device: str | None, offload: bool, backend: str, **options: Any
) -> Any:
    """A pipeline on its device.

    Args:
        kind: name of its class, in `pipelines`.
        model: a Hugging Face name or a diffusers folder.
        dtype: of the weights.
        device: None: cuda where there is one, else cpu.
        offload: whether parts of the model move to the device only while they work.
        backend: of the attention.
        options: passed on to from_pretrained.

    Raises:
        ValueError: a backend, a device or a model that cannot be used here.
    """
    import torch

    from ....bindings import backends
    from ... import pipelines

    if backend != "auto" and backend not in (known := backends()):
        raise ValueError(f"backend: expected auto or one of {', '.join(known)}, got {backend!r}")
    if backend != "auto" and (reasons := backends()[backend]):
        raise ValueError(f"backend: {backend!r} is not usable here: {'; '.join(reasons)}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise ValueError(f"device: {device!r} is not usable here: {reason}") from error
    if offload and torch.device(device).type == "cpu":
        raise ValueError(
            "offload: expected another device than the cpu, where parts that do not work are kept"
        )
    if os.sep in model and not Path(model).exists() and (Path(model).is_absolute() or model.startswith(".")):
        raise ValueError(f"model: no such folder: {model}")
    if Path(model).is_file():
        raise ValueError(f"model: expected a diffusers folder or a Hugging Face name, got a file: {model}")
    quiet()
    try:
        pipe = getattr(pipelines, kind).from_pretrained(
            model, dtype=getattr(torch, dtype.value), backend=backend, **options
        )
        if offload:
            pipe.pipe.enable_model_cpu_offload(device=device)
        else:
            pipe.to(device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # diffusers, transformers and safetensors each raise errors of their own
        said = str(error) or type(error).__name__
        raise ValueError(
            said if said.startswith("model:") else f"model: {model} cannot be loaded: {said}"
        ) from error
    return pipe


def or_tiny(model: str | None, hole: Image.Image, given: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The model of an insertion and the call's arguments; without a model, the tiny one and its defaults.

    Args:
        model: as given; None: the tiny model.
        hole: the photo's mask, from which the tiny model's crop follows.
        given: arguments of the call; those that are None are left out.
    """
    from .... import tiny_fill as tiny_folder
    from ...tiny_fill import options as tiny_fill

    shape = {name: value for name, value in given.items() if value is not None}
    if model is not None:
        return model, shape
    folder = str(tiny_folder())
    print(f"no --model is given: using flashbrush's own tiny model, {folder}, for trying things out")
    return folder, tiny_fill.options(hole) | shape


def quiet() -> None:
    """Let diffusers and transformers print errors only while they load."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
