"""Produce a file of events to a topic, keyed by entity: `python -m dev.load EVENTS.jsonl`."""

import json
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

with warnings.catch_warnings():
    # kafka-python 3.0 reads its schemas through an importlib.resources call that 3.11 deprecates.
    warnings.simplefilter("ignore", DeprecationWarning)
    from kafka import KafkaProducer
    from kafka.errors import KafkaError

__all__ = ["load", "main"]

_LARGEST = 8 << 20
_TIMEOUT_S = 60


def load(events: Path, *, bootstrap_servers: str, topic: str, key: str) -> int:
    """Produce each line as it is, under the value of its field `key`; return how many.

    Lines stay in order within a key, and none is written twice by a retry. Raises KafkaError.
    """
    producer = KafkaProducer(
        bootstrap_servers=bootstrap_servers,
        enable_idempotence=True,
        linger_ms=20,
        max_request_size=_LARGEST + 1024,
    )
    count = 0
    failed: list[Exception] = []
    try:
        with events.open("rb") as lines:
            for line in lines:
                value = line.rstrip(b"\n")
                entity = str(json.loads(value)[key]).encode()
                producer.send(topic, key=entity, value=value).add_errback(failed.append)
                count += 1
        producer.flush(timeout=_TIMEOUT_S)
    finally:
        producer.close(timeout=_TIMEOUT_S)
    if failed:
        raise failed[0]
    return count


def main(
    events: Annotated[Path, typer.Argument(help="JSONL, one event a line", dir_okay=False)],
    bootstrap_servers: Annotated[str, typer.Option(help="Kafka's address")] = "127.0.0.1:9092",
    topic: Annotated[str, typer.Option(help="The topic to write to")] = "payments",
    key: Annotated[str, typer.Option(help="The field that names the entity")] = "customer_id",
) -> None:
    """Produce a file of events to a topic, keyed by entity as the worker needs it."""
    try:
        count = load(events, bootstrap_servers=bootstrap_servers, topic=topic, key=key)
    except (KafkaError, OSError, ValueError, KeyError) as error:
        print(f"{events}: {error!r}", file=sys.stderr)
        raise typer.Exit(4 if isinstance(error, KafkaError) else 2) from error
    print(f"{count} events in {topic}")


if __name__ == "__main__":
    typer.run(main)
