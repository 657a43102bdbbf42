"""A process that journals rows without end, to be killed: `python -m tests.contract.journalling`.

It says on stdout, a line each, how many rows it was told are durable. Rows of one process are of
one entity; row n is a microsecond after row n - 1.
"""

import os
import sys
from pathlib import Path
from typing import NoReturn

from llm4es.feast import ViewSpec
from llm4es.feast.journal import OfflineJournal
from tests.feast_parts import MICROSECOND, NOON, make_spec, row

ROWS_PER_CALL = 3
ROLL_ROWS = 20  # so that a kill finds parts being written as often as frames


def main(log: Path, entity_ids: list[str]) -> None:
    """Journal as the first entity; at each line on stdin, as the next, in a fork of this process.

    Python and Feast are loaded once, by the parent, which never opens the log.
    """
    spec = make_spec(log.parent / "bundle")
    for entity_id in entity_ids:
        sys.stdin.readline()
        child = os.fork()
        if child == 0:
            journal(log, entity_id, spec)
        os.waitpid(child, 0)
        say("gone")


def journal(log: Path, entity_id: str, spec: ViewSpec) -> NoReturn:
    """Go on until killed."""
    opened = OfflineJournal(
        log, join_key="customer_id", writer_id=entity_id, roll_rows=ROLL_ROWS, roll_s=60
    )
    say(f"pid {os.getpid()}")
    number = 0
    while True:
        numbers = range(number, number + ROWS_PER_CALL)
        opened.append(
            [
                row(spec, entity_id, as_of=NOON + n * MICROSECOND, last_event_id=f"e{n}")
                for n in numbers
            ]
        )
        number = numbers.stop
        say(f"{number}")


def say(line: str) -> None:
    """One write, so that a kill tears no line."""
    os.write(sys.stdout.fileno(), f"{line}\n".encode())


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
