"""One suite over both places where bad records wait."""

import base64
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from dev.servers import KafkaServer, create_topic
from llm4es.errors import ConfigError, InvalidEvent
from llm4es.events import Record
from stream_worker.dead_letters import FileDeadLetters, KafkaDeadLetters
from stream_worker.ports import DeadLetter, DeadLetters
from stream_worker.sources.kafka_client import KafkaSettings
from tests.histories import START
from tests.kafka_topics import LARGEST, make_topics, read_all

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
