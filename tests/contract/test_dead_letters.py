"""One suite over both places where bad records wait."""

import base64
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from dev.servers import KafkaServer, create_topic
from llm4es.errors import ConfigError, InvalidEvent, SinkUnavailable
from llm4es.events import Record
from stream_worker.dead_letters import FileDeadLetters, KafkaDeadLetters
from stream_worker.ports import DeadLetter, DeadLetters
from stream_worker.sources import kafka_client
from stream_worker.sources.kafka import KafkaGroup, KafkaRecordSource
from stream_worker.sources.kafka_client import KafkaProducer, KafkaSettings, kafka_partition
from tests.histories import START
from tests.kafka_topics import LARGEST, make_topics, read_all

# Loaded there without its warnings.
kafka_errors: Any = vars(kafka_client)["kafka_errors"]
KafkaAdminClient: Any = vars(kafka_client)["KafkaAdminClient"]

SMALL = 128 << 10

LETTERS = [
    DeadLetter(
        Record(
            topic="shop",
            partition=3,
            offset=offset,
            timestamp=START,
            key=key,
            value=value,
            headers=(("trace", b"\x00\xff"),),
        ),
        InvalidEvent("amount", "a number is due, not str: é"),
    )
    for offset, (key, value) in enumerate(
        [(b"c1", b"\xff not JSON"), (None, b""), (b"c2", b"x" * (LARGEST - 4096))]
    )
]

Told = list[tuple[str, str, str, bytes | None, bytes]]
Reader = Callable[[int], Told]


def told(headers: Mapping[str, str], key: bytes | None, value: bytes) -> Told:
    place = "/".join(headers[name] for name in ("topic", "partition", "offset"))
    return [(place, headers["field"], headers["reason"], key, value)]


@pytest.fixture(params=["file", "kafka"])
def letters(
    request: pytest.FixtureRequest, tmp_path: Path, unique: str
) -> tuple[Callable[[], DeadLetters], Reader]:
    if request.param == "file":
        path = tmp_path / "state" / "dead-letters.jsonl"

        def read_file(_: int) -> Told:
            found: Told = []
            for line in path.read_text().splitlines():
                letter = json.loads(line)
                key = letter["key"]
                found += told(
                    {name: str(value) for name, value in letter.items()},
                    None if key is None else base64.b64decode(key),
                    base64.b64decode(letter["value"]),
                )
            return found

        return lambda: FileDeadLetters(path), read_file
    server: KafkaServer = request.getfixturevalue("kafka_server")
    make_topics(server, unique)
    settings = KafkaSettings(bootstrap_servers=server.bootstrap_servers)

    def read_topic(expect: int) -> Told:
        found: Told = []
        for headers, key, value in read_all(server, f"{unique}.dead-letters", expect=expect):
            ours = {
                name.removeprefix("llm4es."): text.decode()
                for name, text in headers.items()
                if name.startswith("llm4es.") and name != "llm4es.key"
            }
            found += told(ours, headers.get("llm4es.key"), value)
            assert key == f"{ours['topic']}/{ours['partition']}/{ours['offset']}".encode()
            assert headers["trace"] == b"\x00\xff"
            assert ours["timestamp_ms"] == str(round(START.timestamp() * 1000))
        return found

    return (
        lambda: KafkaDeadLetters(settings, f"{unique}.dead-letters", source_topic=unique),
        read_topic,
    )


def test_a_letter_is_the_records_bytes_with_its_coordinates_and_reason(
    letters: tuple[Callable[[], DeadLetters], Reader],
) -> None:
    opened = letters[0]()
    opened.park(LETTERS[:1])
    opened.park(LETTERS[1:])
    opened.close()
    assert letters[1](len(LETTERS)) == [
        (
            f"shop/3/{letter.record.offset}",
            "amount",
            "a number is due, not str: é",
            letter.record.key,
            letter.record.value,
        )
        for letter in LETTERS
    ]


def test_letters_outlive_their_writer_and_are_added_to(
    letters: tuple[Callable[[], DeadLetters], Reader],
) -> None:
    for letter in LETTERS[:2]:
        opened = letters[0]()
        opened.park([letter])
        opened.close()
    assert [place for place, *_ in letters[1](2)] == ["shop/3/0", "shop/3/1"]


def test_a_topic_that_is_absent_or_too_small_is_refused(
    kafka_server: KafkaServer, unique: str
) -> None:
    make_topics(kafka_server, unique)
    settings = KafkaSettings(bootstrap_servers=kafka_server.bootstrap_servers)
    with pytest.raises(ConfigError, match="create it"):
        KafkaDeadLetters(settings, f"{unique}.absent", source_topic=unique)
    create_topic(
        kafka_server.bootstrap_servers, f"{unique}.small", config={"max.message.bytes": "1048576"}
    )
    with pytest.raises(ConfigError, match=r"max\.message\.bytes"):
        KafkaDeadLetters(settings, f"{unique}.small", source_topic=unique)


def letter_of(value: bytes | None, **more: object) -> DeadLetter:
    made = Record(topic="shop", partition=0, offset=7, timestamp=START, key=b"c1", value=value)
    return DeadLetter(replace(made, **more), InvalidEvent("value", "is not JSON"))


@pytest.fixture
def shop(kafka_server: KafkaServer, unique: str) -> Iterator[KafkaDeadLetters]:
    make_topics(kafka_server, unique, partitions=1)
    settings = KafkaSettings(bootstrap_servers=kafka_server.bootstrap_servers)
    opened = KafkaDeadLetters(settings, f"{unique}.dead-letters", source_topic=unique)
    yield opened
    opened.close()


NULL_HEADERS = (("a", b"1"), ("b", None), ("a", None), ("c", b""))


def test_headers_that_are_null_are_told_from_empty_ones_in_the_topic(
    shop: KafkaDeadLetters, kafka_server: KafkaServer, unique: str
) -> None:
    shop.park([letter_of(b"{", headers=NULL_HEADERS)])
    ((headers, _, _),) = read_all(kafka_server, f"{unique}.dead-letters", expect=1)
    assert headers["llm4es.null_headers"] == b"1,2"
    assert (headers["b"], headers["c"]) == (b"", b"")


def test_headers_are_kept_in_the_file_null_ones_as_null(tmp_path: Path) -> None:
    opened = FileDeadLetters(tmp_path / "letters.jsonl")
    opened.park([letter_of(b"{", headers=NULL_HEADERS)])
    opened.close()
    (line,) = (tmp_path / "letters.jsonl").read_text().splitlines()
    assert json.loads(line)["headers"] == [["a", "MQ=="], ["b", None], ["a", None], ["c", ""]]


def test_a_null_header_that_was_really_produced_goes_through_source_and_dead_letters(
    shop: KafkaDeadLetters, kafka_server: KafkaServer, unique: str
) -> None:
    produce_null_header(kafka_server, unique)
    settings = KafkaSettings(bootstrap_servers=kafka_server.bootstrap_servers)
    source = KafkaRecordSource(settings, unique, KafkaGroup(unique))
    (record,) = source.sample(1)
    source.close()
    assert record.headers == (("trace", None),)
    shop.park([DeadLetter(record, InvalidEvent("value", "is not JSON"))])
    ((headers, _, value),) = read_all(kafka_server, f"{unique}.dead-letters", expect=1)
    assert (headers["llm4es.null_headers"], value) == (b"0", b"{")


def test_a_record_that_was_compressed_into_its_topic_is_parked_whole(
    shop: KafkaDeadLetters, kafka_server: KafkaServer, unique: str
) -> None:
    value = b"spam and eggs " * (2 * LARGEST // 14)
    assert len(value) > LARGEST * 1.9
    shop.park([letter_of(value)])
    ((headers, _, parked),) = read_all(kafka_server, f"{unique}.dead-letters", expect=1)
    assert parked == value
    assert "llm4es.truncated_from" not in headers


@pytest.mark.parametrize(
    "more",
    [{}, {"key": os.urandom(SMALL)}, {"headers": (("h", os.urandom(SMALL)),)}],
    ids=["value", "key", "headers"],
)
def test_a_record_that_does_not_fit_is_cut_and_says_so_and_blocks_no_other(
    kafka_server: KafkaServer, unique: str, more: dict[str, Any]
) -> None:
    for name, size in ((unique, SMALL), (f"{unique}.dead-letters", SMALL + (16 << 10))):
        create_topic(kafka_server.bootstrap_servers, name, config={"max.message.bytes": str(size)})
    settings = KafkaSettings(bootstrap_servers=kafka_server.bootstrap_servers)
    opened = KafkaDeadLetters(settings, f"{unique}.dead-letters", source_topic=unique)
    value = os.urandom(2 * SMALL)  # as a stronger codec than ours may have got into the source
    opened.park([letter_of(b"before"), letter_of(value, **more), letter_of(b"behind")])
    opened.park([letter_of(b"after")])
    opened.close()
    found = read_all(kafka_server, f"{unique}.dead-letters", expect=4)
    small = [parked for _, _, parked in found if len(parked) < 10]
    assert small == [b"before", b"behind", b"after"]
    ((headers, key, cut),) = [each for each in found if len(each[2]) > 10]
    assert (key, headers["llm4es.offset"]) == (b"shop/0/7", b"7")
    assert headers["llm4es.truncated_from"] == str(len(value)).encode()
    assert cut == value[: SMALL // 2]
    assert headers["llm4es.key"] == more.get("key", b"c1")[: SMALL // 4]


def test_a_record_that_would_take_all_memory_is_cut_at_once(
    shop: KafkaDeadLetters, kafka_server: KafkaServer, unique: str
) -> None:
    shop.park([letter_of(bytes(80 << 20))])
    ((headers, _, cut),) = read_all(kafka_server, f"{unique}.dead-letters", expect=1)
    assert headers["llm4es.truncated_from"] == str(80 << 20).encode()
    assert cut == bytes(LARGEST // 2)


def test_a_dead_letter_topic_that_is_deleted_stops_with_a_remedy(
    shop: KafkaDeadLetters, kafka_server: KafkaServer, unique: str
) -> None:
    client = KafkaAdminClient(bootstrap_servers=kafka_server.bootstrap_servers)
    client.delete_topics([f"{unique}.dead-letters"])
    client.close()
    with pytest.raises(ConfigError, match=r"dead_letter_topic: .*create"):
        shop.park([letter_of(b"{")])


@pytest.mark.parametrize(
    ("error", "ours"),
    [
        (kafka_errors.TopicAuthorizationFailedError("no"), ConfigError),
        (kafka_errors.ClusterAuthorizationFailedError("no"), ConfigError),
        (kafka_errors.NotEnoughReplicasError("no"), SinkUnavailable),
        (kafka_errors.KafkaTimeoutError("no"), SinkUnavailable),
    ],
)
def test_an_acl_stops_and_a_broker_that_is_away_is_waited_for(
    shop: KafkaDeadLetters, error: Exception, ours: type[Exception]
) -> None:
    assert type(shop._translated(error)) is ours  # noqa: SLF001 - no broker fails to order
    assert "dead-letters" in str(shop._translated(error))  # noqa: SLF001


def test_a_dead_letter_topic_that_we_may_not_write_stops_with_a_remedy(
    tmp_path: Path, unique: str
) -> None:
    authorizer = "org.apache.kafka.metadata.authorizer.StandardAuthorizer"
    properties = {
        "authorizer.class.name": authorizer, "allow.everyone.if.no.acl.found": "true",
    }  # fmt: skip
    with KafkaServer(tmp_path / "kafka", properties=properties) as server:
        make_topics(server, unique, partitions=1)
        settings = KafkaSettings(bootstrap_servers=server.bootstrap_servers)
        opened = KafkaDeadLetters(settings, f"{unique}.dead-letters", source_topic=unique)
        opened.park([letter_of(b"{")])
        client = KafkaAdminClient(bootstrap_servers=server.bootstrap_servers)
        client.create_acls([deny_writing(f"{unique}.dead-letters")])
        client.close()
        with pytest.raises(ConfigError, match=r"dead_letter_topic: .*refuses us.*ACLs"):
            park_until_denied(opened)
        opened.close()


def park_until_denied(letters: KafkaDeadLetters) -> None:
    """Park, until the broker has heard of its new rule."""
    for _ in range(200):
        letters.park([letter_of(b"{")])


def deny_writing(topic: str) -> object:
    from kafka.admin import (  # noqa: PLC0415 - behind kafka_client, which silences its warnings
        ACL,
        ACLOperation,
        ACLPermissionType,
        ResourcePattern,
        ResourceType,
    )

    return ACL(
        principal="User:ANONYMOUS",
        host="*",
        operation=ACLOperation.WRITE,
        permission_type=ACLPermissionType.DENY,
        resource_pattern=ResourcePattern(ResourceType.TOPIC, topic),
    )


class NullOnce(list[tuple[str, bytes | None]]):
    """Headers that are null as they are encoded, and empty when they are measured afterwards."""

    encoded = False

    def __iter__(self) -> Iterator[tuple[str, bytes | None]]:
        found = [(name, b"" if self.encoded else None) for name, _ in super().__iter__()]
        self.encoded = True
        return iter(found)


def produce_null_header(server: KafkaServer, topic: str) -> None:
    """kafka-python's `send` refuses what its encoding can hold, and other producers send."""
    producer = KafkaProducer(bootstrap_servers=server.bootstrap_servers, acks="all")
    producer.partitions_for(topic)
    sent = producer._accumulator.append(  # noqa: SLF001
        kafka_partition(topic, 0), None, b"c1", b"{", NullOnce([("trace", b"")])
    )
    producer.flush(timeout=30)
    assert sent[0].succeeded()
    producer.close()
