"""Tokens: the ids a model reads for a chapter, line by line.

Each event's line is tokenized by itself, with its terminator, and the ids are concatenated
behind the header's: so training and serving see identical ids, and an appended event leaves
all ids before it as they were.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from llm4es.errors import ConfigError
from llm4es.words import WordIds, word_starts

if TYPE_CHECKING:
    from llm4es.events import Event
    from llm4es.rendering import Line, Renderer

__all__ = ["ALL_FIELDS", "ChapterTokenizer", "TokenizedChapter", "load_tokenizer"]

ALL_FIELDS = -1  # owner of the terminator's tokens: they count in all, and for no field
_CACHED_LINES = 65_536
_CACHED_COUNTS = 8_192
_TOKENS_PER_BYTE = 2  # more than any tokenizer makes, byte fallback and normalization included


@dataclass(frozen=True, slots=True)
class TokenizedChapter:
    """A chapter's ids with what each of its T tokens belongs to; the header is not among them.

    `events` is the index of the token's event within the chapter, `owners` the index of its
    field among `Renderer.fields(type)`, or ALL_FIELDS.
    """

    ids: NDArray[np.int64]  # (T,)
    events: NDArray[np.int64]  # (T,)
    owners: NDArray[np.int64]  # (T,)

    def head(self, events: int) -> "TokenizedChapter":
        """The chapter's first events alone."""
        end = int(np.searchsorted(self.events, events))
        return TokenizedChapter(self.ids[:end], self.events[:end], self.owners[:end])

    def then(self, more: "TokenizedChapter") -> "TokenizedChapter":
        """The chapter with more events behind it."""
        events = int(self.events[-1]) + 1 if len(self.events) else 0
        return TokenizedChapter(
            np.concatenate([self.ids, more.ids]),
            np.concatenate([self.events, more.events + events]),
            np.concatenate([self.owners, more.owners]),
        )

    @property
    def ids_hash(self) -> bytes:
        """What a memo of the chapter's sums is keyed by, beside the bundle's id."""
        return blake2b(self.ids.astype("<i8").tobytes(), digest_size=16).digest()


@dataclass(frozen=True, slots=True)
class _TokenizedLine:
    ids: tuple[int, ...]
    owners: tuple[int, ...]


class ChapterTokenizer:
    """Turns a chapter's events into ids, and measures an event for the cutter.

    `bos_id` opens the header where the model was trained with one.
    """

    def __init__(self, renderer: "Renderer", tokenizer: Tokenizer, bos_id: int | None) -> None:
        self._renderer = renderer
        self._tokenizer = tokenizer
        self._bos_id = bos_id
        starts = word_starts(tokenizer)
        self._words = None if starts is None else WordIds(tokenizer, starts)
        front = () if bos_id is None else (bos_id,)
        header = tuple(tokenizer.encode(renderer.header, add_special_tokens=False).ids)
        self.header_ids: NDArray[np.int64] = np.array((*front, *header), dtype=np.int64)
        # A line's owners follow from its text and spans, so both are the cache's key.
        self._line = lru_cache(maxsize=_CACHED_LINES)(self._tokenize)
        self._count = lru_cache(maxsize=_CACHED_COUNTS)(self._count_tokens)

    def of(self, renderer: "Renderer") -> "ChapterTokenizer":
        """The same tokenizer, for lines that another renderer makes."""
        return ChapterTokenizer(renderer, self._tokenizer, self._bos_id)

    @property
    def renderer(self) -> "Renderer":
        """What the lines are made by."""
        return self._renderer

    def measure(self, event: "Event", earlier: Sequence["Event"]) -> int:
        """Count the tokens of an event's line behind the earlier ones of its chapter."""
        return self._count(self._renderer.text(event, earlier))

    def surely_fits(self, event: "Event", limit: int) -> bool:
        """Whether the event's line has at most `limit` tokens behind any others.

        False where that cannot be told without tokenizing.
        """
        return _TOKENS_PER_BYTE * self._renderer.longest(event) <= limit

    def tokenize(
        self, events: Sequence["Event"], *, earlier: Sequence["Event"] = ()
    ) -> TokenizedChapter:
        """Ids of a chapter's events, oldest first; `earlier` ones stand before them in it."""
        if earlier:
            chapter = (*earlier, *events)
            written = [
                self._renderer.line(event, chapter[: len(earlier) + index])
                for index, event in enumerate(events)
            ]
        else:
            written = self._renderer.lines(events)
        lines = [self._line(line) for line in written]
        counts = [len(line.ids) for line in lines]
        return TokenizedChapter(
            ids=np.fromiter((id_ for line in lines for id_ in line.ids), np.int64, sum(counts)),
            events=np.repeat(np.arange(len(lines)), counts),
            owners=np.fromiter((o for line in lines for o in line.owners), np.int64, sum(counts)),
        )

    def _count_tokens(self, text: str) -> int:
        if self._words is not None:
            return self._words.count(text)
        return len(self._tokenizer.encode(text, add_special_tokens=False))

    def encode(self, text: str) -> list[int]:
        """Ids of a text that is no event's line: what a model was trained on besides."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _tokenize(self, line: "Line") -> _TokenizedLine:
        if self._words is not None:
            ids, starts = self._words.encode(line.text)
        else:
            encoding = self._tokenizer.encode(line.text, add_special_tokens=False)
            ids, starts = encoding.ids, [start for start, _ in encoding.offsets]
        owners = []
        field = 0
        for start in starts:
            while field < len(line.spans) and start >= line.spans[field].end:
                field += 1
            owners.append(field if field < len(line.spans) else ALL_FIELDS)
        return _TokenizedLine(tuple(ids), tuple(owners))


def load_tokenizer(path: Path) -> Tokenizer:
    """Load `tokenizer.json` for rendered text: nothing in it is a special token, or cut off.

    A value that spells a special token ("<|endoftext|>") must stay text, and a truncation
    kept in the file would silently cut the newest events. Raises ConfigError.
    """
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:
        raise ConfigError(str(path), f"is no tokenizer ({error})", "export again") from error
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
