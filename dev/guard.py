"""Ends one server when whoever started it is gone, however that ended: a kill included.

Run as `python guard.py PID`. Its standard input is a pipe whose other end the starter holds open
and never writes to, so end-of-file there means that the starter is dead. (Linux' own
PR_SET_PDEATHSIG is no substitute: it fires when the *thread* that forked ends, so a server
started from a worker thread of a pool would be killed at once.)
"""

import os
import select
import signal
import sys

_GRACE_S = 10.0


def main() -> None:
    """Wait for the server's end or the starter's, whichever comes first."""
    pid = int(sys.argv[1])
    try:
        server = _handle(pid)
    except ProcessLookupError:
        return
    watched = [0] if server is None else [0, server]
    ready, _, _ = select.select(watched, [], [])
    if server in ready:
        return
    _end(pid, server)


def _handle(pid: int) -> int | None:
    # A descriptor of the process itself: unlike its number it can never come to mean another.
    return os.pidfd_open(pid) if hasattr(os, "pidfd_open") else None


def _end(pid: int, server: int | None) -> None:
    _send(pid, server, signal.SIGTERM)
    # Without a descriptor there is nothing to wait on but the time.
    ended, _, _ = select.select([] if server is None else [server], [], [], _GRACE_S)
    if not ended:
        _send(pid, server, signal.SIGKILL)


def _send(pid: int, server: int | None, signum: signal.Signals) -> None:
    try:
        if server is None:
            os.kill(pid, signum)
        else:
            signal.pidfd_send_signal(server, signum)
    except ProcessLookupError:
        return


if __name__ == "__main__":
    main()
