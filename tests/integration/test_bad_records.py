"""Bad records on a real topic: each is parked with its reason, and the rest goes through."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from dev.servers import KafkaServer
from tests.commands import run
from tests.integration.conftest import Sample, apply_repo, open_store
from tests.kafka_topics import make_topics, produce, read_all

Bad = tuple[str, str, bytes]  # (field, part of the reason, value)


def bad_records(customer: str, payment: dict[str, Any]) -> list[Bad]:
    """The payment, broken in one way each; all keyed by its customer."""
    next_year = datetime.now(UTC) + timedelta(days=365)

    def broken(**changed: object) -> bytes:
        return json.dumps(payment | {"customer_id": customer} | changed).encode()

    without_entity = {name: value for name, value in payment.items() if name != "customer_id"}
    return [
        ("value", "is not JSON", b'{"customer_id": "'),
        ("customer_id", "missing", json.dumps(without_entity).encode()),
        ("category", "not int", broken(event_id="number", category=5411)),
        (
            "event_time",
            "max_clock_skew",
            broken(event_id="future", occurred_at=next_year.isoformat()),
        ),
        ("value", "max_value_bytes is 1048576", broken(event_id="large", note="x" * 5_000_000)),
        ("key", "is not the entity's id", broken(event_id="key", customer_id="somebody else")),
    ]


def test_each_bad_record_is_parked_with_its_coordinates_and_the_rest_goes_through(
    kafka_server: KafkaServer, bundle_folder: Path, sample: Sample, unique: str, tmp_path: Path
) -> None:
    documents = [document for document in sample.documents() if document["type"] == "payment"]
    customer = documents[0]["customer_id"]
    bad = bad_records(customer, documents[0])
    records: list[tuple[bytes | None, bytes | None]] = []
    good = [record for record in sample.records() if record[0] == customer.encode()]
    assert len(good) > len(bad)
    for index, record in enumerate(good):
        records.append(record)
        if index < len(bad):
            records.append((customer.encode(), bad[index][2]))
    make_topics(kafka_server, unique)
    coordinates = produce(kafka_server, unique, records)
    repo = apply_repo(
        tmp_path / "repo",
        bundle_folder,
        topic=unique,
        bootstrap_servers=kafka_server.bootstrap_servers,
    )
    done = run(
        ["stream_worker", "run", "--bundle", str(bundle_folder), *repo.flags,
         "--window-store", f"sqlite:{tmp_path / 'windows.db'}",
         "--state-dir", str(tmp_path / "state"), "--until-end", "--json"],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["records"] == len(records)
    assert report["accepted"] + report["duplicates"] == len(good)
    letters = read_all(kafka_server, f"{unique}.dead-letters", expect=len(bad))
    assert len(letters) == len(bad)
    parked = {
        (int(headers["llm4es.partition"]), int(headers["llm4es.offset"])): (headers, value)
        for headers, _, value in letters
    }
    for (_, value), place in zip(records, coordinates, strict=True):
        due = [each for each in bad if each[2] == value]
        assert (place in parked) == bool(due)
        if due:
            headers, original = parked[place]
            assert headers["llm4es.topic"].decode() == unique
            assert headers["llm4es.field"].decode() == due[0][0]
            assert due[0][1] in headers["llm4es.reason"].decode()
            assert original == value
    row = (
        open_store(repo)
        .get_online_features(
            features=open_store(repo).get_feature_service("customer_llm4es"),
            entity_rows=[{"customer_id": customer}],
        )
        .to_dict()
    )
    assert row["event_count"] == [report["accepted"]]
