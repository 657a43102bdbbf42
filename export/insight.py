"""Insight: what a person wants to see of an embedding, beside its scores, as plain data."""

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.preprocessing import StandardScaler

from export.baselines import event_terms
from export.choices import SURPRISE
from export.evaluate import Evaluated
from llm4es.engine import OnnxEmbedder, open_embedder
from llm4es.events import Event
from llm4es.windows import Chapter, cut_chapters

__all__ = [
    "Cost",
    "Neighbourhood",
    "ShadedEvent",
    "ShadedHistory",
    "TextRow",
    "compressed",
    "known_events",
    "map_rows",
    "measure_cost",
    "neighbourhoods",
    "shaded_history",
    "training_curve",
]

_MAPPED = 1500
_COMPONENTS = 32
_PERPLEXITY = 30.0
_MIN_MAPPED = 8
_LINES = 8
_TRIED = 200
_SHADED = 40
_TELLING = 6
_COST_ENTITIES = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRow:
    """A label row as text: its newest lines."""

    entity_id: str
    as_of: str
    label: int
    similarity: float
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Neighbourhood:
    """A row and those of other entities that are nearest to it."""

    of: TextRow
    nearest: tuple[TextRow, ...]


@dataclass(frozen=True, slots=True)
class ShadedEvent:
    """An event's line in parts, each with how unexpected it was, in nats above the usual."""

    when: str
    surprise: float
    parts: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShadedHistory:
    """An entity's newest events before a label."""

    entity_id: str
    as_of: str
    label: int
    events: tuple[ShadedEvent, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What an event costs to read, on this machine."""

    tokens_per_event: float
    header_tokens: int
    events_per_chapter: float
    tokens_per_chapter: float
    ms_per_event: float  # reading whole chapters, header included
    tokens_per_second: float
    bytes_per_row: int  # float32, as served
    providers: str


def map_rows(evaluated: Evaluated) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """t-SNE of at most 1,500 rows, half of them positive where there are enough: (n, 2), rows."""
    rows = _balanced(evaluated, _MAPPED)
    if len(rows) < _MIN_MAPPED:
        return np.zeros((0, 2)), np.zeros(0, dtype=np.int64)
    vectors = compressed(evaluated.embeddings.vectors[rows])
    perplexity = min(_PERPLEXITY, (len(rows) - 1) / 3)
    places: NDArray[np.float64] = TSNE(
        perplexity=perplexity, init="pca", random_state=0
    ).fit_transform(vectors)
    return places, rows


def neighbourhoods(
    evaluated: Evaluated, *, count: int = 3, nearest: int = 3
) -> list[Neighbourhood]:
    """Find neighbours by cosine of standardised vectors, in other entities, one row of each."""
    rows = np.flatnonzero(evaluated.embeddings.events > 0)
    vectors = StandardScaler().fit_transform(evaluated.embeddings.vectors[rows])
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    labels = evaluated.task.labels[rows]
    entities = np.array(evaluated.task.entity_ids)[rows]
    rng = np.random.default_rng(1)
    positive, negative = (rng.permutation(np.flatnonzero(labels == one)) for one in (1, 0))
    chosen: list[int] = []
    for index in [*positive[:_TRIED], *negative[:_TRIED]]:
        enough = len(chosen) >= (count + 1) // 2 and labels[index] == 1
        if not enough and entities[index] not in entities[chosen]:
            chosen.append(int(index))
    chosen = chosen[:count]
    found = []
    for index in chosen:
        similar = vectors @ vectors[index]
        near: dict[str, int] = {}
        for other in np.argsort(-similar).tolist():
            if entities[other] != entities[index]:
                near.setdefault(str(entities[other]), other)
            if len(near) == nearest:
                break
        found.append(
            Neighbourhood(
                _text_row(evaluated, int(rows[index]), 1.0),
                tuple(
                    _text_row(evaluated, int(rows[other]), float(similar[other]))
                    for other in near.values()
                ),
            )
        )
    return found


def shaded_history(evaluated: Evaluated) -> ShadedHistory | None:
    """Shade the newest events of the best found positive row: what the model did not expect."""
    bundle, spec = evaluated.bundle, evaluated.bundle.manifest.surprise
    if spec is None:
        return None
    scores = evaluated.best(SURPRISE).predictions
    judged = (
        (evaluated.task.labels == 1)
        & np.isfinite(scores)
        & (evaluated.embeddings.events >= min(_LINES, int(evaluated.embeddings.events.max())))
    )
    if not judged.any():
        return None
    row = int(np.argmax(np.where(judged, scores, -1.0)))
    reader = open_embedder(bundle)
    events = []
    for chapter in _chapters(evaluated, known_events(evaluated, row)):
        events += _shaded(reader, chapter.events)
    return ShadedHistory(
        entity_id=evaluated.task.entity_ids[row],
        as_of=_as_of(evaluated, row),
        label=1,
        events=tuple(events[-_SHADED:]),
    )


def measure_cost(evaluated: Evaluated) -> Cost:
    """Read some entities' chapters alone, and say what it took."""
    bundle = evaluated.bundle
    reader = open_embedder(bundle)
    histories = list(evaluated.log.histories.values())
    step = max(1, len(histories) // _COST_ENTITIES)
    tokens, events, chapters = 0, 0, 0
    seconds = 0.0
    for history in histories[::step]:
        for chapter in _chapters(evaluated, history):
            tokenized = bundle.tokens.tokenize(chapter.events)
            types = [event.type for event in chapter.events]
            started = time.perf_counter()
            reader.read_chapter(types, tokenized, [chapter.count])
            seconds += time.perf_counter() - started
            tokens += len(tokenized.ids)
            events += chapter.count
            chapters += 1
    header = len(bundle.tokens.header_ids)
    columns = bundle.manifest.dim + len(reader.layout.columns) + 1
    return Cost(
        tokens_per_event=tokens / events,
        header_tokens=header,
        events_per_chapter=events / chapters,
        tokens_per_chapter=tokens / chapters,
        ms_per_event=1e3 * seconds / events,
        tokens_per_second=(tokens + chapters * header) / seconds,
        bytes_per_row=4 * columns,
        providers=", ".join(reader.providers),
    )


def training_curve(evaluated: Evaluated) -> list[dict[str, Any]]:
    """Looks at the loss that the bundle's provenance keeps: step, train_loss, held_out_loss."""
    path = evaluated.bundle.folder / "provenance.json"
    if not path.is_file():
        return []
    looks: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")).get("curve", [])
    return looks


def _balanced(evaluated: Evaluated, most: int) -> NDArray[np.int64]:
    rng = np.random.default_rng(0)
    seen = evaluated.embeddings.events > 0
    positive, negative = (
        rng.permutation(np.flatnonzero(seen & (evaluated.task.labels == one))) for one in (1, 0)
    )
    positive = positive[: max(most // 2, most - len(negative))]
    return np.sort(np.concatenate([positive, negative[: most - len(positive)]]))


def compressed(vectors: NDArray[np.float32]) -> NDArray[np.float64]:
    """Principal components (n, at most 32) of standardised vectors."""
    standard = StandardScaler().fit_transform(vectors)
    width = min(_COMPONENTS, *standard.shape)
    with np.errstate(invalid="ignore"):  # a share of no variance, where all rows are alike
        found: NDArray[np.float64] = PCA(width, random_state=0).fit_transform(standard)
    return found


def known_events(evaluated: Evaluated, row: int) -> list[Event]:
    """Events before the row's moment."""
    one = evaluated.asked[row]
    history = evaluated.log.histories.get(one.entity_id, ())
    return [event for event in history if event.occurred_at < one.before]


def _chapters(evaluated: Evaluated, history: Sequence[Event]) -> tuple[Chapter, ...]:
    """Cut as a window is cut, without events whose line is longer than a chapter may be."""
    policy, measure = evaluated.bundle.manifest.window, evaluated.bundle.tokens.measure
    fits = [event for event in history if measure(event, ()) <= policy.max_chapter_tokens]
    return cut_chapters(fits, policy, measure) if fits else ()


def _text_row(evaluated: Evaluated, row: int, similarity: float) -> TextRow:
    bundle = evaluated.bundle
    events = known_events(evaluated, row)
    lines: list[str] = []
    for chapter in _chapters(evaluated, events)[-_LINES:]:
        lines += [line.text.rstrip("\n") for line in bundle.renderer.lines(chapter.events)]
    return TextRow(
        entity_id=evaluated.task.entity_ids[row],
        as_of=_as_of(evaluated, row),
        label=int(evaluated.task.labels[row]),
        similarity=similarity,
        lines=(*_frequent(evaluated, events), *lines[-_LINES:]),
    )


def _frequent(evaluated: Evaluated, events: Sequence[Event]) -> tuple[str, ...]:
    """One line of what the history is made of, for the newest events may be untypical."""
    counted = Counter(
        term
        for terms in event_terms(evaluated.bundle, events)
        for term in terms
        if "=" in term and ".type=" not in term
    )
    top = [f"{value.split('=', 1)[1]} {count}" for value, count in counted.most_common(_TELLING)]
    return (f"{len(events)} events; most often: {', '.join(top)}",)


def _as_of(evaluated: Evaluated, row: int) -> str:
    times = evaluated.task.times
    return "the end" if times is None else f"{times[row]:%Y-%m-%d %H:%M}"


def _shaded(reader: OnnxEmbedder, events: Sequence[Event]) -> list[ShadedEvent]:
    bundle = reader.bundle
    tokenized = bundle.tokens.tokenize(events)
    types = [event.type for event in events]
    surprise = reader.read_chapter(types, tokenized, [len(events)])[0].surprise
    if surprise is None:
        return []
    tracks = {name: index for index, name in enumerate(reader.layout.tracks.names)}
    several = len(bundle.schema.types) > 1
    found: list[ShadedEvent] = []
    for index, (event, line) in enumerate(zip(events, bundle.renderer.lines(events), strict=True)):
        parts = []
        for span in line.spans:
            track = tracks[f"{event.type}_{span.field}" if several else span.field]
            text = line.text[span.start : span.end]
            parts.append((text, float(surprise.deviation[index, track])))
        found.append(
            ShadedEvent(
                f"{event.occurred_at:%Y-%m-%d %H:%M}",
                float(surprise.deviation[index, 0]),
                tuple(parts),
            )
        )
    return found
