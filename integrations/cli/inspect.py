"""flashbrush inspect: attention maps, mass and head gains of an insertion."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .shared.loading import load, or_tiny
from .shared.options import Backend, Device, Dtype, Offload, Precision, Seed, Steps
from .shared.output import check_folder, check_packages, write_pictures

if TYPE_CHECKING:
    from ..methods import AttentionMaps
    from ..pipelines import InContextBrushOutput

SEEN = 10  # steps of a run whose maps are kept by default: each keeps a map per layer and name


def inspect(
    subject: Annotated[Path, typer.Option(help="Photo of the subject.")],
    image: Annotated[Path, typer.Option(help="Photo to insert it into.")],
    mask: Annotated[Path, typer.Option(help="Of the image's size, white where to paint.")],
    prompt: Annotated[str, typer.Option(help="What the result shows.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder; made where it is not there.")],
    word: Annotated[
        list[str] | None, typer.Option(help="A word or phrase of the prompt. Repeat it for more.")
    ] = None,
    region: Annotated[
        list[str] | None, typer.Option(help="NAME=FILE: white on a part of the image. Repeat it.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="FLUX.1-Fill: a Hugging Face name or a folder. Default: a tiny one.")
    ] = None,
    subject_mask: Annotated[
        Path | None, typer.Option(help="White on the subject. Default: its transparency, or all.")
    ] = None,
    alpha_prompt: Annotated[float, typer.Option(help="As in insert.")] = 0.3,
    alpha_subject: Annotated[float, typer.Option(help="As in insert.")] = 0.3,
    gain_span: Annotated[float, typer.Option(help="As in insert.")] = 0.2,
    every: Annotated[
        int | None,
        typer.Option(min=1, help="Record every N-th step. Default: N such that 10 steps or fewer are kept."),
    ] = None,
    heads: Annotated[bool, typer.Option(help="Keep each head's maps, not only their mean.")] = False,
    steps: Steps = None,
    guidance: Annotated[float, typer.Option(min=0, help="Guidance scale.")] = 30.0,
    seed: Seed = 0,
    width: Annotated[int | None, typer.Option(help="Of a panel, pixels; a multiple of 16.")] = None,
    height: Annotated[int | None, typer.Option(help="Of a panel, pixels; a multiple of 16.")] = None,
    padding_mask_crop: Annotated[int | None, typer.Option(min=0, help="As in insert.")] = None,
    dtype: Precision = Dtype.bfloat16,
    device: Device = None,
    offload: Offload = False,
    backend: Backend = "auto",
) -> None:
    """What the image tokens attend to: maps of words and regions, tables of mass, gains of heads.

    Writes maps.png, maps.npz (all arrays) and mass.csv (what each part of the sequence gives to each, by
    layer).
    """
    from ..methods import AttentionMaps, InContextBrush
    from ..pipelines import images as im
    from .shared.figures import maps_report

    check_folder("output", output)
    check_packages("inspect", "matplotlib")
    method = InContextBrush(alpha_prompt, alpha_subject, gain_span)
    photo = im.open_image(image, "image")
    hole = im.open_mask(mask, photo.size)
    im.open_image(subject, "subject")
    regions = _regions(region or [])
    for path in regions.values():
        im.open_mask(path, photo.size, "region")
    frame = {"width": width, "height": height, "padding_mask_crop": padding_mask_crop}
    model, shape = or_tiny(model, hole, frame | {"steps": steps})
    pipe = load("InContextBrushPipeline", model, dtype, device, offload, backend)
    frame = {name: shape[name] for name in frame if name in shape}
    asked: dict[str, Any] = {"image": image, "mask": mask, **frame}
    panel = pipe.region_tokens(None, **asked)
    places = {name: pipe.region_tokens(path, **asked) for name, path in regions.items()}
    places |= {"subject": range(len(panel)), "hole": pipe.region_tokens(mask, **asked)}
    words = {one: pipe.word_tokens(prompt, one) for one in word or []}
    count = shape.get("steps", 50)
    maps = AttentionMaps(words, places, every=every or -(-count // SEEN), heads=heads)
    result = pipe(
        prompt,
        subject=subject,
        image=image,
        mask=mask,
        subject_mask=subject_mask,
        method=method,
        guidance_scale=guidance,
        seed=seed,
        maps=maps,
        **shape,
    )
    output.mkdir(parents=True, exist_ok=True)
    figure = maps_report(result, maps, prompt)
    write_pictures(
        {
            output / "maps.png": lambda path: figure.savefig(path, dpi=110),
            output / "maps.npz": lambda path: _write_arrays(path, result, maps),
            output / "mass.csv": lambda path: _write_mass(path, result),
        }
    )
    print(f"the figure is {output / 'maps.png'}, its numbers are in maps.npz and mass.csv beside it")


def _regions(given: list[str]) -> dict[str, Path]:
    """File by name, of "NAME=FILE" options."""
    regions: dict[str, Path] = {}
    for one in given:
        name, equals, path = one.partition("=")
        if not (name and equals and path) or name in (*regions, "subject", "hole"):
            raise ValueError(
                f"region: expected NAME=FILE, each name once and none subject or hole, got {one!r}"
            )
        regions[name] = Path(path)
    return regions


def _write_arrays(path: Path, result: InContextBrushOutput, maps: AttentionMaps) -> None:
    """Write maps.npz.

    maps is (steps seen, layers, heads or 1, names, rows, columns), mass (steps, layers, heads, row segments,
    key segments), gains (steps, layers, heads); names, steps, layer_kinds and segments label their
    dimensions.
    """
    import numpy as np
    import torch

    assert result.mass is not None
    seen, layers = sorted({m.step for m in maps.maps}), sorted({m.layer for m in maps.maps})
    by_place = {(m.step, m.layer): m.values[0].unflatten(-1, m.grid).cpu() for m in maps.maps}
    stacked = torch.stack([torch.stack([by_place[step, layer] for layer in layers]) for step in seen])
    np.savez_compressed(
        path,
        maps=stacked.numpy(),
        names=np.array(maps.names),
        steps=np.array(seen),
        layer_kinds=np.array(result.layer_kinds),
        mass=result.mass[:, :, 0].numpy(),
        segments=np.array(result.segments),
        gains=result.head_gains[:, :, 0].numpy(),
    )


def _write_mass(path: Path, result: InContextBrushOutput) -> None:
    """Write mass.csv: shares of each row segment's attention by layer, mean over steps and heads."""
    from ..evaluation.csv_files import write_csv

    assert result.mass is not None
    mass = result.mass[:, :, 0].mean((0, 2))  # (layers, row segments, key segments)
    shares = mass / mass.sum(-1, keepdim=True)
    names = result.segments
    rows = [
        {
            "layer": i,
            "kind": kind,
            "from": name,
            **{f"to {key}": f"{shares[i, r, c]:.5f}" for c, key in enumerate(names)},
        }
        for i, kind in enumerate(result.layer_kinds)
        for r, name in enumerate(names)
    ]
    write_csv(path, rows)
