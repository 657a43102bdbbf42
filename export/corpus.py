"""Corpus: from a file of records to the chapters a model is trained on.

Everything that decides what a model reads (parsing, identity and order, cutting, rendering,
tokenizing) is done by `llm4es`, by the very code that serves.
"""

import hashlib
import logging
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from hashlib import blake2b
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from export.logs import LogCounts, iterate_histories
from export.records import parts_of
from llm4es.errors import ConfigError
from llm4es.events import Event
from llm4es.rendering import bucket_name, quantile_edges
from llm4es.schema import EventSchema, NumberField, QuantileBuckets
from llm4es.tokens import ChapterTokenizer, TokenizedChapter
from llm4es.windows import WindowPolicy, cut_chapters

__all__ = [
    "Corpus",
    "EventLog",
    "OtherCorpus",
    "TrainingChapter",
    "cut_corpus",
    "held_out_entities",
    "known_before",
    "learn_buckets",
    "learnt_histories",
    "read_log",
    "rough_chapters",
]

logger = logging.getLogger(__name__)

_BLOCK = 1 << 20
_HELD_OUT_OF = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class EventLog:
    """A file's events by entity, each history ordered by key and without duplicates."""

    histories: Mapping[str, tuple[Event, ...]]  # sorted by entity id
    records: int
    duplicates: int
    without_entity: int  # records that concern no entity of this kind
    invalid: int
    sha256: str  # of its files

    @property
    def events(self) -> int:
        """Events in all."""
        return sum(len(history) for history in self.histories.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingChapter:
    """A chapter as the model reads it, behind the header."""

    entity_id: str
    types: tuple[str, ...]  # of its events
    tokens: TokenizedChapter


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherCorpus:
    """Chapters of another log, behind a header (H,) of its own."""

    header_ids: NDArray[np.int64]
    chapters: tuple[TrainingChapter, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Chapters of the entities that are learnt from, and of those held out."""

    train: tuple[TrainingChapter, ...]
    held_out: tuple[TrainingChapter, ...]
    enriched: tuple[NDArray[np.int64], ...] = ()  # ids of texts without a header, to learn besides
    beside: tuple[OtherCorpus, ...] = ()  # of other logs, to learn besides
    too_long: int  # events whose line alone is longer than a chapter may be

    @property
    def mean_tokens(self) -> float:
        """Mean length of a chapter, the header not counted."""
        chapters = [*self.train, *self.held_out]
        return float(np.mean([len(chapter.tokens.ids) for chapter in chapters]))


def read_log(path: Path, schema: EventSchema, *, entity: str) -> EventLog:
    """Read a log's histories into memory; `export.logs.iterate_histories` has the rules.

    Raises ConfigError for a file that cannot be read and for one that holds no event of the
    entity.
    """
    counts = LogCounts()
    histories = dict(iterate_histories(path, schema, entity=entity, counts=counts))
    return EventLog(
        histories=histories,
        records=counts.records,
        duplicates=counts.duplicates,
        without_entity=counts.without_entity,
        invalid=counts.invalid,
        sha256=_hash_files(parts_of(path)),
    )


def held_out_entities(entity_ids: Iterable[str], share: float) -> frozenset[str]:
    """Choose by its id alone who is never learnt from: at least one of two, never all."""
    by_hash = sorted((_place(entity_id), entity_id) for entity_id in entity_ids)
    chosen = [entity_id for place, entity_id in by_hash if place < share * _HELD_OUT_OF]
    if not chosen and len(by_hash) > 1:
        chosen = [by_hash[0][1]]
    return frozenset(chosen if len(chosen) < len(by_hash) else chosen[: len(by_hash) - 1])


def learnt_histories(
    histories: Mapping[str, tuple[Event, ...]], held_out: frozenset[str]
) -> dict[str, tuple[Event, ...]]:
    """Histories of those who are not held out."""
    return {
        entity_id: history for entity_id, history in histories.items() if entity_id not in held_out
    }


def known_before(log: EventLog, moment: datetime | None) -> EventLog:
    """Leave out what had not occurred then: a model must not know a later test period.

    Raises ConfigError where nothing is left.
    """
    if moment is None:
        return log
    known = {
        entity_id: history[: bisect_left(history, moment, key=lambda event: event.occurred_at)]
        for entity_id, history in log.histories.items()
    }
    histories = {entity_id: history for entity_id, history in known.items() if history}
    if not histories:
        raise ConfigError(
            "training.before", f"no event occurred before {moment}", "name a later time"
        )
    return replace(log, histories=histories)


def learn_buckets(
    schema: EventSchema, histories: Iterable[Sequence[Event]]
) -> dict[str, NDArray[np.float64]]:
    """Edges (n,), strictly rising, at equally likely values of each field that asks for them.

    By the name of the bundle's array. A field with no value at all gets one edge, at 0.
    """
    wanted = {
        (kind, name): field.buckets
        for kind, spec in schema.types.items()
        for name, field in spec.fields.items()
        if isinstance(field, NumberField) and isinstance(field.buckets, QuantileBuckets)
    }
    values: dict[tuple[str, str], list[float]] = {key: [] for key in wanted}
    for event in chain.from_iterable(histories):
        for name, value in event.fields.items():
            if (event.type, name) in values and isinstance(value, int | float):
                values[event.type, name].append(float(value))
    return {
        bucket_name(kind, name): quantile_edges(values[kind, name], buckets)
        for (kind, name), buckets in wanted.items()
    }


def rough_chapters(history: Sequence[Event], policy: WindowPolicy) -> Iterator[tuple[Event, ...]]:
    """Cut by anchors alone: what a tokenizer is trained on, before there is one to measure by."""
    for chapter in cut_chapters(history, policy, lambda _event, _earlier: 0):
        yield chapter.events


def cut_corpus(
    histories: Mapping[str, Sequence[Event]],
    held_out: frozenset[str],
    policy: WindowPolicy,
    tokens: ChapterTokenizer,
) -> Corpus:
    """Cut every history as a window is cut, and tokenize its chapters as the engine does.

    Raises ConfigError where no line is short enough for a chapter.
    """
    split: tuple[list[TrainingChapter], list[TrainingChapter]] = ([], [])
    too_long = 0
    for entity_id, history in histories.items():
        fits = [e for e in history if tokens.measure(e, ()) <= policy.max_chapter_tokens]
        too_long += len(history) - len(fits)
        if not fits:
            continue
        split[entity_id in held_out].extend(
            TrainingChapter(
                entity_id=entity_id,
                types=tuple(event.type for event in chapter.events),
                tokens=tokens.tokenize(chapter.events),
            )
            for chapter in cut_chapters(fits, policy, tokens.measure)
        )
    if too_long:
        logger.warning(
            "%d events have lines longer than a chapter may be (%d tokens) and are left out",
            too_long,
            policy.max_chapter_tokens,
        )
    train, kept = split
    if not train:
        raise ConfigError(
            "window.max_chapter_tokens",
            f"no training event fits into {policy.max_chapter_tokens} tokens",
            "allow longer chapters, or render fewer fields",
        )
    return Corpus(train=tuple(train), held_out=tuple(kept), too_long=too_long)


def _place(entity_id: str) -> int:
    digest = blake2b(entity_id.encode(), digest_size=8, person=b"held-out").digest()
    return int.from_bytes(digest, "big") % _HELD_OUT_OF


def _hash_files(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    return digest.hexdigest()
