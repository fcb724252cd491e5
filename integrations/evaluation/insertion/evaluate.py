"""Insertions, run and measured: every item under every setting, all from the same seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from PIL import Image, ImageFilter
from tqdm import tqdm

from ...methods import InContextBrush
from ...pipelines import InContextBrushPipeline
from .items import Item
from .judges import Models, measure

Options = Callable[[Item], dict[str, Any]]


@dataclass(frozen=True)
class Setting:
    """What an insertion is made with; Setting() is the stock model with what is known put back.

    Attributes:
        alpha_prompt, alpha_subject, gain_span, hole_only: as in InContextBrush and its pipeline.
        blend: as in InContextBrushPipeline.
        grow: pixels by which the mask is dilated, below 0 eroded; measured is on the mask as it was.
    """

    alpha_prompt: float = 0.0
    alpha_subject: float = 0.0
    gain_span: float = 0.0
    hole_only: bool = False
    blend: bool = True
    grow: int = 0

    def mask(self, mask: Image.Image) -> Image.Image:
        """The mask that the pipeline is given. ValueError where eroding leaves nothing of it."""
        if not self.grow:
            return mask
        side = 2 * abs(self.grow) + 1
        grown = mask.filter((ImageFilter.MaxFilter if self.grow > 0 else ImageFilter.MinFilter)(side))
        if grown.getbbox() is None:
            raise ValueError(f"grow: nothing is left of a mask that is eroded by {-self.grow} pixels")
        return grown


@dataclass(frozen=True)
class Outcome:
    """One picture and what was measured of it.

    Attributes:
        item, seed, setting: what it was made of.
        picture: of the photo's size.
        measured: by the names of judges.MEASURES; those that the item allows.
    """

    item: Item
    seed: int
    setting: Setting
    picture: Image.Image
    measured: dict[str, float]

    @property
    def kind(self) -> str:
        """The name without its number: what sort of item it is."""
        return self.item.name.rstrip("0123456789").rstrip("_")

    def row(self) -> dict[str, Any]:
        """For a CSV file."""
        return {
            "item": self.item.name,
            "kind": self.kind,
            "seed": self.seed,
            **asdict(self.setting),
            **self.measured,
        }


def evaluate(
    pipe: InContextBrushPipeline,
    items: Sequence[Item],
    settings: Sequence[Setting],
    *,
    options: Options,
    seed: int = 0,
    repeats: int = 1,
    batch: int = 16,
    paste_back: bool = True,
    models: Models | None = None,
    progress: bool = True,
) -> list[Outcome]:
    """Insert every item under every setting. Item i has the seeds seed + i, seed + len(items) + i ... under
    all of them.

    Args:
        options: of the pipeline's call, for an item (width, height, steps ...).
        repeats: seeds of an item.
        batch: items of one call, where their photos' sizes and their options agree.
        paste_back: False: measure what the model makes of the whole photo. Needs options without
            padding_mask_crop, and with the photo's own width and height.
        models: judges that are loaded; None: those that need no model.

    Raises:
        ValueError: no items, no settings, or a result that has not the photo's size.
    """
    if not items or not settings:
        raise ValueError(f"evaluate: expected items and settings, got {len(items)} and {len(settings)}")
    outcomes = []
    with tqdm(total=len(items) * len(settings) * repeats, desc="inserting", disable=not progress) as bar:
        for setting in settings:
            method = InContextBrush(setting.alpha_prompt, setting.alpha_subject, setting.gain_span)
            for repeat in range(repeats):
                for numbers in _batches(items, options, batch):
                    some = [items[i] for i in numbers]
                    seeds = [seed + repeat * len(items) + i for i in numbers]
                    made = pipe(
                        [item.prompt for item in some],
                        subject=[item.subject for item in some],
                        subject_mask=_masks(some),
                        image=[item.image for item in some],
                        mask=[setting.mask(item.mask) for item in some],
                        method=method,
                        seed=seeds,
                        blend=setting.blend,
                        hole_only=setting.hole_only,
                        paste_back=paste_back,
                        progress=False,
                        **options(some[0]),
                    )
                    for item, number, picture in zip(some, seeds, made.images, strict=True):
                        measured = measure(item, picture)
                        if models is not None:
                            measured |= models.measure(item, picture)
                        outcomes.append(Outcome(item, number, setting, picture, measured))
                    bar.update(len(some))
    return outcomes


def _masks(items: Sequence[Item]) -> list[Image.Image] | None:
    return (
        None
        if items[0].subject_mask is None
        else [item.subject_mask for item in items if item.subject_mask is not None]
    )


def _batches(items: Sequence[Item], options: Options, batch: int) -> Iterator[list[int]]:
    """Neighbours that one call of the pipeline can take together."""

    def call(i: int) -> tuple[Any, ...]:
        return items[i].image.size, options(items[i]), items[i].subject_mask is None

    for _, group in groupby(range(len(items)), call):
        numbers = list(group)
        yield from (numbers[first : first + batch] for first in range(0, len(numbers), batch))
