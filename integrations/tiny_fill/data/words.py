"""The tiny model's vocabulary, and the prompts of its training data."""

from __future__ import annotations

import string
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TEXT_TOKENS = 16
SHAPES = (
    "circle",
    "square",
    "triangle",
    "star",
    "heart",
    "diamond",
    "hexagon",
    "flower",
    "ring",
    "cross",
    "moon",
    "drop",
    "blob",
)
PATTERNS = ("plain", "striped", "dotted", "checked", "photo")
# Names for a photo's piece. They are chosen at random, so the model cannot learn what they look like.
NOUNS = (
    "cat",
    "dog",
    "bird",
    "cup",
    "mug",
    "coffee",
    "chair",
    "bottle",
    "ball",
    "toy",
    "car",
    "tree",
    "person",
    "face",
    "hat",
    "shoe",
    "bag",
    "book",
    "clock",
    "vase",
    "rocket",
    "horse",
    "cake",
    "lamp",
    "plant",
)
COLOURS = {
    "red": (0.82, 0.12, 0.12),
    "orange": (0.95, 0.55, 0.10),
    "yellow": (0.95, 0.85, 0.15),
    "green": (0.15, 0.60, 0.20),
    "cyan": (0.15, 0.75, 0.80),
    "blue": (0.12, 0.25, 0.80),
    "purple": (0.50, 0.18, 0.65),
    "pink": (0.95, 0.50, 0.70),
    "brown": (0.45, 0.27, 0.12),
    "black": (0.08, 0.08, 0.08),
    "white": (0.96, 0.96, 0.96),
    "grey": (0.50, 0.50, 0.50),
}
OTHER = (
    "a",
    "an",
    "the",
    "of",
    "in",
    "on",
    "at",
    "with",
    "and",
    "to",
    "is",
    "photo",
    "picture",
    "image",
    "table",
    "small",
    "large",
    "old",
    "new",
    "left",
    "right",
    "sitting",
    "standing",
    "lying",
    "wooden",
    "metal",
    "glass",
    "background",
    "stripes",
    "dots",
    "checks",
    "nothing",
)
SPECIAL = ("<pad>", "</s>", "<s>", "<unk>")


def prompt(shape: int, pattern: int, colour: int, second: int, noun: int) -> str:
    """The prompt of a subject: "a red star with blue stripes", "a plain green ring" or "a photo of a cat".

    Args:
        shape: index into SHAPES.
        pattern: index into PATTERNS.
        colour: index into COLOURS.
        second: index into COLOURS, of the pattern's second colour.
        noun: index into NOUNS.
    """
    names = tuple(COLOURS)
    if PATTERNS[pattern] == "photo":
        return f"a photo of a {NOUNS[noun]}"
    if PATTERNS[pattern] == "plain":
        return f"a plain {names[colour]} {SHAPES[shape]}"
    drawn = {"striped": "stripes", "dotted": "dots", "checked": "checks"}[PATTERNS[pattern]]
    return f"a {names[colour]} {SHAPES[shape]} with {names[second]} {drawn}"


def vocabulary() -> dict[str, int]:
    """Token ids by word, with single letters for spelling unknown words."""
    letters = string.ascii_lowercase + string.digits + string.punctuation
    words = (*SPECIAL, *OTHER, *SHAPES, *PATTERNS, *NOUNS, *COLOURS, *letters, *(f"##{c}" for c in letters))
    return {token: i for i, token in enumerate(dict.fromkeys(words))}


def tokenizer() -> PreTrainedTokenizerFast:
    """A word-piece tokenizer of the vocabulary, for texts of up to TEXT_TOKENS tokens."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = vocabulary()
    made = Tokenizer(models.WordPiece(ids, unk_token="<unk>"))
    made.normalizer = normalizers.BertNormalizer()  # pyright: ignore[reportAttributeAccessIssue]
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # pyright: ignore[reportAttributeAccessIssue]
    made.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="<s> $A </s>", special_tokens=[("<s>", ids["<s>"]), ("</s>", ids["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        model_max_length=TEXT_TOKENS,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
