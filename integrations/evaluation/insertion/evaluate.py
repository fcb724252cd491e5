"""Running and measuring insertions: every item under every setting, from the same seeds."""

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
    """The knobs of an insertion; Setting() is the stock model, with known tokens set back after every step.

    Attributes:
        alpha_prompt: as in InContextBrush.
        alpha_subject: as in InContextBrush.
        gain_span: as in InContextBrush.
        hole_only: as in InContextBrushPipeline.
        blend: as in InContextBrushPipeline.
        grow: pixels by which the mask is dilated, or eroded below 0; results are measured on the item's own
            mask.
    """

    alpha_prompt: float = 0.0
    alpha_subject: float = 0.0
    gain_span: float = 0.0
    hole_only: bool = False
    blend: bool = True
    grow: int = 0

    def mask(self, mask: Image.Image) -> Image.Image:
        """The mask for the pipeline.

        Raises:
            ValueError: nothing of it is left after eroding.
        """
        if not self.grow:
            return mask
        side = 2 * abs(self.grow) + 1
        grown = mask.filter((ImageFilter.MaxFilter if self.grow > 0 else ImageFilter.MinFilter)(side))
        if grown.getbbox() is None:
            raise ValueError(f"grow: nothing is left of a mask that is eroded by {-self.grow} pixels")
        return grown


@dataclass(frozen=True)
class Outcome:
    """One result and its measures.

    Attributes:
        item: what was inserted.
        seed: of the noise.
        setting: the knobs.
        picture: the result, of the photo's size.
        measured: by name, those of judges.MEASURES that the item allows.
    """

    item: Item
    seed: int
    setting: Setting
    picture: Image.Image
    measured: dict[str, float]

    @property
    def kind(self) -> str:
        """The sort of the item: its name without the number."""
        return self.item.name.rstrip("0123456789").rstrip("_")

    def row(self) -> dict[str, Any]:
        """Fields for a CSV file."""
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
    """Insert every item under every setting, and measure the results.

    Item i has the seeds seed + i, seed + len(items) + i ..., under all settings.

    Args:
        pipe: the pipeline.
        items: what to insert.
        settings: the knobs to compare.
        options: function from an item to further arguments of the pipeline's call (width, height, steps ...).
        seed: of the first item.
        repeats: seeds per item.
        batch: items per call, where their photos' sizes and their options agree.
        paste_back: False: measure the model's own picture of the whole photo. Needs options without
            padding_mask_crop, and with the photo's own width and height.
        models: loaded judges; None: only judges that need no model.
        progress: whether to show a progress bar.

    Returns:
        Outcomes in the order of settings, repeats and items.

    Raises:
        ValueError: no items, no settings, or a result of another size than the photo.
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
    """Indices of neighbouring items that one call of the pipeline can take together."""

    def call(i: int) -> tuple[Any, ...]:
        return items[i].image.size, options(items[i]), items[i].subject_mask is None

    for _, group in groupby(range(len(items)), call):
        numbers = list(group)
        yield from (numbers[first : first + batch] for first in range(0, len(numbers), batch))
