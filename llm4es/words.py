"""Words: what a tokenizer reads by itself, so that its ids can be remembered and put together.

A tokenizer of our own splits text at the separators of rendered lines alone, and most words come
again and again: looking one up costs a tenth of encoding it.
"""

import json
import re
from functools import lru_cache
from itertools import pairwise
from typing import Any

from tokenizers import Regex, Tokenizer
from tokenizers.pre_tokenizers import ByteLevel, PreTokenizer, Split
from tokenizers.pre_tokenizers import Sequence as PreTokenizers

__all__ = ["WordIds", "split_at", "word_starts"]

_CACHED_WORDS = 65_536
# What looks at a text's ends, or at what is not there: alone a word would be split otherwise.
_LOOKS_FURTHER = re.compile(r"\(\?!|\\[bBAzZG]|\$|(?<!\[)\^")


class WordIds:
    """Ids of texts, word by word, as the tokenizer gives them for the whole text."""

    def __init__(self, tokenizer: Tokenizer, starts: re.Pattern[str]) -> None:
        self._tokenizer = tokenizer
        self._starts = starts
        self._word = lru_cache(_CACHED_WORDS)(self._encode)

    def count(self, text: str) -> int:
        """Count the text's ids."""
        word, bounds = self._word, self._bounds(text)
        return sum([len(word(text[a:b])[0]) for a, b in pairwise(bounds)])

    def encode(self, text: str) -> tuple[list[int], list[int]]:
        """Ids of the text, and where in it each begins."""
        ids: list[int] = []
        starts: list[int] = []
        for start, end in pairwise(self._bounds(text)):
            found, within = self._word(text[start:end])
            ids += found
            starts += [start + each for each in within]
        return ids, starts

    def _bounds(self, text: str) -> list[int]:
        """Where words begin, and where the text ends."""
        if not text.isascii():
            return [0, len(text)]  # what a letter is, two libraries of patterns see differently
        bounds = [match.start() for match in self._starts.finditer(text)]
        bounds.append(len(text))
        if bounds[0]:
            bounds.insert(0, 0)
        return bounds

    def _encode(self, piece: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        encoding = self._tokenizer.encode(piece, add_special_tokens=False)
        return tuple(encoding.ids), tuple(start for start, _ in encoding.offsets)


def split_at(separators: str) -> PreTokenizer:
    """Make what splits lines for a tokenizer of our own.

    `separators` is a pattern of them (`Renderer.separators`): a separator goes with the value
    behind it, so that most values are one word. The terminator stays a word of its own.
    """
    pattern = Regex(rf"{separators}|\n")
    return PreTokenizers(
        [
            Split(pattern, behavior="merged_with_next"),
            ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def word_starts(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """Give the pattern that words begin with, where a tokenizer splits as `split_at` has it.

    None for a tokenizer that joins words, changes text before it splits it, or splits by more
    than one pattern: its ids cannot be put together.
    """
    spec: dict[str, Any] = json.loads(tokenizer.to_str())
    specials_are_text = tokenizer.encode_special_tokens or not spec["added_tokens"]
    if not specials_are_text or not all(each["special"] for each in spec["added_tokens"]):
        return None
    if any(spec[name] for name in ("normalizer", "post_processor", "truncation", "padding")):
        return None
    if spec["model"].get("dropout"):
        return None
    match spec["pre_tokenizer"]:
        case {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": str(pattern)},
                    "behavior": "MergedWithNext",
                    "invert": False,
                },
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        } if not _LOOKS_FURTHER.search(pattern):
            return re.compile(pattern)
    return None
