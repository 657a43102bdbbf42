"""A process to be killed, that flushes and compacts: `python -m tests.contract.compacting`.

Each line on stdin is `flush ENTITY` or `compact ENTITY`; each is done by a fork of this process, so
that Python and Feast are loaded once. Row n of an entity is a microsecond after row n - 1.
"""

import os
import sys
from pathlib import Path
from typing import NoReturn

from llm4es.events import TopicPartition
from llm4es.feast import ViewSpec
from llm4es.feast.compaction import compact
from llm4es.feast.journal import OfflineJournal
from tests.contract.journalling import say
from tests.feast_parts import MICROSECOND, NOON, make_spec, row

ROWS_PER_PART = 4
PARTS = 3  # flushed between two compactions


def main(log: Path) -> None:
    """Do as each line says, until killed; say "gone" when a fork is."""
    spec = make_spec(log.parent / "bundle")
    for line in sys.stdin:
        what, entity_id = line.split()
        child = os.fork()
        if child == 0:
            work(log, spec, entity_id, compacting=what == "compact")
        os.waitpid(child, 0)
        say("gone")


def work(log: Path, spec: ViewSpec, entity_id: str, *, compacting: bool) -> NoReturn:
    """Flush a part, say how many rows are durable, and compact now and then; go on until killed."""
    opened = OfflineJournal(
        log, join_key="customer_id", writer_id=entity_id, roll_rows=10**6, roll_s=3600
    )
    say(f"pid {os.getpid()}")
    number = -1
    while True:
        number += 1
        numbers = range(number * ROWS_PER_PART, (number + 1) * ROWS_PER_PART)
        opened.append(
            [
                row(spec, entity_id, as_of=NOON + n * MICROSECOND, last_event_id=f"e{n}")
                for n in numbers
            ],
            {TopicPartition("events", 0): (numbers.start, numbers.stop)},
        )
        say(f"durable {numbers.stop}")
        opened.roll()
        if compacting and number % PARTS == PARTS - 1:
            say("compacting")
            compact(log, "customer_id")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
