"""Doubles for faults that the real parts cannot be told to have, and a bundle without a model.

Real classes that satisfy `stream_worker.ports`; users may test their own deployments with them.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from llm4es.bundle import Bundle, Manifest, Pooling, Training
from llm4es.deletion import Tombstone
from llm4es.errors import NonFiniteEmbedding, StoreLost
from llm4es.events import NO_OFFSETS, NO_SPANS, OffsetSpans, Record, TopicPartition
from llm4es.features import Embedded, FeatureRow, SumsLayout, token_weights
from llm4es.rendering import Renderer, RenderingSpec
from llm4es.schema import EventSchema
from llm4es.tokens import ChapterTokenizer
from llm4es.windows import FinishedChapter, Window, WindowPolicy, visible_chapters
from llm4es.words import split_at

__all__ = [
    "Boundaries",
    "Crash",
    "Crashing",
    "Interrupted",
    "LengthEmbedder",
    "MemorySink",
    "PoisonedEmbedder",
    "ScriptedLog",
    "byte_tokenizer",
    "modelless_bundle",
]


def byte_tokenizer(separators: str | None = None) -> Tokenizer:
    """Make a tokenizer of 256 ids: one token per byte.

    With `separators` (`Renderer.separators`) it splits text as a trained one does.
    """
    alphabet = sorted(ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = (
        ByteLevel(add_prefix_space=False, use_regex=False)
        if separators is None
        else split_at(separators)
    )
    return tokenizer


def modelless_bundle(
    schema: EventSchema,
    *,
    entity: str,
    window: WindowPolicy,
    rendering: RenderingSpec | None = None,
    arrays: Mapping[str, NDArray[np.float64]] | None = None,
    bundle_id: str = "00000000test",
) -> Bundle:
    """Bundle with `byte_tokenizer`, for `LengthEmbedder`: no folder."""
    renderer = Renderer(schema, rendering or RenderingSpec(), arrays or {})
    pooling = Pooling(layers=(0,), scales=(math.inf, 4.0))
    manifest = Manifest(
        id=bundle_id,
        entity=entity,
        schema_sha256=schema.sha256,
        rendering=rendering or RenderingSpec(),
        rendering_sha256=renderer.sha256,
        window=window,
        base_model="none",
        licence="Apache-2.0",
        training=Training(data_sha256="", steps=0, epochs=0, train_loss=None, held_out_loss=None),
        pooling=pooling,
        surprise=None,
        hidden_size=1,
        dim=len(pooling.scales),
        bos_id=None,
    )
    return Bundle(
        folder=Path(),
        manifest=manifest,
        schema=schema,
        arrays=arrays or {},
        tokens=ChapterTokenizer(renderer, byte_tokenizer(renderer.separators), None),
    )


class LengthEmbedder:
    """A token's state is its id: sums, decay and chapters are real, the model is not."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.layout = SumsLayout(bundle)

    @property
    def half_lives(self) -> NDArray[np.float64]:
        """Half-lives (n,) by which sums (n,) of chapters decay."""
        return self.layout.half_lives

    def embed(self, windows: Sequence[Window]) -> Embedded:
        """B windows -> vectors (B, scales); no surprise."""
        vectors, finished = [], []
        for window in windows:
            visible = visible_chapters(window, self.bundle.manifest.window)
            done: dict[int, FinishedChapter] = {}
            sums = []
            for index in visible:
                chapter = window.chapters[index]
                if chapter.sums is not None:
                    sums.append(chapter.sums)
                    continue
                tokens = self.bundle.tokens.tokenize(chapter.events)
                weights = token_weights(self.layout, tokens.events, [chapter.count])[0]
                states = (weights @ tokens.ids.astype(np.float64))[:, None]
                sums.append(self.layout.pack(states, weights.sum(axis=-1)))
                if index < len(window.chapters) - 1:
                    done[index] = FinishedChapter(ids_hash=tokens.ids_hash, sums=sums[-1])
            vectors.append(self.layout.finish(self.layout.total(window, sums, visible))[0])
            finished.append(done)
        count = len(windows)
        return Embedded(
            np.array(vectors, dtype=np.float32).reshape(count, self.bundle.manifest.dim),
            np.zeros((count, 0), dtype=np.float32),
            np.zeros(count, dtype=np.float32),
            tuple(finished),
        )

    def forget(self, entity_ids: Iterable[str]) -> None:
        """Nothing is kept."""


class PoisonedEmbedder:
    """An embedder whose output is not finite for the windows that it is told of."""

    def __init__(self, embedder: LengthEmbedder, poisonous: Callable[[Window], bool]) -> None:
        self._embedder = embedder
        self._poisonous = poisonous

    @property
    def half_lives(self) -> NDArray[np.float64]:
        """Half-lives (n,) by which sums (n,) of chapters decay."""
        return self._embedder.half_lives

    def embed(self, windows: Sequence[Window]) -> Embedded:
        """B windows -> vectors (B, scales), or NonFiniteEmbedding naming the rows."""
        rows = tuple(row for row, window in enumerate(windows) if self._poisonous(window))
        if rows:
            raise NonFiniteEmbedding(rows)
        return self._embedder.embed(windows)

    def forget(self, entity_ids: Iterable[str]) -> None:
        """Drop what the embedder keeps of these entities."""
        self._embedder.forget(entity_ids)


class ScriptedLog:
    """A log in memory that gives its records in batches of the sizes it is told.

    `describe` is the caller's: tests say which log they mean to be.
    """

    def __init__(
        self, records: Sequence[Record], describe: Callable[[], Any], batches: Iterable[int] = ()
    ) -> None:
        self._records = list(records)
        self.describe = describe
        self._batches = iter(batches)
        self._listener: Any = None
        self._positions: dict[TopicPartition, int] = {}
        self.group: dict[TopicPartition, int] = {}  # committed offsets, as a broker keeps them

    def sample(self, count: int) -> Sequence[Record]:
        """The newest records of the whole log."""
        return self._records[-count:]

    def subscribe(self, listener: Any) -> None:  # noqa: ANN401 - the port's type stands above us
        """Assign every partition at the next poll."""
        self._listener = listener

    def poll(self, max_records: int, timeout_s: float) -> Sequence[Record]:  # noqa: ARG002
        """Next records in the order of the script, as many as it says."""
        if self._listener is not None:
            partitions = sorted({record.topic_partition for record in self._records})
            self._positions = dict(self._listener.assigned(partitions))
            self._listener = None  # not before: where it raises it is asked again
        wanted = min(max_records, next(self._batches, max_records))
        batch = [
            record
            for record in self._records
            if record.offset >= self._positions.get(record.topic_partition, 0)
        ][:wanted]
        for record in batch:
            self._positions[record.topic_partition] = record.offset + 1
        return batch

    def committed(self, partitions: Iterable[TopicPartition]) -> Mapping[TopicPartition, int]:
        """What the group has committed."""
        return {tp: self.group[tp] for tp in partitions if tp in self.group}

    def commit(self, next_offsets: Mapping[TopicPartition, int]) -> None:
        """Advance the group."""
        self.group.update(next_offsets)

    def seek(self, positions: Mapping[TopicPartition, int]) -> None:
        """Read on from there."""
        self._positions.update(positions)

    def keep_alive(self) -> None:
        """No group, so nobody to show it."""

    def lag(self) -> Mapping[TopicPartition, int]:
        """Nothing is known without counting."""
        return {}

    def remaining(self) -> int | None:
        """Records still to come."""
        return sum(
            record.offset >= self._positions.get(record.topic_partition, 0)
            for record in self._records
        )

    def close(self) -> None:
        """Nothing to let go."""


class MemorySink:
    """Offline rows in a list and online rows in a mapping that never goes back in time.

    `noting=False` is a store that cannot note which offsets its rows stand for.
    """

    def __init__(self, *, noting: bool = True) -> None:
        self._noting = noting
        self.offline: list[FeatureRow] = []
        self.online: dict[str, FeatureRow] = {}
        self.reached: dict[TopicPartition, int] = {}
        self._losses = 0
        self.deleted: dict[str, datetime] = {}

    def journal(self, rows: Sequence[FeatureRow], spans: OffsetSpans = NO_SPANS) -> None:  # noqa: ARG002
        """Append."""
        self.offline += filter(self._kept, rows)

    def lose(self) -> None:
        """Lose all that is online."""
        self.online.clear()
        self.reached.clear()
        self._losses += 1

    def publish(
        self,
        rows: Sequence[FeatureRow],
        *,
        reached: Mapping[TopicPartition, int] = NO_OFFSETS,
        held: Mapping[TopicPartition, int] = NO_OFFSETS,
    ) -> None:
        """Take each row that is newer than the one that stands."""
        self._take(rows)
        if any(self.reached.get(tp, 0) < at for tp, at in held.items()):
            raise StoreLost("the online store has lost rows")
        for tp, at in reached.items():
            self.reached[tp] = max(at, self.reached.get(tp, 0))

    def republish(
        self, batches: Iterable[Sequence[FeatureRow]], reached: Mapping[TopicPartition, int]
    ) -> None:
        """Take each batch, then the offsets."""
        losses = self._losses
        for rows in batches:
            self._take(rows)
        if losses != self._losses:
            raise StoreLost("the online store has lost rows while they were published again")
        self.publish((), reached=reached)

    def published(self, topic: str) -> Mapping[TopicPartition, int] | None:
        """Offsets that the rows online stand for."""
        if not self._noting:
            return None
        return {tp: at for tp, at in self.reached.items() if tp.topic == topic}

    def _take(self, rows: Sequence[FeatureRow]) -> None:
        for row in filter(self._kept, rows):
            known = self.online.get(row.entity_id)
            if known is None or known.as_of < row.as_of:
                self.online[row.entity_id] = row

    def delete(self, tombstones: Sequence[Tombstone]) -> None:
        """Drop what is there, and what comes late."""
        for each in tombstones:
            known = self.deleted.get(each.entity_id, each.as_of)
            self.deleted[each.entity_id] = max(known, each.as_of)
        self.offline = [row for row in self.offline if self._kept(row)]
        self.online = {key: row for key, row in self.online.items() if self._kept(row)}

    def read(self, entity_ids: Sequence[str]) -> Sequence[FeatureRow | None]:
        """Online rows."""
        return [self.online.get(entity_id) for entity_id in entity_ids]

    def _kept(self, row: FeatureRow) -> bool:
        deleted = self.deleted.get(row.entity_id)
        return deleted is None or row.as_of > deleted

    def close(self) -> None:
        """Nothing to let go."""


class Interrupted:
    """Any part, with something that happens before each call of one method, while it lasts.

    What happens may raise: then the call is not made.
    """

    def __init__(
        self, part: object, method: str, happenings: Iterable[Callable[[], object]]
    ) -> None:
        self._part = part
        self._method = method
        self._happenings = iter(happenings)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - stands in for any part
        found = getattr(self._part, name)
        return self._call(found) if name == self._method else found

    def _call(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: object, **named: object) -> object:
            for happening in islice(self._happenings, 1):
                happening()
            return method(*args, **named)

        return call


class Crash(BaseException):
    """Stands for a kill: nothing in the worker may catch it."""


class Boundaries:
    """Counts named boundaries, and crashes at the k-th time one is reached."""

    def __init__(self, name: str = "", occurrence: int = 0) -> None:
        self._name = name
        self._occurrence = occurrence
        self.reached: Counter[str] = Counter()

    def reach(self, name: str) -> None:
        """Pass the boundary, or crash."""
        self.reached[name] += 1
        if name == self._name and self.reached[name] == self._occurrence:
            self.crash(name)

    def crash(self, name: str) -> NoReturn:
        """Raise Crash; a process of its own may do worse."""
        raise Crash(name)


class Crashing:
    """Any part, with a boundary before and after each call of the methods named."""

    def __init__(self, part: object, boundaries: Boundaries, methods: Iterable[str]) -> None:
        self._part = part
        self._boundaries = boundaries
        self._methods = frozenset(methods)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - stands in for any part
        found = getattr(self._part, name)
        if name not in self._methods:
            return found
        return self._block(name, found) if name == "begin" else self._call(name, found)

    def _call(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: object, **named: object) -> object:
            self._boundaries.reach(f"before {name}")
            result = method(*args, **named)
            self._boundaries.reach(f"after {name}")
            return result

        return call

    def _block(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @contextmanager
        def block(*args: object) -> Iterator[Any]:
            with method(*args) as inside:
                yield inside
                self._boundaries.reach(f"before {name}'s end")
            self._boundaries.reach(f"after {name}'s end")

        return block
