"""Checks that the log is still the one the windows were folded from, and where to go on.

DESIGN 4: "A log may change under us" and "Stores may lose their tail".
"""

import logging
from collections.abc import Collection, Mapping, Sequence

from llm4es.errors import BundleMismatch, InvalidEvent
from llm4es.events import Record, TopicPartition, decode_object, entity_id_of
from llm4es.schema import EventSchema
from stream_worker.formats.decoding import Decode
from stream_worker.ports import LogDescription, LogIdentity

__all__ = [
    "refuse_changed_log",
    "refuse_foreign_keys",
    "refuse_other_topic",
    "start_positions",
]

log = logging.getLogger(__name__)


def refuse_other_topic(topic: str, folded_from: Collection[str]) -> None:
    """Refuse a topic under windows of another: every entity they know stands in that one.

    Raises BundleMismatch.
    """
    others = sorted(set(folded_from) - {topic})
    if others:
        raise BundleMismatch(
            f"topic {topic}",
            f"the window store was folded from topic {', '.join(others)}",
            f"use another --window-store, or topic {others[0]}",
        )


def refuse_changed_log(found: LogDescription, known: LogIdentity | None) -> None:
    """Refuse a log from which windows cannot, or can no longer, be folded.

    Raises BundleMismatch naming the remedy.
    """
    topic = found.identity.topic
    if found.compacted:
        raise BundleMismatch(
            f"topic {topic}",
            "cleanup.policy is compact, so records in the middle of a history may be gone",
            "set cleanup.policy=delete and produce the history again",
        )
    if found.timestamps == "create":
        raise BundleMismatch(
            f"topic {topic}",
            "keeps the producers' timestamps (CreateTime) without a bound, so that one wrong clock "
            "decides for good what a label may see",
            "set message.timestamp.type=LogAppendTime, or bound it: message.timestamp.after.max.ms",
        )
    if found.timestamps == "create_bounded":
        log.warning(
            "topic %s keeps the producers' timestamps (CreateTime): within their bound a wrong "
            "clock decides what a label may see; better is message.timestamp.type=LogAppendTime",
            topic,
        )
    if known is None:
        return
    if known.topic_id and known.topic_id != found.identity.topic_id:
        raise BundleMismatch(
            f"topic {topic}",
            "was deleted and created anew since these windows were folded",
            "start a fresh window store (another --window-store) on the new topic",
        )
    if known.partitions != found.identity.partitions:
        raise BundleMismatch(
            f"topic {topic}",
            f"has {found.identity.partitions} partitions where it had {known.partitions}, so "
            "entities moved between partitions",
            "produce the log into a new topic, and start a fresh window store on it",
        )


def start_positions(
    found: LogDescription,
    partitions: Sequence[TopicPartition],
    *,
    stored: Mapping[TopicPartition, int],
    committed: Mapping[TopicPartition, int],
    unproven_start: bool,
) -> dict[TopicPartition, int]:
    """Where to read each partition from: the smaller of the store's and the group's offset.

    A store that knows nothing of a partition starts at the log's start, whatever the group has
    committed. Raises BundleMismatch where the records needed are gone.
    """
    positions: dict[TopicPartition, int] = {}
    for tp in partitions:
        span = found.spans[tp.partition]
        if tp not in stored:
            if span.first > 0 and not unproven_start:
                raise BundleMismatch(
                    f"topic {tp.topic}",
                    f"partition {tp.partition} begins at offset {span.first}: retention has taken "
                    "what came before",
                    "give --unproven-start to serve windows of what is left",
                )
            positions[tp] = span.first
            continue
        position = min(stored[tp], committed.get(tp, stored[tp]))
        if position < span.first:
            raise BundleMismatch(
                f"topic {tp.topic}",
                f"partition {tp.partition} begins at offset {span.first}, and {position} is needed",
                "lengthen its retention and start a fresh window store with --unproven-start",
            )
        if position > span.end:
            raise BundleMismatch(
                f"topic {tp.topic}",
                f"partition {tp.partition} ends at offset {span.end}, and the windows hold it up "
                f"to {position}: the log has lost its tail",
                "start a fresh window store (another --window-store)",
            )
        positions[tp] = position
    return positions


def refuse_foreign_keys(
    records: Sequence[Record], schema: EventSchema, entity: str, decode: Decode = decode_object
) -> None:
    """Refuse a topic that is keyed by something else than this entity's id in UTF-8.

    Judged on a sample, by its majority: ids of two entities coincide now and then, and single
    records with a wrong key are dead letters. Raises BundleMismatch.
    """
    field = schema.entity(entity).field
    keyed = foreign = 0
    for record in records:
        try:
            entity_id = entity_id_of(decode(record.value or b""), field)
        except InvalidEvent:
            continue
        if record.key == entity_id.encode():
            keyed += 1
        else:
            foreign += 1
    if foreign > keyed:
        raise BundleMismatch(
            f"topic {records[0].topic}",
            f"is not keyed by {field}: {foreign} of {foreign + keyed} records looked at have "
            f"another key than the {entity}'s id",
            f"produce with the key {field} in UTF-8, or repartition the topic by {entity}",
        )
