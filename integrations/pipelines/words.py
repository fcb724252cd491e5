"""Words of a prompt as positions among its tokens."""

from __future__ import annotations

import re
from typing import Any


def word_tokens(tokenizer: Any, prompt: str, word: str, max_length: int | None = None) -> list[int]:
    """The positions of the tokens that a word, or a phrase, of the prompt is made of; all its occurrences.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        prompt: what the model is given.
        word: as it is written there, in whole words; upper and lower case are the same.
        max_length: tokens that the model reads; None: the tokenizer's own limit.

    Raises:
        TypeError: a tokenizer that does not tell where its tokens come from.
        ValueError: the word is not in the prompt, or only beyond `max_length`.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise TypeError(f"tokenizer: expected a fast one, which knows its tokens' places, got {type(tokenizer).__name__}")
    found = [match.span() for match in re.finditer(rf"(?<!\w){re.escape(word.strip())}(?!\w)", prompt, re.IGNORECASE)]
    if not word.strip() or not found:
        raise ValueError(f"word: {word!r} is not in the prompt {prompt!r}")
    limit = tokenizer.model_max_length if max_length is None else min(max_length, tokenizer.model_max_length)
    places = tokenizer(prompt, truncation=True, max_length=limit, return_offsets_mapping=True)["offset_mapping"]
    tokens = [i for i, (a, b) in enumerate(places) if a < b and any(a < end and start < b for start, end in found)]
    if not tokens:
        raise ValueError(f"word: {word!r} is beyond the {limit} tokens that the model reads of the prompt")
    return tokens
