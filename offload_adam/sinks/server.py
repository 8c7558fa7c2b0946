"""A small web server on rank 0: `/metrics` for Prometheus, `/status` as JSON, and a live page."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from offload_adam.errors import MissingExtraError
from offload_adam.sinks.page import PAGE
from offload_adam.sinks.sink import Record, numbers_of

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

logger = logging.getLogger(__name__)

Status = Callable[[], Mapping[str, Any]]
"""Returns what `/status` shows beside the last record; called for each request."""


class StatusServer:
    """Serves the newest record.

    Owns: a listening socket and the threads that answer, until `close`.

    Args:
        port: 0 lets the system choose; `port` says which.
        host: loopback unless told otherwise. There is no authentication.
        status: further values of `/status`.

    Raises:
        MissingExtraError: prometheus_client is not installed.
        OSError: the port is taken.
    """

    def __init__(self, port: int, host: str, status: Status) -> None:
        try:
            from prometheus_client import CollectorRegistry, Gauge, generate_latest
        except ImportError as error:
            raise MissingExtraError(
                "observe.http_port needs prometheus_client: pip install 'offload-adam[watch]'"
            ) from error
        self._registry = CollectorRegistry()
        self._new_gauge: Callable[[str, str], Any] = lambda name, text: Gauge(
            name, text, registry=self._registry
        )
        self._exposition: Callable[[], bytes] = lambda: generate_latest(self._registry)
        self._gauges: dict[str, Any] = {}
        self._status = status
        self._last: Record = {}
        self._server = make_server(host, port, self._answer, _Server, _QuietHandler)
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="status server", daemon=True
        )
        self._thread.start()
        logger.info("watch this run at http://%s:%d", host, self.port)

    @property
    def port(self) -> int:
        """The port that is listened on."""
        return self._server.server_port

    def write(self, record: Record) -> None:
        """Show one record from now on."""
        for name, number in numbers_of(record).items():
            gauge = self._gauges.get(name)
            if gauge is None:
                metric = "offload_adam_" + "".join(c if c.isalnum() else "_" for c in name)
                gauge = self._gauges[name] = self._new_gauge(metric, f"{name} of the last step")
            gauge.set(number)
        self._last = record

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _answer(self, environment: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        path = environment.get("PATH_INFO", "/")
        if path == "/":
            return _reply(start, "text/html; charset=utf-8", PAGE.encode())
        if path == "/metrics":
            return _reply(start, "text/plain; version=0.0.4; charset=utf-8", self._exposition())
        if path == "/status":
            status = {"last": dict(self._last), **self._status()}
            return _reply(start, "application/json", json.dumps(status).encode())
        start("404 Not Found", [("Content-Type", "text/plain")])
        return [b"there are /, /metrics and /status\n"]


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _QuietHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: requests are not events of the run."""


def _reply(start: StartResponse, kind: str, body: bytes) -> Iterable[bytes]:
    start("200 OK", [("Content-Type", kind), ("Content-Length", str(len(body)))])
    return [body]
