"""The sink: rows into the offline log and the online store of one feature view, in that order.

Feast warns, or says nothing, where it drops a row, keeps NaN or keeps a vector of a wrong
length; so everything is checked here, when the sink is opened and for each row.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Literal

import numpy as np
from feast import KafkaSource
from feast.data_format import AvroFormat, ProtoFormat
from numpy.typing import NDArray

from llm4es.bundle import Bundle
from llm4es.deletion import DeletionKey, Tombstone
from llm4es.errors import ConfigError, SinkRejected, SinkUnavailable
from llm4es.events import EPOCH, NO_OFFSETS, NO_SPANS, OffsetSpans, TopicPartition, entity_hash
from llm4es.feast.definitions import TIMESTAMP_FIELD, ViewSpec
from llm4es.feast.deletions import Deletions, Rewritten
from llm4es.feast.journal import OfflineJournal
from llm4es.feast.object_store import LogFolder, control_folder
from llm4es.feast.offline_log import log_folder, rewrite_deleted
from llm4es.feast.online import Marks, OnlineRows, ViewTarget
from llm4es.feast.online_reader import OnlineReader
from llm4es.feast.opening import apply_command, open_rows, open_target
from llm4es.features import FeatureRow

__all__ = ["FeastSink", "open_sink"]

_GUARD_S = 7 * 86_400.0
_FLOAT32 = np.dtype(np.float32)


class FeastSink:
    """`stream_worker.ports.FeatureSink` over Feast; built by `open_sink`.

    `superseded` counts rows that were not published since a newer one stood, or their entity was
    deleted later.
    """

    def __init__(
        self,
        target: ViewTarget,
        spec: ViewSpec,
        journal: OfflineJournal,
        online: OnlineRows,
        *,
        deletion_guard_s: float = _GUARD_S,
    ) -> None:
        self._guard_s = deletion_guard_s
        self._target = target
        self._bundle_id = spec.manifest.id
        self._dim = spec.manifest.dim
        self._columns = len(spec.surprise_columns)
        self._journal = journal
        self._online = online
        self._reader = OnlineReader(target, online)
        self.superseded = 0

    @property
    def topic(self) -> str:
        """Topic of the view's stream source. Raises ConfigError where it has none."""
        return self._stream("topic")

    @property
    def bootstrap_servers(self) -> str:
        """Brokers of the view's stream source. Raises ConfigError where it has none."""
        return self._stream("kafka_bootstrap_servers")

    @property
    def value_format(self) -> tuple[Literal["json", "avro", "protobuf"], str | None]:
        """Format of the stream source's values, and Avro's schema or Protobuf's message."""
        source = self._target.view.stream_source
        form = source.kafka_options.message_format if isinstance(source, KafkaSource) else None
        if isinstance(form, AvroFormat):
            return "avro", form.schema_json or None
        if isinstance(form, ProtoFormat):
            return "protobuf", form.class_path or None
        return "json", None

    def journal(self, rows: Sequence[FeatureRow], spans: OffsetSpans = NO_SPANS) -> None:
        """Return when the rows are durable in the offline log; several per entity may come.

        `spans` are the offsets that they were made from: an exact replay replaces its own parts.
        Readers see them when they are rolled. Raises SinkUnavailable, SinkRejected.
        """
        self._refuse_broken(rows)
        self._journal.append(self._journal.kept(rows), spans)

    def publish(
        self,
        rows: Sequence[FeatureRow],
        *,
        reached: Mapping[TopicPartition, int] = NO_OFFSETS,
        held: Mapping[TopicPartition, int] = NO_OFFSETS,
    ) -> None:
        """Return only when every row is readable online, or superseded by a newer one.

        At most one row per entity. Idempotent. Synced, where that is ours to do. `reached` and
        `held` are of one topic, see `stream_worker.ports.FeatureSink`. Raises SinkUnavailable,
        SinkRejected, StoreLost.
        """
        self._refuse_broken(rows)
        if len({row.entity_id for row in rows}) < len(rows):
            entity, times = Counter(row.entity_id for row in rows).most_common(1)[0]
            raise SinkRejected(f"entity {entity_hash(entity)} has {times} rows in one call")
        kept = self._journal.kept(rows)
        self.superseded += len(rows) - len(kept)
        self._write(
            kept, held=_by_partition(held), ahead=_by_partition(reached), of=reached or held
        )

    def republish(
        self, batches: Iterable[Sequence[FeatureRow]], reached: Mapping[TopicPartition, int]
    ) -> None:
        """Publish all current rows of some partitions, in batches, and note `reached` behind them.

        A loss meanwhile is StoreLost: each batch is numbered, and the number before it must
        still be there. Raises SinkUnavailable, SinkRejected, StoreLost.
        """
        names = [f"{tp.partition}/republished" for tp in reached]
        found = self._online.marks(next(iter(reached)).topic) or {}
        number = max(found.get(name, 0) for name in names) + 1
        self._write((), held={}, ahead=dict.fromkeys(names, number), of=reached)
        for rows in batches:
            self._refuse_broken(rows)
            held, ahead = dict.fromkeys(names, number), dict.fromkeys(names, number + 1)
            self._write(rows, held=held, ahead=ahead, of=reached)
            number += 1
        held = dict.fromkeys(names, number)
        self._write((), held=held, ahead=_by_partition(reached), of=reached)

    def published(self, topic: str) -> Mapping[TopicPartition, int] | None:
        """Next offsets that rows online stand for; None where the store cannot note any."""
        found = self._online.marks(topic)
        if found is None:
            return None
        return {
            TopicPartition(topic, int(name)): at for name, at in found.items() if name.isdecimal()
        }

    def delete(self, tombstones: Sequence[Tombstone]) -> None:
        """Return when no row of these entities at or before `as_of` can be read any more.

        See `stream_worker.ports.FeatureSink`. Offline, our own readers leave such rows out until
        `offline_log.rewrite_deleted` has taken them out of the parts; online, an entity's
        timestamp stays for `deletion_guard_s`. Raises SinkUnavailable, ConfigError without a key.
        """
        if tombstones:
            self._journal.delete(tombstones)
            self._online.delete(tombstones, guard_s=self._guard_s)
            self._online.sync()

    def read(self, entity_ids: Sequence[str]) -> list[FeatureRow | None]:
        """Online rows as a stock client sees them; `as_of` as exactly as the store knows it.

        `last_event_time` is in whole seconds. Raises SinkUnavailable.
        """
        return self._reader.read(entity_ids)

    def replace(self, rows: Sequence[FeatureRow], seen: Sequence[datetime | None]) -> list[str]:
        """Put rows in the place of those that were found wrong, as long as `seen` still stands.

        `seen` are the timestamps (`as_of`) that were found. Gives the entities whose row has
        changed meanwhile, and was left alone. Raises SinkUnavailable, SinkRejected, ConfigError
        for a store that cannot compare.
        """
        self._refuse_broken(rows)
        left = self._online.replace(rows, seen)
        self._online.sync()
        return left

    def rewrite_deleted(self) -> Rewritten:
        """Take deleted entities' rows out of the offline log's parts. Raises SinkUnavailable."""
        folder = self._journal.folder
        try:
            return rewrite_deleted(
                folder, join_key=self._target.join_key, timestamp_field=TIMESTAMP_FIELD
            )
        except OSError as error:
            raise SinkUnavailable(f"offline log {folder}: {error}") from error

    @property
    def view(self) -> str:
        """Name of the feature view."""
        return str(self._target.view.name)

    @property
    def offline_folder(self) -> LogFolder:
        """Folder of the offline log, here or in an object store."""
        return self._journal.folder

    @property
    def journal_folder(self) -> Path:
        """Folder of this machine where the log's journals and deletions stand."""
        return control_folder(self._journal.folder)

    @property
    def join_key(self) -> str:
        """Column of the entity's id."""
        return self._target.join_key

    def roll(self) -> None:
        """Return when every journalled row is in a part that readers see."""
        self._journal.roll()

    def sync(self) -> None:
        """Return when what was published survives a power cut, where that is ours to say."""
        self._online.sync()

    def close(self) -> None:
        """Roll what is journalled, and release the connections."""
        try:
            self._journal.close()
        finally:
            self._online.close()

    def _write(
        self,
        rows: Sequence[FeatureRow],
        *,
        held: Marks,
        ahead: Marks,
        of: Mapping[TopicPartition, int],
    ) -> None:
        if rows or held or ahead:
            topic = next((tp.topic for tp in of), "")
            self.superseded += len(self._online.write(rows, topic=topic, held=held, ahead=ahead))
            if not ahead:
                # What a power cut takes of rows, it takes of their marks: then they are published
                # again. Without marks nobody would know.
                self._online.sync()

    def _stream(self, option: str) -> str:
        source = self._target.view.stream_source
        value = getattr(source.kafka_options, option) if isinstance(source, KafkaSource) else ""
        if not value:
            name = {"topic": "topic", "kafka_bootstrap_servers": "bootstrap_servers"}[option]
            raise ConfigError(
                name,
                f"feature view {self._target.view.name} names none",
                "set it, or give the view a KafkaSource and run: feast apply",
            )
        return str(value)

    def _refuse_broken(self, rows: Sequence[FeatureRow]) -> None:
        if self._sound(rows):
            return
        for row in rows:
            problem = self._problem(row)
            if problem is not None:
                entity = entity_hash(row.entity_id)
                raise SinkRejected(f"row of entity {entity} at {row.as_of}: {problem}")

    def _sound(self, rows: Sequence[FeatureRow]) -> bool:
        """Whether all rows are as they should be, looked at together: else one by one."""
        vector, surprise, bundle_id = (self._dim,), (self._columns,), self._bundle_id
        numbers: list[NDArray[np.float32]] = []
        for row in rows:
            if not (
                row.embedding.shape == vector
                and row.surprise.shape == surprise
                and row.embedding.dtype is row.surprise.dtype is _FLOAT32
                and row.as_of.tzinfo is not None
                and row.last_event_time.tzinfo is not None
                and row.as_of >= EPOCH
                and row.entity_id
                and row.bundle_id == bundle_id
                and math.isfinite(row.surprise_last)
            ):
                return False
            numbers += (row.embedding, row.surprise)
        return not numbers or bool(np.isfinite(np.concatenate(numbers)).all())

    def _problem(self, row: FeatureRow) -> str | None:
        for name, vector, size in (
            ("embedding", row.embedding, self._dim),
            ("surprise", row.surprise, self._columns),
        ):
            if vector.shape != (size,) or vector.dtype != np.float32:
                return f"{name} is {vector.dtype} {vector.shape}, the view has float32 ({size},)"
            if not np.isfinite(vector).all():
                return f"{name} is not finite"
        zoned = row.as_of.tzinfo is not None and row.last_event_time.tzinfo is not None
        broken = (
            ("surprise_last is not finite", not np.isfinite(row.surprise_last)),
            (f"it is not of the view's bundle {self._bundle_id}", row.bundle_id != self._bundle_id),
            ("it has no entity id", not row.entity_id),
            ("its times have no zone, or lie before 1970", not zoned or row.as_of < EPOCH),
        )
        return next((problem for problem, found in broken if found), None)


def _by_partition(offsets: Mapping[TopicPartition, int]) -> dict[str, int]:
    return {str(tp.partition): at for tp, at in offsets.items()}


def open_sink(
    repo_path: Path,
    bundle: Bundle | ViewSpec,
    *,
    config_file: str = "feature_store.yaml",
    writer_id: str,
    roll_rows: int = 20_000,
    roll_s: float = 5.0,
    deletion_key: DeletionKey | None = None,
    deletion_guard_s: float = _GUARD_S,
) -> FeastSink:
    """Open the feature view of a bundle, as Feast's registry has it, for writing.

    `config_file` is relative to the repository. `writer_id` goes into the names of parts.
    `deletion_key` is needed to delete, and where something was deleted before.
    Raises ConfigError (no repository, no such view, a setting that breaks serving, another key),
    BundleMismatch (the view is another bundle's), SinkUnavailable.
    """
    target, spec = open_target(repo_path, bundle, config_file)
    folder = log_folder(target.store.config, target.view.batch_source)
    if folder is None:
        raise ConfigError(
            "offline_path",
            f"view {target.view.name} has no folder on this machine as its batch source",
            f"define it with a folder, then run: {apply_command(repo_path, config_file)}",
        )
    deletions = Deletions(folder, deletion_key)
    online = open_rows(target)
    try:
        journal = OfflineJournal(
            folder,
            join_key=target.join_key,
            writer_id=writer_id,
            roll_rows=roll_rows,
            roll_s=roll_s,
            deletions=deletions,
        )
    except SinkUnavailable:
        online.close()
        raise
    return FeastSink(target, spec, journal, online, deletion_guard_s=deletion_guard_s)
