"""`dlq`: what could not be folded, looked at, exported, and tried again through the log."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
from rich.table import Table

from llm4es.bundle import Bundle, load_bundle
from llm4es.errors import ConfigError
from llm4es.events import Record, TopicPartition
from llm4es.feast import FeastSink, open_sink
from llm4es.windows import Window
from stream_worker.assembly import deletion_key_of, value_format_of, worker_policy
from stream_worker.folding import RecordFolder
from stream_worker.formats.decoding import open_decoder
from stream_worker.ops.letters import Letter, read_letters
from stream_worker.ops.logs import kafka_of, refuse_file, topic_of
from stream_worker.ops.showing import show
from stream_worker.ops.writing import LogWriter, Outgoing
from stream_worker.settings import WorkerSettings

__all__ = [
    "Retried",
    "export_letters",
    "list_letters",
    "retry_letters",
    "retry_view",
    "show_letter",
]

_RETRIED = "retried.txt"  # coordinates, one a line, in the state folder


@dataclass(frozen=True, slots=True, kw_only=True)
class Retried:
    """What a retry did with the letters it was asked for."""

    letters: int
    produced: int
    retried_before: int
    still_bad: int  # the worker would park them again
    truncated: int  # only their beginning was kept


def list_letters(settings: WorkerSettings, *, as_json: bool) -> None:
    """Print how many letters there are, by field and reason; ids and values are left out."""
    with _opened(settings) as (sink, _):
        found = Counter(
            (letter.told("field"), letter.told("reason")) for letter in _letters(settings, sink)
        )
    table = Table(title="dead letters")
    for column in ("field", "reason", "letters"):
        table.add_column(column)
    for (field, reason), count in found.most_common():
        table.add_row(field, reason, f"{count:,}")
    rows = [{"field": f, "reason": r, "letters": n} for (f, r), n in found.most_common()]
    show(rows, table, as_json=as_json)


def show_letter(settings: WorkerSettings, place: str, *, as_json: bool) -> None:
    """Print one letter whole. `place` is its record's PARTITION:OFFSET. Raises ConfigError."""
    wanted = place.replace(":", "/")
    with _opened(settings) as (sink, _):
        for letter in _letters(settings, sink):
            if letter.coordinates.endswith(f"/{wanted}"):
                break
        else:
            raise ConfigError("place", f"no letter is of {place}", "see `dlq export` for all")
    table = Table(show_header=False, title=letter.coordinates)
    for name, value in letter.document().items():
        table.add_row(name, str(value))
    table.add_row("text", (letter.record.value or b"").decode(errors="replace"))
    show(letter.document(), table, as_json=as_json)


def export_letters(settings: WorkerSettings, out: Path, *, as_json: bool) -> None:
    """Write every letter as a line of JSON, bytes in base64."""
    count = 0
    with _opened(settings) as (sink, _), out.open("wb") as file:
        for letter in _letters(settings, sink):
            file.write(msgspec.json.encode(letter.document()) + b"\n")
            count += 1
    table = Table(show_header=False)
    table.add_row("letters", f"{count:,}")
    show({"letters": count, "out": str(out)}, table, as_json=as_json)


def retry_letters(
    settings: WorkerSettings,
    bundle: Bundle,
    *,
    field: str | None = None,
    repaired: Path | None = None,
    again: bool = False,
) -> Retried:
    """Produce letters to the topic they came from, where the worker meets them as new records.

    Without `again` a letter is produced once. `repaired` is a file of lines as `dlq export` writes
    them, whose key and value stand for the letters of the same coordinates. What this bundle would
    park again is not produced. Raises ConfigError, SourceUnavailable.
    """
    refuse_file(settings, "a dead letter")
    with _opened(settings, bundle) as (sink, _):
        policy = worker_policy(settings)
        folder = RecordFolder(
            bundle,
            max_value_bytes=policy.max_value_bytes,
            availability_delay=policy.availability_delay,
            every_event=False,
            deletes=policy.deletes,
            decode=open_decoder(value_format_of(settings, sink)),
        )
        done = settings.state_dir / _RETRIED
        before = set() if again or not done.exists() else set(done.read_text().splitlines())
        mended = _repaired(repaired)
        counts: Counter[str] = Counter()
        writer = LogWriter(kafka_of(settings, sink))
        try:
            for letter in _letters(settings, sink):
                if (field is not None and letter.told("field") != field) or (
                    repaired is not None and letter.coordinates not in mended
                ):
                    continue
                counts["letters"] += 1
                key, value = mended.get(letter.coordinates, (letter.key, letter.record.value))
                if letter.coordinates in before:
                    counts["retried_before"] += 1
                elif letter.truncated and letter.coordinates not in mended:
                    counts["truncated"] += 1
                elif not _acceptable(folder, letter, key, value):
                    counts["still_bad"] += 1
                else:
                    writer.append([_outgoing(letter, key, value)])
                    done.parent.mkdir(parents=True, exist_ok=True)
                    with done.open("a", encoding="utf-8") as file:
                        file.write(f"{letter.coordinates}\n")
                    counts["produced"] += 1
        finally:
            writer.close()
    names = ("letters", "produced", "retried_before", "still_bad", "truncated")
    return Retried(**{name: counts[name] for name in names})


def retry_view(
    settings: WorkerSettings,
    *,
    field: str | None,
    repaired: Path | None,
    again: bool,
    as_json: bool,
) -> None:
    """Retry, and print what was done."""
    done = retry_letters(
        settings, load_bundle(settings.bundle), field=field, repaired=repaired, again=again
    )
    table = Table(show_header=False, title="dead letters tried again")
    for name in done.__slots__:
        table.add_row(name.replace("_", " "), f"{getattr(done, name):,}")
    show(done, table, as_json=as_json)


@contextmanager
def _opened(
    settings: WorkerSettings, bundle: Bundle | None = None
) -> Iterator[tuple[FeastSink, Bundle]]:
    refuse_file(settings, "a letter")
    loaded = bundle or load_bundle(settings.bundle)
    sink = open_sink(
        settings.feature_repo,
        loaded,
        config_file=settings.feature_store_file,
        writer_id="dlq",
        deletion_key=deletion_key_of(settings),
    )
    try:
        yield sink, loaded
    finally:
        sink.close()


def _letters(settings: WorkerSettings, sink: FeastSink) -> Iterator[Letter]:
    topic = settings.dead_letter_topic or f"{topic_of(settings, sink)}.dead-letters"
    return read_letters(kafka_of(settings, sink), topic)


def _acceptable(
    folder: RecordFolder, letter: Letter, key: bytes | None, value: bytes | None
) -> bool:
    """Whether a worker would fold it today, as the first event of its entity."""
    place = TopicPartition(letter.told("topic"), 0)
    record = Record(
        topic=place.topic,
        partition=place.partition,
        offset=0,
        timestamp=letter.record.timestamp,
        key=key,
        value=value,
    )
    folding = folder.fold([record], lambda ids: {each: Window(entity_id=each) for each in ids}, {})
    return not folding.letters


def _outgoing(letter: Letter, key: bytes | None, value: bytes | None) -> Outgoing:
    """To its own partition, where its entity's records stand; a mended key may have another."""
    same = key == letter.key and letter.told("field") != "partition"
    return Outgoing(
        topic=letter.told("topic"),
        key=key,
        value=value,
        headers=[*letter.headers, ("llm4es.retry_of", letter.coordinates.encode())],
        partition=int(letter.told("partition")) if same else None,
    )


def _repaired(path: Path | None) -> dict[str, tuple[bytes | None, bytes | None]]:
    if path is None:
        return {}
    found = {}
    try:
        for line in path.read_bytes().splitlines():
            each = msgspec.json.decode(line, type=_Repaired)
            name = f"{each.topic}/{each.partition}/{each.offset}"
            found[name] = each.key, each.value
    except (OSError, msgspec.MsgspecError) as error:
        raise ConfigError(
            "repaired", f"{path} cannot be read ({error})", "write it as `dlq export` does"
        ) from error
    return found


class _Repaired(msgspec.Struct):
    topic: str
    partition: int
    offset: int
    key: bytes | None  # base64 in JSON
    value: bytes | None
