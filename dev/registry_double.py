"""A double of a schema registry: Confluent's API over real HTTP, schemas in memory.

No real one can be had from the registries that this project builds from. It has what clients ask
for: register, look up by id and by version; a user with a password; and it can be told to fail.
"""

import base64
import json
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

from dev.processes import LOOPBACK

__all__ = ["RegistryDouble"]


class RegistryDouble:
    """Serves while it is entered; `asked` counts requests, `failing` answers each with 500."""

    def __init__(self, *, user: str | None = None, password: str = "") -> None:
        self.asked = 0
        self.failing = False
        self.schemas: dict[int, dict[str, Any]] = {}
        self.subjects: dict[str, list[int]] = {}
        self.login = None if user is None else base64.b64encode(f"{user}:{password}".encode())
        self._port = 0
        self._server: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        """Its address, the same after a stop and a start."""
        return f"http://{LOOPBACK}:{self._port}"

    def register(self, subject: str, schema: dict[str, Any]) -> int:
        """Keep a schema (`schema`, `schemaType`, `references`) and give its id."""
        known = [number for number, each in self.schemas.items() if each == schema]
        number = known[0] if known else 1000 + len(self.schemas)
        self.schemas[number] = schema
        versions = self.subjects.setdefault(subject, [])
        if number not in versions:
            versions.append(number)
        return number

    def start(self) -> Self:
        """Listen, in a thread of its own."""
        handler = type("Handler", (_Handler,), {"registry": self})
        self._server = ThreadingHTTPServer((LOOPBACK, self._port), handler)
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def stop(self) -> None:
        """Let go of the port."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


class _Handler(BaseHTTPRequestHandler):
    registry: RegistryDouble

    def do_GET(self) -> None:
        if self._is_refused():
            return
        match self.path.split("?")[0].strip("/").split("/"):
            case ["schemas", "ids", wanted] if int(wanted) in self.registry.schemas:
                self._answer(HTTPStatus.OK, self.registry.schemas[int(wanted)])
            case ["subjects", subject, "versions", version] if subject in self.registry.subjects:
                number = self.registry.subjects[subject][int(version) - 1]
                found = {"subject": subject, "id": number, "version": int(version)}
                self._answer(HTTPStatus.OK, {**found, **self.registry.schemas[number]})
            case _:
                self._answer(
                    HTTPStatus.NOT_FOUND, {"error_code": 40403, "message": "Schema not found"}
                )

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self._is_refused():
            return
        match self.path.split("?")[0].strip("/").split("/"):
            case ["subjects", subject, *_]:
                number = self.registry.register(subject, json.loads(body))
                version = self.registry.subjects[subject].index(number) + 1
                found = {"subject": subject, "id": number, "version": version}
                self._answer(HTTPStatus.OK, {**found, **json.loads(body)})
            case _:
                self._answer(HTTPStatus.NOT_FOUND, {"error_code": 404, "message": self.path})

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name there
        """Say nothing."""

    def _is_refused(self) -> bool:
        self.registry.asked += 1
        if self.registry.failing:
            self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, {"error_code": 50001, "message": "no"})
            return True
        login = self.registry.login
        if login is not None and self.headers.get("Authorization") != f"Basic {login.decode()}":
            self._answer(HTTPStatus.UNAUTHORIZED, {"error_code": 40101, "message": "who are you"})
            return True
        return False

    def _answer(self, status: HTTPStatus, document: dict[str, Any]) -> None:
        body = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/vnd.schemaregistry.v1+json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
