"""Aligners of text tokens, on tokenizers with and without split words and special tokens."""

from __future__ import annotations

import random
from functools import lru_cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from flashbrush.integrations import TokenAlignment
from flashbrush.integrations.methods.shared.token_alignment import align, word_tokens

from ...tiny_sd import tiny_tokenizer


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """CLIP's tokenizer, whose tokens are single letters: start, letters, end."""
    return tiny_tokenizer(tmp_path_factory.mktemp("words") / "letters")


@pytest.fixture(scope="module")
def words() -> Any:
    """A tokenizer of whole words with an end token, as T5's."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = ["</s>", "<unk>", "a", "cat", "dog", "on", "the", "red", "mat"]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    template: Any = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 0)])
    tokenizer.post_processor = template
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def columns(mapper: Tensor) -> list[dict[int, Any]]:
    """{source token: share} of each target token"""
    return [{int(i): pytest.approx(float(c[i])) for i in c.nonzero()} for c in mapper.unbind(1)]


@lru_cache
def best(source: tuple[int, ...], target: tuple[int, ...]) -> int:
    """The score of the best alignment: gaps 0, equal tokens 1, different ones -1."""
    if not source or not target:
        return 0
    both = (1 if source[-1] == target[-1] else -1) + best(source[:-1], target[:-1])
    return max(best(source[:-1], target), best(source, target[:-1]), both)


def test_align_finds_the_best_alignment() -> None:
    rng = random.Random(0)
    for _ in range(200):
        source, target = (tuple(rng.choices(range(4), k=rng.randrange(9))) for _ in range(2))
        pairs = align(source, target)
        assert all(source[i] == target[j] for i, j in pairs) and len(pairs) == best(source, target)
        assert all(a < c and b < d for (a, b), (c, d) in pairwise(pairs))


def test_align_prefers_the_last_target_token_as_new() -> None:
    assert align([7], [7, 7]) == [(0, 0)]
    assert align([7, 7], [7]) == [(0, 0)]
    assert align([1, 2], [2, 1]) == [(1, 0)]


def test_replace_maps_words_in_place(words: Any) -> None:
    alignment = TokenAlignment.replace("a cat on the mat", "a dog on the mat", words, 9)
    assert torch.equal(alignment.mapper, torch.eye(9)) and torch.equal(alignment.alphas, torch.ones(9))


def test_replace_splits_a_word_evenly(letters: Any) -> None:
    # start a | b c | d end, and start a | x y z | d end
    more = TokenAlignment.replace("a bc d", "a xyz d", letters, 9).mapper
    third = {2: 1 / 3, 3: 1 / 3}
    assert columns(more) == [{0: 1}, {1: 1}, third, third, third, {4: 1}, {5: 1}, {7: 1}, {8: 1}]
    fewer = TokenAlignment.replace("a xyz d", "a b d", letters, 8).mapper
    assert columns(fewer) == [{0: 1}, {1: 1}, {2: 1, 3: 1, 4: 1}, {5: 1}, {6: 1}, {5: 1}, {6: 1}, {7: 1}]
    several = TokenAlignment.replace("ab c d", "x c de", letters, 7)
    assert columns(several.mapper) == [{0: 1}, {1: 1, 2: 1}, {3: 1}, {4: 0.5}, {4: 0.5}, {5: 1}, {6: 1}]
    assert torch.equal(several.alphas, torch.ones(7))


def test_refine_maps_common_tokens(words: Any, letters: Any) -> None:
    alignment = TokenAlignment.refine("a cat on the mat", "a red cat on the red mat", words, 10)
    assert alignment.alphas.tolist() == [1, 0, 1, 1, 1, 0, 1, 1, 1, 1]
    assert columns(alignment.mapper) == [
        {0: 1},
        {},
        {1: 1},
        {2: 1},
        {3: 1},
        {},
        {4: 1},
        {5: 1},
        {8: 1},
        {9: 1},
    ]
    gone = TokenAlignment.refine("a b c", "a c d", letters, 7)
    assert gone.alphas.tolist() == [1, 1, 1, 0, 1, 1, 1]
    assert columns(gone.mapper) == [{0: 1}, {1: 1}, {3: 1}, {}, {4: 1}, {5: 1}, {6: 1}]


def test_same_prompt_is_aligned_with_itself(words: Any, letters: Any) -> None:
    for tokenizer, prompt in ((words, "the red cat"), (letters, "ab c")):
        for alignment in (TokenAlignment.replace, TokenAlignment.refine):
            result = alignment(prompt, prompt, tokenizer, 8)
            assert torch.equal(result.mapper, torch.eye(8)) and torch.equal(result.alphas, torch.ones(8))


def test_word_tokens_finds_every_occurrence(words: Any, letters: Any) -> None:
    assert word_tokens("a cat on a mat", "a", words) == [0, 3]
    assert word_tokens("a cat on a mat", ["mat", "cat"], words) == [1, 4]
    assert word_tokens("a bc d bc", "bc", letters) == [2, 3, 5, 6]
    assert word_tokens("a Red cat, red", "red", words) == [1, 4]  # the comma is a token of its own
    assert word_tokens("a red cat", "red cat", words) == [1, 2]
    assert word_tokens("a bc d bc", "bc", letters, 4) == [2, 3]
    assert word_tokens("a cat", [], words) == []


class Joining:
    """A tokenizer whose tokens span words."""

    def __call__(self, prompt: str, add_special_tokens: bool = True) -> Any:
        ids = [len(prompt)]
        return type("Encoding", (), {"input_ids": ids})


def test_call_that_does_not_fit_raises(words: Any) -> None:
    with pytest.raises(ValueError, match=r"^target: expected as many words as the source's 2, got 3"):
        TokenAlignment.replace("a cat", "a red cat", words)
    for aligner in (TokenAlignment.replace, TokenAlignment.refine):
        with pytest.raises(ValueError, match=r"^prompt: expected 1 to 3 tokens, got 6"):
            aligner("a cat on the mat", "a cat", words, 3)
    with pytest.raises(ValueError, match=r"^tokenizer: "):
        TokenAlignment.replace("a cat", "a dog", Joining())
    for wrong in ("bird", "ca", " "):
        with pytest.raises(ValueError, match=rf"^words: '{wrong}' is not in the prompt"):
            word_tokens("a cat", wrong, words)
    with pytest.raises(ValueError, match=r"^words: 'mat' is beyond the 3 tokens"):
        word_tokens("a cat on the mat", "mat", words, 3)
    with pytest.raises(ValueError, match=r"^tokenizer: "):
        word_tokens("a cat", "cat", Joining())
    with pytest.raises(ValueError, match=r"^mapper: expected float32 of shape \(3, 3\)"):
        TokenAlignment(torch.eye(4), torch.ones(3))
    with pytest.raises(ValueError, match=r"^alphas: "):
        TokenAlignment(torch.eye(3), torch.ones(3).double())
