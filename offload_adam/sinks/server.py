"""The HTTP server on rank 0: `/metrics`, `/status` and `/healthz`, read-only.

Come here to add an address, or to change how the server protects itself from its clients.
`train/observation.py` supplies the values.
"""

from __future__ import annotations

import ipaddress
import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from offload_adam.sinks.sink import Record, to_json

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment
    from prometheus_client.registry import Collector

logger = logging.getLogger(__name__)

CONNECTION_S = 10.0
"""A connection is closed at this age, idle or not. Every answer takes less than two seconds."""
MOST_CONNECTIONS = 32
"""Further connections wait in the kernel's queue."""
_POLL_S = 0.5  # seconds between two checks of the connections' age; may delay `close` as long
# Longest wait of `close` in seconds: half for answers in progress, each below two seconds, and half
# to close the connections. A thread that takes longer is a daemon, and ends with the process.
_JOIN_S = 5.0
_HOST_HEADER = re.compile(r"(?:\[(?P<address>[0-9a-f:.]+)\]|(?P<name>[a-z0-9._-]+))(?::\d+)?")
_TEXT, _JSON = "text/plain; charset=utf-8", "application/json"
_NOT_THIS_HOST = (
    "The Host header does not name this machine. Use the machine's IP address in place of the "
    "name, or localhost if the server listens on loopback.\n"
)
_INDEX = """offload_adam
/metrics  for Prometheus
/status   the last step, every rank and rank 0's memory, as JSON
/healthz  200 while the run makes progress, otherwise 503 with the reason
"""


class StatusServer:
    """Serves the state of a run over HTTP, without authentication.

    Only GET and HEAD are allowed. The Host header must name this machine (see `_is_own_host`), so
    that a web page in a user's browser cannot read the answers through DNS rebinding.

    Args:
        port: 0 lets the system choose one, which the attribute `port` has.
        host: the address or name to bind.
        status: returns further values of `/status`, in addition to the last record. NaN and
            infinities become null.
        health: returns the reason why the run makes no progress, None while it does.
        collector: yields the metric families of `/metrics`.

    Owns: a listening socket, a thread for all connections and two that answer, until `close`.
    Threads: `status`, `health` and `collector` are called on the threads that answer.

    Raises:
        OSError: the port is taken, or `host` is no name or address of this machine.
        UnicodeError: `host` cannot be a name, since a part between two dots is empty or too long.
    """

    def __init__(
        self,
        port: int,
        host: str,
        status: Callable[[], Mapping[str, Any]],
        health: Callable[[], str | None] = lambda: None,
        collector: Collector | None = None,
    ) -> None:
        from prometheus_client import CollectorRegistry
        from prometheus_client.exposition import choose_encoder
        from waitress.server import create_server

        self._registry = CollectorRegistry()
        if collector is not None:
            self._registry.register(collector)
        self._choose_encoder = choose_encoder
        self._status = status
        self._health = health
        self._last: Record = {}
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family)
        address, self.port = listener.getsockname()[:2]
        self._on_loopback = ipaddress.ip_address(address).is_loopback
        self._names = {"localhost"}
        if not self._on_loopback:
            # Resolved once, since DNS may take seconds to answer.
            self._names |= {host.lower(), socket.gethostname().lower(), socket.getfqdn().lower()}
        # Waitress warns whenever a request waits for a thread, which is no event of the run.
        logging.getLogger("waitress").setLevel(logging.ERROR)
        self._channels: dict[int, Any] = {}
        self._server = create_server(
            self._answer,
            map=self._channels,
            sockets=[listener],
            threads=2,
            backlog=MOST_CONNECTIONS,
            # The listener and the pipe that wakes the thread count as well.
            connection_limit=MOST_CONNECTIONS + 2,
            max_request_header_size=16 * 1024,
            max_request_body_size=1024,
            log_socket_errors=False,
            ident=None,
        )
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="status server", daemon=True)
        self._thread.start()
        shown = f"[{host}]" if ":" in host else host
        logger.info("Serving metrics of this run at http://%s:%d", shown, self.port)

    def write(self, record: Record) -> None:
        """Show this record in `/status`."""
        self._last = record

    def close(self) -> None:
        """Close all connections and end the threads, within 5 s. Idempotent."""
        if not self._closing.is_set():
            # Wake the thread before the flag is set: after that, the thread may close the trigger's
            # descriptor at any time, and another file of this process may get the same number.
            self._server.pull_trigger()
            self._closing.set()
        self._thread.join(_JOIN_S)

    def _run(self) -> None:
        from waitress import wasyncore

        opened_s: dict[Any, float] = {}  # waitress counts age by the wall clock, which may be set
        while not self._closing.is_set():
            # poll(2), not select(2): a training process may have file descriptors above 1023.
            wasyncore.loop(timeout=_POLL_S, use_poll=True, map=self._channels, count=1)
            # Waitress drops only idle connections. A client that sends its request byte by byte, or
            # thousands of requests at once, would keep its connection without limit. A single
            # request is answered first. Setting `will_close` is not enough: it takes effect once
            # the socket is writable, so a client that reads no answer would block its thread.
            now_s = time.monotonic()
            channels = list(self._server.active_channels.values())
            opened_s = {channel: opened_s.get(channel, now_s) for channel in channels}
            for channel, since_s in opened_s.items():
                if now_s - since_s > CONNECTION_S and len(channel.requests) != 1:
                    channel.handle_close()
        self._server.task_dispatcher.shutdown(timeout=_JOIN_S / 2)
        wasyncore.close_all(self._channels, ignore_all=True)

    def _answer(self, environment: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        method = environment["REQUEST_METHOD"]
        if not self._is_own_host(environment.get("HTTP_HOST", "")):
            status, content_type, text = "403 Forbidden", _TEXT, _NOT_THIS_HOST
        elif method not in ("GET", "HEAD"):
            status, content_type, text = "405 Method Not Allowed", _TEXT, "Use GET or HEAD.\n"
        else:
            accept = environment.get("HTTP_ACCEPT", "")
            status, content_type, text = self._page(environment["PATH_INFO"], accept)
        body = text.encode()
        headers = [
            ("Content-Type", content_type),
            ("Content-Length", str(len(body))),
            ("Cache-Control", "no-store"),
            ("Allow", "GET, HEAD"),
        ]
        start(status, headers)
        return [] if method == "HEAD" else [body]

    def _page(self, path: str, accept: str) -> tuple[str, str, str]:
        """Return the HTTP status, content type and text of a path."""
        if path == "/":
            return "200 OK", _TEXT, _INDEX
        if path == "/metrics":
            try:
                encode, content_type = self._choose_encoder(accept)
            except TypeError:  # prometheus_client compares a version such as "abc" to numbers
                encode, content_type = self._choose_encoder("")
            return "200 OK", content_type, encode(self._registry).decode()
        if path == "/status":
            return "200 OK", _JSON, to_json({"last": self._last, **self._status()})
        if path == "/healthz":
            problem = self._health()
            if problem is None:
                return "200 OK", _JSON, to_json({"healthy": True})
            body = to_json({"healthy": False, "reason": problem})
            return "503 Service Unavailable", _JSON, body
        return "404 Not Found", _TEXT, _INDEX

    def _is_own_host(self, header: str) -> bool:
        """Return whether a Host header names this machine.

        Bound to loopback: localhost and loopback addresses. Bound elsewhere: these, the bound host,
        this machine's names, and every IP address, since it may be that of a port mapping.
        Rebinding needs a DNS name that the attacker controls, so an address is safe.
        """
        match = _HOST_HEADER.fullmatch(header.lower())
        if match is None:
            return False
        name = (match["address"] or match["name"]).rstrip(".")
        try:
            return ipaddress.ip_address(name).is_loopback or not self._on_loopback
        except ValueError:
            return name in self._names
