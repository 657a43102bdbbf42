"""Records into rows and windows: folded, embedded in chunks of bounded cost, settled."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from llm4es.bundle import Bundle
from llm4es.errors import InvalidEvent, NonFiniteEmbedding
from llm4es.events import Record
from llm4es.features import FeatureRow, feature_row
from llm4es.windows import FinishedChapter, Window, settle, visible_chapters
from stream_worker.folding import Coordinates, Folding, RecordFolder, coordinates_of
from stream_worker.ports import Embedder

__all__ = ["BatchReader", "ReadBatch"]

_Load = Callable[[Sequence[str]], dict[str, Window]]


@dataclass(slots=True)
class ReadBatch:
    """A batch, read: rows in the order of `as_of` per entity, and the windows to store."""

    folding: Folding
    rows: list[FeatureRow] = field(default_factory=list)
    windows: list[Window] = field(default_factory=list)
    tokens: int = 0  # of the chapters that were given to the model
    seconds: float = 0.0  # in the model

    @property
    def newest(self) -> list[FeatureRow]:
        """The last row of each entity."""
        return list({row.entity_id: row for row in self.rows}.values())


class BatchReader:
    """Folds batches and has them embedded, at most `max_tokens` at once.

    `between` is called between two calls of the model; what it raises ends the batch.
    """

    def __init__(
        self,
        bundle: Bundle,
        folder: RecordFolder,
        embedder: Embedder,
        *,
        max_tokens: int,
        between: Callable[[], None] = lambda: None,
    ) -> None:
        self._bundle = bundle
        self._folder = folder
        self._embedder = embedder
        self._max_tokens = max_tokens
        self._between = between
        self._seconds = 0.0

    def read(self, records: Sequence[Record], load: _Load) -> ReadBatch:
        """Fold and embed; an event that alone makes the output not finite becomes a letter."""
        poison: dict[Coordinates, InvalidEvent] = {}
        while True:
            folding = self._folder.fold(records, load, poison)
            try:
                return self._embed(folding)
            except NonFiniteEmbedding as error:
                poison |= self._find_poison(folding, error)

    def rows(self, windows: Sequence[Window]) -> list[FeatureRow]:
        """Give the current row of each window."""
        return self._rows(windows)[0]

    def _embed(self, folding: Folding) -> ReadBatch:
        before = self._seconds
        rows, finished, tokens = self._rows(folding.states)
        windows = [
            settle(
                folding.windows[entity_id],
                finished.get(entity_id, {}),
                policy=self._bundle.manifest.window,
                half_lives=self._embedder.half_lives,
            )
            if entity_id in finished
            else folding.windows[entity_id]
            for entity_id in sorted(folding.changed)
        ]
        return ReadBatch(folding, rows, windows, tokens, self._seconds - before)

    def _rows(
        self, states: Sequence[Window]
    ) -> tuple[list[FeatureRow], dict[str, dict[int, FinishedChapter]], int]:
        """Rows of the states, and the finished chapters of each entity's last one."""
        rows: list[FeatureRow] = []
        finished: dict[str, dict[int, FinishedChapter]] = {}
        total = 0
        for start, end, tokens in self._chunks(states):
            if start:
                self._between()
            chunk = states[start:end]
            started = time.perf_counter()
            try:
                embedded = self._embedder.embed(chunk)
            except NonFiniteEmbedding as error:
                raise NonFiniteEmbedding(tuple(start + row for row in error.rows)) from error
            self._seconds += time.perf_counter() - started
            total += tokens
            for index, window in enumerate(chunk):
                rows.append(
                    feature_row(
                        self._bundle,
                        window,
                        embedded.vectors[index],
                        embedded.surprise[index],
                        float(embedded.surprise_last[index]),
                    )
                )
                finished[window.entity_id] = dict(embedded.finished[index])
        return rows, finished, total

    def _chunks(self, states: Sequence[Window]) -> Iterator[tuple[int, int, int]]:
        """Runs (start, end, tokens) of states; one that alone is over the limit goes alone."""
        start = tokens = 0
        for index, window in enumerate(states):
            cost = self._cost(window)
            if index > start and tokens + cost > self._max_tokens:
                yield start, index, tokens
                start, tokens = index, 0
            tokens += cost
        if start < len(states):
            yield start, len(states), tokens

    def _cost(self, window: Window) -> int:
        """Tokens of the chapters whose sums are not stored: what the model may have to read."""
        chapters = (
            window.chapters[index]
            for index in visible_chapters(window, self._bundle.manifest.window)
        )
        return sum(chapter.tokens for chapter in chapters if chapter.sums is None)

    def _find_poison(
        self, folding: Folding, error: NonFiniteEmbedding
    ) -> dict[Coordinates, InvalidEvent]:
        """Try each event of the entities concerned as a chapter of its own.

        Raises the error itself where none is at fault alone: then the model is.
        """
        poison: dict[Coordinates, InvalidEvent] = {}
        for entity_id in {folding.states[row].entity_id for row in error.rows}:
            for record, event in folding.accepted[entity_id]:
                try:
                    self._embedder.embed([self._folder.fold_alone(record, event)])
                except NonFiniteEmbedding:
                    poison[coordinates_of(record)] = InvalidEvent(
                        "value", "the model's output for this event alone is not finite"
                    )
        if not poison:
            raise error
        return poison
