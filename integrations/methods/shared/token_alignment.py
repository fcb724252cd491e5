"""The aligners of Prompt-to-Prompt: which text tokens of an edited prompt stand for which of the source's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

GAP, MATCH, MISMATCH = 0, 1, -1


@dataclass(frozen=True, eq=False)
class TokenAlignment:
    """For each text token of an edit, the source's tokens whose attention it takes (arXiv 2208.01626).

    Args:
        mapper: (tokens, tokens) float32; column j holds the share of each source token in the edit's token
            j.
        alphas: (tokens,) float32: 1 where the edit's token has a counterpart, 0 where it is new.
        prompts: (source, edit) that it was made for, where they are known.

    Raises:
        ValueError: other shapes or dtypes.

    Examples:
        >>> from diffusers import StableDiffusionPipeline
        >>> from flashbrush.integrations import TokenAlignment
        >>> pipe = StableDiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
        >>> length = pipe.tokenizer.model_max_length
        >>> alignment = TokenAlignment.replace("a cat", "a dog", pipe.tokenizer, length)
        >>> alignment.mapper.shape == (length, length)
        True
    """

    mapper: Tensor
    alphas: Tensor
    prompts: tuple[str, str] | None = None

    def __post_init__(self) -> None:
        length = len(self.alphas)
        for name, shape in (("mapper", (length, length)), ("alphas", (length,))):
            t = getattr(self, name)
            if t.dtype != torch.float32 or t.shape != shape:
                raise ValueError(f"{name}: expected float32 of shape {shape}, got {t.dtype} {tuple(t.shape)}")

    @staticmethod
    def replace(source: str, target: str, tokenizer: Any, length: int = 77) -> TokenAlignment:
        """For prompts with equally many words: each word takes the attention of the word in its place.

        Where the two words have different numbers of tokens, each of the n new tokens takes 1/n of the sum
        over the old ones. Padding keeps its position in the sequence. The released code counts positions in
        the sequence from the last replaced word on; where token counts differ it then hits another word.

        Args:
            source: the source's prompt; words are separated by white space.
            target: the edit's prompt.
            tokenizer: a Hugging Face tokenizer.
            length: of the padded sequence, in tokens.

        Raises:
            ValueError: different numbers of words; a prompt that is too long, or has words without tokens
                of their own.
        """
        ours, theirs = _words(source, tokenizer, length), _words(target, tokenizer, length)
        if len(ours) != len(theirs):
            raise ValueError(
                f"target: expected as many words as the source's {len(ours) - 2}, got {len(theirs) - 2}"
            )
        mapper = torch.zeros(length, length)
        for mine, yours in zip(ours, theirs, strict=True):
            if len(mine) == len(yours):
                mapper[mine, yours] = 1
            else:
                for j in yours:
                    mapper[mine, j] = 1 / len(yours)
        return TokenAlignment(_pad(mapper, sum(map(len, theirs))), torch.ones(length), (source, target))

    @staticmethod
    def refine(source: str, target: str, tokenizer: Any, length: int = 77) -> TokenAlignment:
        """For a prompt that adds words: common tokens keep the source's attention, new ones have their own.

        The token sequences are aligned by Needleman-Wunsch. Padding keeps its position in the sequence.

        Args:
            source: the source's prompt.
            target: the edit's prompt.
            tokenizer: a Hugging Face tokenizer.
            length: of the padded sequence, in tokens.

        Raises:
            ValueError: a prompt that is too long.
        """
        ours, theirs = _encode(source, tokenizer, length), _encode(target, tokenizer, length)
        mapper, alphas = torch.zeros(length, length), torch.zeros(length)
        for i, j in align(ours, theirs):
            mapper[i, j] = alphas[j] = 1
        alphas[len(theirs) :] = 1
        return TokenAlignment(_pad(mapper, len(theirs)), alphas, (source, target))


def word_tokens(prompt: str, words: str | Sequence[str], tokenizer: Any, length: int = 77) -> list[int]:
    """Positions of the tokens of words or phrases, wherever the prompt has them.

    Args:
        prompt: the model's prompt.
        words: one word or phrase, or several; whole words, in any case.
        tokenizer: a Hugging Face tokenizer.
        length: number of tokens that the model reads.

    Returns:
        The positions in the padded sequence, increasing.

    Raises:
        ValueError: the prompt has no such word, or only beyond `length`; a tokenizer whose tokens span
            words.

    Examples:
        >>> import flashbrush as fb
        >>> from diffusers import FluxFillPipeline
        >>> from flashbrush.integrations.methods.shared.token_alignment import word_tokens
        >>> pipe = FluxFillPipeline.from_pretrained(fb.tiny_fill())
        >>> word_tokens("a red star", ["red", "star"], pipe.tokenizer_2, length=16)
        [2, 3]
    """
    found: set[int] = set()
    tokens = _bare(prompt, tokenizer)
    first = _place(tokens, list(tokenizer(prompt).input_ids), prompt)
    for word in [words] if isinstance(words, str) else words:
        spans = [
            m.span() for m in re.finditer(rf"(?<!\w){re.escape(word.strip())}(?!\w)", prompt, re.IGNORECASE)
        ]
        if not word.strip() or not spans:
            raise ValueError(f"words: {word!r} is not in the prompt {prompt!r}")
        mine: list[int] = []
        for start, end in spans:
            before, until = (_bare(prompt[:n].rstrip(), tokenizer) for n in (start, end))
            if before != tokens[: len(before)] or until != tokens[: len(until)] or len(before) == len(until):
                raise ValueError(
                    f"tokenizer: expected one under which {word!r} in {prompt!r} has tokens of its own"
                )
            mine += range(first + len(before), first + len(until))
        if not (mine := [n for n in mine if n < length]):
            raise ValueError(
                f"words: {word!r} is beyond the {length} tokens that the model reads of the prompt"
            )
        found |= set(mine)
    return sorted(found)


def align(source: Sequence[int], target: Sequence[int]) -> list[tuple[int, int]]:
    """Pairs of positions with equal tokens in the best global alignment (Needleman-Wunsch), in order.

    Ties are broken from the end: a new target token before a removed source token before a pair.

    Args:
        source: tokens.
        target: tokens.
    """
    rows, columns = len(source) + 1, len(target) + 1
    score = [[GAP * (i + j) if not i or not j else 0 for j in range(columns)] for i in range(rows)]

    def diagonal(i: int, j: int) -> int:
        return score[i - 1][j - 1] + (MATCH if source[i - 1] == target[j - 1] else MISMATCH)

    for i in range(1, rows):
        for j in range(1, columns):
            score[i][j] = max(score[i][j - 1] + GAP, score[i - 1][j] + GAP, diagonal(i, j))
    pairs, i, j = [], rows - 1, columns - 1
    while i and j:
        if score[i][j] == score[i][j - 1] + GAP:
            j -= 1
        elif score[i][j] == score[i - 1][j] + GAP:
            i -= 1
        else:
            i, j = i - 1, j - 1
            pairs.append((i, j))
    return pairs[::-1]


def _pad(mapper: Tensor, end: int) -> Tensor:
    """The mapper, with each token from `end` on mapped to its own position."""
    rest = torch.arange(end, len(mapper))
    mapper[:, rest] = 0
    mapper[rest, rest] = 1
    return mapper


def _encode(prompt: str, tokenizer: Any, length: int) -> list[int]:
    tokens = list(tokenizer(prompt).input_ids)
    if not tokens or len(tokens) > length:
        raise ValueError(f"prompt: expected 1 to {length} tokens, got {len(tokens)} in {prompt!r}")
    return tokens


def _bare(text: str, tokenizer: Any) -> list[int]:
    """The text's tokens, without special ones."""
    return list(tokenizer(text, add_special_tokens=False).input_ids) if text else []


def _place(tokens: list[int], among: list[int], prompt: str) -> int:
    """The position among `among`, which has special tokens around them, at which the tokens begin."""
    starts = [n for n in range(len(among) - len(tokens) + 1) if among[n : n + len(tokens)] == tokens]
    if not starts:
        raise ValueError(
            f"tokenizer: expected one that only puts tokens before and after those of {prompt!r}"
        )
    return starts[0]


def _words(prompt: str, tokenizer: Any, length: int) -> list[list[int]]:
    """Positions of the tokens [before the first word, of each word, after the last word]."""
    everything = _encode(prompt, tokenizer, length)
    words = prompt.split()
    prefixes = [_bare(" ".join(words[:n]), tokenizer) for n in range(1, len(words) + 1)]
    tokens = prefixes[-1] if prefixes else []
    ends = [0, *map(len, prefixes)]
    if any(a >= b for a, b in pairwise(ends)) or any(p != tokens[: len(p)] for p in prefixes):
        raise ValueError(f"tokenizer: expected one under which each word of {prompt!r} has tokens of its own")
    first = _place(tokens, everything, prompt)
    places = [list(range(first + a, first + b)) for a, b in pairwise(ends)]
    return [list(range(first)), *places, list(range(first + len(tokens), len(everything)))]
