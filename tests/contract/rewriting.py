"""A process that rewrites a log's parts, to be killed: `python -m tests.contract.rewriting LOG`.

At each line on stdin it does so anew, in a fork whose pid it says; "gone" when that has ended.
Python and Feast are loaded once, by the parent, which never opens the log.
"""

import os
import sys
from pathlib import Path

from llm4es.feast.definitions import TIMESTAMP_FIELD
from llm4es.feast.offline_log import rewrite_deleted


def main(log: Path) -> None:
    for _ in sys.stdin:
        child = os.fork()
        if child == 0:
            rewrite_deleted(log, join_key="customer_id", timestamp_field=TIMESTAMP_FIELD)
            os._exit(0)
        say(f"{child}")
        os.waitpid(child, 0)
        say("gone")


def say(line: str) -> None:
    os.write(sys.stdout.fileno(), f"{line}\n".encode())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
