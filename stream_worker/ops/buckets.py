"""Entities' whole histories at once: records cut into buckets by entity, and what each becomes."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from llm4es.bundle import Bundle
from llm4es.deletion import Tombstone
from llm4es.errors import InvalidEvent
from llm4es.events import Record
from llm4es.features import FeatureRow
from llm4es.windows import Outcome, Window
from stream_worker.embedding import BatchReader
from stream_worker.folding import RecordFolder
from stream_worker.formats.decoding import ValueFormat, open_decoder
from stream_worker.ports import DeadLetter, Embedder
from stream_worker.window_store.codec import decode_window, encode_window
from stream_worker.worker import WorkerPolicy

__all__ = ["BucketReader", "Filled", "Opener", "bucket_of", "fill_here"]


@dataclass(frozen=True, slots=True)
class Filled:
    """What a bucket's records became, in a shape that goes from one process to another."""

    rows: list[FeatureRow]  # in the order of `as_of` per entity, the last one current
    encoded: list[tuple[str, int, bytes]]  # entity, version, record of each window
    parked: list[tuple[Record, str, str]]  # record, field and reason
    tombstones: list[Tombstone]
    outcomes: Mapping[Outcome, int]

    @property
    def windows(self) -> Iterator[Window]:
        """The windows, decoded."""
        return (decode_window(*each) for each in self.encoded)

    @property
    def letters(self) -> list[DeadLetter]:
        """The bad records."""
        return [
            DeadLetter(record, InvalidEvent(field, reason)) for record, field, reason in self.parked
        ]


class BucketReader:
    """Folds and embeds a bucket as the worker does a batch, from nothing.

    A bucket's result depends on its records alone: not on other buckets, nor on the process.
    """

    def __init__(
        self,
        bundle: Bundle,
        embedder: Embedder,
        policy: WorkerPolicy,
        form: ValueFormat = ValueFormat(),  # noqa: B008 - frozen
    ) -> None:
        folder = RecordFolder(
            bundle,
            max_value_bytes=policy.max_value_bytes,
            availability_delay=policy.availability_delay,
            every_event=policy.every_event,
            deletes=policy.deletes,
            decode=open_decoder(form),
        )
        self._reader = BatchReader(bundle, folder, embedder, max_tokens=policy.max_batch_tokens)

    def read(self, records: Sequence[Record]) -> Filled:
        """Give rows and windows of all entities that the records are about."""
        batch = self._reader.read(records, lambda ids: {i: Window(entity_id=i) for i in ids})
        return Filled(
            rows=batch.rows,
            encoded=[(w.entity_id, w.version, encode_window(w)) for w in batch.windows],
            parked=[
                (letter.record, letter.cause.field, letter.cause.reason)
                for letter in batch.folding.letters
            ],
            tombstones=list(batch.folding.tombstones.values()),
            outcomes=Counter(batch.folding.outcomes),
        )


Opener = Callable[[], BucketReader]  # called once in each process that reads buckets


def fill_here(opener: Opener, buckets: Iterable[Sequence[Record]]) -> Iterator[Filled]:
    """Read buckets one after the other, in this process."""
    reader = opener()
    for bucket in buckets:
        yield reader.read(bucket)


def bucket_of(key: bytes | None, buckets: int) -> int:
    """Which bucket a record of this key goes to."""
    return int.from_bytes(blake2b(key or b"", digest_size=8).digest(), "big") % buckets
