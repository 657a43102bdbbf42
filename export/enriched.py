"""Enriched texts: what `enrich` wrote, read back for training."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from llm4es.errors import ConfigError
from llm4es.tokens import ChapterTokenizer

__all__ = ["EnrichedTexts", "read_enriched"]


class _Line(msgspec.Struct):
    rendering: str
    entity_id: str
    until: datetime
    text: str


@dataclass(frozen=True, slots=True)
class EnrichedTexts:
    """Chapters in other words, without a header; each line ends in a line feed."""

    texts: tuple[str, ...] = ()
    sha256: str = ""

    def lines(self) -> Iterator[str]:
        """Every line of every text: what a tokenizer is to know besides the base format."""
        for text in self.texts:
            yield from text.splitlines(keepends=True)

    def ids(self, tokens: ChapterTokenizer, *, longest: int) -> tuple[NDArray[np.int64], ...]:
        """Ids (T,) of each text, cut between lines into pieces of at most `longest` tokens.

        A line that alone is longer is left out.
        """
        pieces: list[list[int]] = []
        for text in self.texts:
            piece: list[int] = []
            for line in text.splitlines(keepends=True):
                ids = tokens.encode(line)
                if len(piece) + len(ids) > longest:
                    pieces.append(piece)
                    piece = []
                if len(ids) <= longest:
                    piece = [*piece, *ids]
            pieces.append(piece)
        return tuple(np.array(piece, dtype=np.int64) for piece in pieces if piece)


def read_enriched(
    path: Path, *, rendering: str, held_out: frozenset[str], before: datetime | None
) -> EnrichedTexts:
    """Read the JSONL that `enrich` wrote for the same schema and rendering (`text_sha256`).

    Raises ConfigError for a file that is none, for one made of another schema or rendering, and for
    texts of entities or times that training must not know.
    """
    texts = []
    try:
        data = path.read_bytes()
        found = [msgspec.json.decode(line, type=_Line) for line in data.splitlines() if line]
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(
            "enriched", f"{path} cannot be read ({error})", "make it with python -m export enrich"
        ) from error
    for line in found:
        if line.rendering != rendering:
            raise ConfigError(
                "enriched",
                f"{path} was made of another schema or rendering",
                "enrich with these",
            )
        if line.entity_id in held_out or (before is not None and line.until >= before):
            raise ConfigError(
                "enriched",
                f"{path} knows entities or times that training must not know",
                "enrich with this recipe, which says who is held out",
            )
        texts.append(line.text)
    return EnrichedTexts(tuple(texts), hashlib.sha256(data).hexdigest())
