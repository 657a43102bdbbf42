"""`/metrics`, `/healthz` and `/readyz`, from a thread of their own."""

from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from llm4es.errors import ConfigError

__all__ = ["serve_health"]


def serve_health(
    port: int,
    registry: CollectorRegistry,
    *,
    healthy: Callable[[], bool],
    ready: Callable[[], bool],
) -> ThreadingHTTPServer:
    """Answer on every interface until the server is shut down.

    `/healthz` answers 503 where the loop hangs, so that an orchestrator starts the process anew;
    `/readyz` where it has no partitions yet, or waits for a store or the log. Raises ConfigError
    where the port cannot be had.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/metrics":
                self._answer(HTTPStatus.OK, generate_latest(registry), CONTENT_TYPE_LATEST)
            elif self.path in {"/healthz", "/readyz"}:
                good = healthy() if self.path == "/healthz" else ready()
                status = HTTPStatus.OK if good else HTTPStatus.SERVICE_UNAVAILABLE
                self._answer(status, b"ok\n" if good else b"not now\n", "text/plain")
            else:
                self._answer(HTTPStatus.NOT_FOUND, b"/metrics, /healthz, /readyz\n", "text/plain")

        def log_message(self, *_: object) -> None:
            """Say nothing: a scrape every few seconds is no news."""

        def _answer(self, status: HTTPStatus, body: bytes, kind: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    try:
        server = ThreadingHTTPServer(("", port), Handler)
    except OSError as error:
        raise ConfigError(
            "metrics_port", f"port {port} cannot be had ({error.strerror})", "name a free one"
        ) from error
    server.daemon_threads = True
    Thread(target=server.serve_forever, name="health", daemon=True).start()
    return server
