"""Options of more than one command, declared once."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Dtype(StrEnum):
    """Dtype of a model's weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Out = Annotated[Path, typer.Option("--output", "-o", help="Picture to write.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Denoising steps. Default: 50; of the tiny model, 6.")]
Seed = Annotated[int, typer.Option(min=0, help="Of the noise.")]
Precision = Annotated[Dtype, typer.Option(help="Of the model.")]
Device = Annotated[str | None, typer.Option(help="Default: cuda where there is one, else cpu.")]
Offload = Annotated[bool, typer.Option(help="Move each part of the model to the device only while it works.")]
Backend = Annotated[str, typer.Option(help="Of the attention; see flashbrush info.")]
Width = Annotated[
    int | None, typer.Option(help="At which the model sees all images, pixels; a multiple of 8.")
]
