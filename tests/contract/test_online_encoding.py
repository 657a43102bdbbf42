"""What we write by hand is, byte for byte, what Feast's own messages give."""

import struct
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from feast.infra.online_stores.helpers import extract_text_and_num
from feast.protos.feast.types.Value_pb2 import FloatList, Value
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st
from redis import Redis

from dev.servers import RedisServer
from llm4es.feast.online import ViewTarget, encode_row, encode_timestamp, encode_vector
from llm4es.feast.redis_packing import RowPacker
from llm4es.feast.redis_scripts import DECODE
from tests.feast_parts import BUNDLE_ID, apply, make_repo, make_spec, row

pytestmark = [
    pytest.mark.filterwarnings("ignore:Stream feature views are experimental:RuntimeWarning"),
]

MOMENTS = st.datetimes(datetime(1970, 1, 1), datetime(2262, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001
OLD = st.datetimes(datetime(1700, 1, 1), datetime(2262, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> ViewTarget:
    folder: Path = tmp_path_factory.mktemp("encoding")
    spec = make_spec(folder / "bundle")
    store = apply(make_repo(folder / "repo"), spec)
    view = store.get_stream_feature_view(f"customer_llm4es_{BUNDLE_ID}")
    return ViewTarget(store, view, "customer_id")


@pytest.fixture(scope="module")
def redis_client(redis_server: RedisServer) -> Iterator[Redis]:
    client = Redis.from_url(redis_server.url)
    yield client
    client.close()


@given(
    entity=st.text(max_size=300),
    event=st.text(max_size=300),
    count=st.integers(0, 2**62),
    last=st.floats(width=32, allow_nan=False, allow_infinity=False),
    when=OLD,
)
def test_a_row_is_what_feasts_messages_give(  # noqa: PLR0917 - hypothesis
    target: ViewTarget, entity: str, event: str, count: int, last: float, when: datetime
) -> None:
    made = replace(
        row(make_spec(Path(target.store.repo_path).parent / "bundle"), entity),
        last_event_id=event,
        event_count=count,
        surprise_last=last,
        last_event_time=when,
    )
    messages = {
        "embedding": Value(float_list_val=FloatList(val=made.embedding)),
        "surprise": Value(float_list_val=FloatList(val=made.surprise)),
        "surprise_last": Value(float_val=last),
        "event_count": Value(int64_val=count),
        "last_event_id": Value(string_val=event),
        "last_event_time": Value(unix_timestamp_val=int(when.timestamp())),
        "bundle_id": Value(string_val=made.bundle_id),
        "customer_id": Value(string_val=entity),
    }
    assert encode_row(made, target) == {
        name: message.SerializeToString() for name, message in messages.items()
    }
    assert extract_text_and_num(messages["surprise_last"], compute_num=False)[0] == str(
        float(np.float32(last))
    )


@given(
    entities=st.lists(st.text(max_size=300), max_size=4),
    event=st.text(max_size=300),
    count=st.integers(0, 2**62),
    when=MOMENTS,
    old=OLD,
    dim=st.sampled_from([8, 384, 20_000]),  # lengths of 8, 16 and 32 bits
)
def test_rows_packed_for_redis_are_what_feasts_messages_give(  # noqa: PLR0917 - hypothesis
    target: ViewTarget,
    entities: list[str],
    event: str,
    count: int,
    when: datetime,
    old: datetime,
    dim: int,
) -> None:
    names = [feature.name for feature in target.view.features]
    packer = RowPacker(target, {name: name.encode() for name in names}, b"_ts:" + b"v" * 40)
    spec = make_spec(Path(target.store.repo_path).parent / "bundle")
    rows = [
        replace(
            row(spec, entity, as_of=when, embedding=np.arange(dim, dtype=np.float32)),
            last_event_id=event,
            event_count=count,
            last_event_time=old,
        )
        for entity in entities
    ]
    guards, packed = packer.pack(rows)
    moment = encode_timestamp(when)
    numbers = struct.iter_unpack(">xQxIxI", guards)
    for made, (seconds, nanos, at) in zip(rows, numbers, strict=True):
        assert (seconds, nanos) == moment[:2]
        strings = unpacked(packed[at:], packer.width)
        assert dict(zip(strings[::2], strings[1::2], strict=True)) == {
            b"_ts:" + b"v" * 40: moment[2],
            **{name.encode(): value for name, value in encode_row(made, target).items()},
        }
        assert strings[0].startswith(b"_ts:")


def unpacked(content: bytes, count: int) -> list[bytes]:
    """Strings of MessagePack."""
    found, at = [], 0
    for _ in range(count):
        size = {0xDA: 2, 0xDB: 4}.get(content[at], 0)
        length = int.from_bytes(content[at + 1 : at + 1 + size]) if size else content[at] & 0x1F
        assert size or content[at] >> 5 == 0b101
        found.append(content[at + 1 + size : at + 1 + size + length])
        at += 1 + size + length
    return found


@given(moment=MOMENTS)
def test_a_timestamp_is_what_protobuf_gives(moment: datetime) -> None:
    message = Timestamp()
    message.FromDatetime(moment)
    due = (message.seconds, message.nanos, message.SerializeToString())
    assert encode_timestamp(moment) == due
    assert encode_timestamp(moment + timedelta(0)) == due


@pytest.mark.parametrize("size", [0, 1, 31, 32, 4_095, 4_096, 100_000])
def test_vectors_of_any_length(size: int) -> None:
    vector = np.arange(size, dtype=np.float32)
    message = Value(float_list_val=FloatList(val=vector))
    assert encode_vector(vector) == message.SerializeToString()


@given(
    seconds=st.one_of(
        st.integers(0, 253_402_300_799),
        st.sampled_from([0, 1, 127, 128, 2**21, 2**28 - 1, 2**28, 2**35 - 1, 2**35]),
    ),
    nanos=st.one_of(
        st.integers(0, 999_999_999),
        st.sampled_from([0, 1, 127, 128, 2**14 - 1, 2**14, 2**21, 2**28 - 1, 2**28]),
    ),
)
def test_redis_reads_any_timestamp_as_its_message_does(
    redis_client: Redis, seconds: int, nanos: int
) -> None:
    written = Timestamp(seconds=seconds, nanos=nanos).SerializeToString()
    script = (
        f"{DECODE}\nlocal s, n = decode(ARGV[1])\n"
        "return {string.format('%.0f', s), string.format('%.0f', n)}"
    )
    found: Any = redis_client.eval(script, 0, written)
    assert [int(each) for each in found] == [seconds, nanos]
