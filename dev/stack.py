"""Real Kafka and Redis on this machine until Ctrl-C: `make stack`, or `python -m dev.stack`."""

import shutil
import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from dev.processes import free_port, is_free
from dev.servers import KafkaServer, RedisServer, ServerFailed, create_topic

__all__ = ["main"]

_LARGEST = 8 << 20
# A dead letter is the original record and headers that say why it is there.
_LARGEST_DEAD_LETTER = 9 << 20

_TOPIC = "payments"
# What the compose file gives its containers; on one machine a relative registry is a file of it.
_SETTINGS = {
    "PYTHONPATH": "$PWD",  # `feast` is a program of its own, and must find llm4es
    "LLM4ES_BUNDLE": "$PWD/build/demo/bundle",
    "LLM4ES_TOPIC": _TOPIC,
    "LLM4ES_BOOTSTRAP_SERVERS": "{kafka}",
    "LLM4ES_REGISTRY": "data/registry.stack.db",
    "LLM4ES_REDIS": "{redis}",
    "LLM4ES_WINDOW_STORE": "redis://{redis}/1",
    "LLM4ES_FEATURE_STORE_FILE": "feature_store.prod.yaml",
}
_COMMANDS = {
    "for the commands below": "export "
    + " ".join(f'{name}="{value}"' for name, value in _SETTINGS.items()),
    "tell Feast of the bundle": "{bin}/feast -c feature_repo"
    " -f feature_repo/feature_store.prod.yaml apply",
    "load events": "{bin}/python -m dev.load build/demo/sample/events.jsonl"
    f" --bootstrap-servers {{kafka}} --topic {_TOPIC}",
    "run the worker": "{bin}/python -m stream_worker run --live",
}


def main(
    folder: Annotated[
        Path, typer.Option(help="Where data and logs are kept; they are there next time")
    ] = Path(".cache/stack"),
    kafka_port: Annotated[int, typer.Option(help="Kafka's port; a free one if it is taken")] = 9092,
    redis_port: Annotated[int, typer.Option(help="Redis' port; a free one if it is taken")] = 6379,
) -> None:
    """Start Kafka and Redis, create the topics, print the addresses, stop both on Ctrl-C."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, _interrupt)
    console = Console(stderr=True)
    try:
        _serve(console, folder, kafka_port, redis_port)
    except KeyboardInterrupt:
        console.print("stopped; the data is in", str(folder), highlight=False)
    except ServerFailed as failure:
        console.print(str(failure), style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(4) from failure


def _interrupt(_signum: int, _frame: FrameType | None) -> None:
    # Once is enough: a second Ctrl-C would leave a server half stopped.
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)
    raise KeyboardInterrupt


def _serve(console: Console, folder: Path, kafka_port: int, redis_port: int) -> None:
    with ExitStack() as servers:
        kafka = KafkaServer(folder / "kafka", port=_port(console, "Kafka", kafka_port))
        redis = RedisServer(folder / "redis", port=_port(console, "Redis", redis_port))
        with console.status("starting Kafka and Redis (the first time Maven fetches Kafka)"):
            servers.enter_context(kafka)
            servers.enter_context(redis)
            _create_topics(kafka)
        _announce(kafka, redis)
        while kafka.running and redis.running:
            time.sleep(0.2)
        ended = redis if kafka.running else kafka
        raise ServerFailed(f"{type(ended).__name__} ended by itself; see {ended.log}")


def _port(console: Console, name: str, wanted: int) -> int:
    if is_free(wanted):
        return wanted
    port = free_port()
    console.print(f"port {wanted} is taken: {name} gets {port}", highlight=False)
    return port


def _create_topics(kafka: KafkaServer) -> None:
    for name, partitions, largest in (
        (_TOPIC, 4, _LARGEST),
        (f"{_TOPIC}.dead-letters", 1, _LARGEST_DEAD_LETTER),
    ):
        create_topic(
            kafka.bootstrap_servers,
            name,
            partitions=partitions,
            # The log is what windows are rebuilt from, so it is kept.
            config={"max.message.bytes": str(largest), "retention.ms": "-1"},
            exist_ok=True,
        )


def _announce(kafka: KafkaServer, redis: RedisServer) -> None:
    # The commands are one line each, however wide the terminal: they are there to be copied.
    console = Console(soft_wrap=True, highlight=False)
    table = Table("server", "address", "log")
    table.add_row("Kafka", kafka.bootstrap_servers, str(kafka.log))
    table.add_row("Redis", redis.url, str(redis.log))
    console.print(table)
    console.print(f"topics: {_TOPIC} (4 partitions), {_TOPIC}.dead-letters (1)\n")
    programs = Path(sys.executable).parent
    if programs.is_relative_to(Path.cwd()):
        programs = programs.relative_to(Path.cwd())
    for title, command in _COMMANDS.items():
        console.print(f"# {title}", style="dim")
        line = command.format(kafka=kafka.bootstrap_servers, redis=redis.address, bin=programs)
        console.print(line, markup=False)
    if shutil.which("redis-cli"):
        console.print("# look into Redis", style="dim")
        console.print(f"redis-cli -p {redis.port}", markup=False)
    console.print("\nCtrl-C stops both.")


if __name__ == "__main__":
    typer.run(main)
