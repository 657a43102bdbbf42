"""A TCP proxy that misbehaves on demand, between a client and its server."""

import asyncio
import socket
import struct
import threading
from types import TracebackType
from typing import Literal, Self

from dev.processes import LOOPBACK

__all__ = ["Mode", "Proxy"]

Mode = Literal["pass", "stall", "reset", "drip"]

_CHUNK = 64 << 10
_DRIP_BYTES = 200
_DRIP_EVERY_S = 0.004
_LINGER_NOT = struct.pack("ii", 1, 0)  # a close that the other side sees as a reset


class Proxy:
    """Listens on a port of its own, in a thread of its own, for one server's port.

    Modes: "pass"; "stall" holds every byte back; "reset" breaks every connection, new ones too;
    "drip" lets a few bytes through at a time.
    """

    def __init__(self, target: int | None = None) -> None:
        self.target = target  # may be told later, before the first connection
        self._mode: Mode = "pass"
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._socket = socket.create_server((LOOPBACK, 0))
        self.port: int = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)
        self._thread.start()

    def set(self, mode: Mode) -> None:
        """Behave like this from now on."""
        self._mode = mode
        flow = self._flowing.clear if mode == "stall" else self._flowing.set
        self._loop.call_soon_threadsafe(flow)
        if mode == "reset":
            self._loop.call_soon_threadsafe(self._break_all)

    def close(self) -> None:
        """Break every connection and stop."""
        self._loop.call_soon_threadsafe(self._break_all)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(
            asyncio.start_server(self._connect, sock=self._socket)
        )
        self._loop.run_forever()
        server.close()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._mode == "reset":
            _break(writer)
            return
        try:
            far_reader, far_writer = await asyncio.open_connection(LOOPBACK, self.target)
        except OSError:
            _break(writer)
            return
        both = {writer, far_writer}
        self._writers |= both
        try:
            await asyncio.gather(self._pump(reader, far_writer), self._pump(far_reader, writer))
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self._writers -= both
            for each in both:
                _break(each)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(_CHUNK):
            while data:
                await self._flowing.wait()
                if self._mode == "drip":
                    now, data = data[:_DRIP_BYTES], data[_DRIP_BYTES:]
                    await asyncio.sleep(_DRIP_EVERY_S)
                else:
                    now, data = data, b""
                writer.write(now)
                await writer.drain()
        raise ConnectionResetError  # one side is done: so is the other

    def _break_all(self) -> None:
        for writer in list(self._writers):
            _break(writer)


def _break(writer: asyncio.StreamWriter) -> None:
    connection = writer.get_extra_info("socket")
    if connection is not None and connection.fileno() >= 0:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NOT)
    transport = writer.transport
    transport.abort()
