"""The answers of the HTTP server, the requests that it rejects, and its limits for slow clients."""

from __future__ import annotations

import http.client
import json
import logging
import os
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from typing import Any

import psutil
import pytest

from offload_adam.sinks import server as server_module
from offload_adam.sinks.server import StatusServer

pytest.importorskip("prometheus_client")
pytest.importorskip("waitress")


def ask(
    server: StatusServer, path: str, *, method: str = "GET", host: str | None = None
) -> tuple[int, dict[str, str], str]:
    """Return status, headers and body."""
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)) as connection:
        headers = {} if host is None else {"Host": host}
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), response.read().decode()


def strict_json(text: str) -> Any:
    def reject(name: str) -> float:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=reject)


class NoMetrics:
    def collect(self) -> list[Any]:
        return []


@pytest.fixture
def open_server() -> Iterator[Callable[..., StatusServer]]:
    """Opens servers that are closed after the test."""
    opened: list[StatusServer] = []

    def open_one(
        host: str = "127.0.0.1",
        status: Callable[[], Any] = dict,
        health: Callable[[], str | None] = lambda: None,
    ) -> StatusServer:
        opened.append(StatusServer(0, host, status, health, NoMetrics()))
        return opened[-1]

    yield open_one
    for server in opened:
        server.close()


@pytest.fixture
def server(open_server: Callable[..., StatusServer]) -> StatusServer:
    return open_server()


def test_the_status_is_the_last_record_and_further_values(
    open_server: Callable[..., StatusServer],
) -> None:
    server = open_server(status=lambda: {"run": "mine"})
    assert strict_json(ask(server, "/status")[2]) == {"last": {}, "run": "mine"}
    server.write({"step": 1, "loss": 9.0})
    server.write({"step": 2, "loss": 1.25})
    assert strict_json(ask(server, "/status")[2])["last"] == {"step": 2, "loss": 1.25}


def test_the_status_is_valid_json_whatever_the_values(
    open_server: Callable[..., StatusServer],
) -> None:
    nan, inf = float("nan"), float("inf")
    server = open_server(status=lambda: {"ranks": [{"still_s": nan}], "deep": {"x": (inf, 1)}})
    server.write({"step": 7, "loss": nan, "timings_ms": {"a": -inf}, "skipped": True, "o": object})
    status, headers, text = ask(server, "/status")
    assert (status, headers["Content-Type"]) == (200, "application/json")
    assert strict_json(text) == {
        "last": {
            "step": 7,
            "loss": None,
            "timings_ms": {"a": None},
            "skipped": True,
            "o": str(object),
        },
        "ranks": [{"still_s": None}],
        "deep": {"x": [None, 1]},
    }


def test_health_is_a_status_code_with_the_reason(open_server: Callable[..., StatusServer]) -> None:
    problem: list[str | None] = [None]
    server = open_server(health=lambda: problem[0])
    assert ask(server, "/healthz")[0::2] == (200, '{"healthy":true}')
    problem[0] = "rank 1 is dead"
    status, _, text = ask(server, "/healthz")
    assert (status, strict_json(text)) == (503, {"healthy": False, "reason": "rank 1 is dead"})


def test_the_index_lists_the_addresses_and_other_paths_get_it_with_404(
    server: StatusServer,
) -> None:
    status, headers, text = ask(server, "/")
    assert (status, headers["Content-Type"]) == (200, "text/plain; charset=utf-8")
    for path in ("/metrics", "/status", "/healthz"):
        assert path in text
        assert ask(server, path)[0] == 200
    assert ask(server, "/nowhere")[0::2] == (404, text)


@pytest.mark.parametrize("path", ["/", "/metrics", "/status", "/healthz", "/nowhere"])
def test_only_get_and_head_are_allowed(server: StatusServer, path: str) -> None:
    status, headers, text = ask(server, path)
    head_status, head_headers, body = ask(server, path, method="HEAD")
    assert (head_status, body) == (status, "")
    assert head_headers["Content-Length"] == str(len(text)) == headers["Content-Length"]
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        status, headers, _ = ask(server, path, method=method)
        assert (status, headers["Allow"]) == (405, "GET, HEAD")
    request = f"HEAD {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    # http.client ignores what follows the headers.
    assert raw(server, request.encode()).partition(b"\r\n\r\n")[1:] == (b"\r\n\r\n", b"")


LOOPBACK = ["localhost", "LOCALHOST:8080", "localhost.", "127.0.0.1:1", "127.1.2.3", "[::1]:80"]
FOREIGN = [
    *["evil.com", "127.0.0.1.evil.com", "localhost.evil.com:80", "a@localhost", "::1", "", "."],
    *["localhost@evil.com", "localhost:80@evil.com", "localhost evil.com"],
]


def test_on_loopback_only_loopback_hosts_are_accepted(server: StatusServer) -> None:
    assert {host: ask(server, "/status", host=host)[0] for host in LOOPBACK} == dict.fromkeys(
        LOOPBACK, 200
    )
    rejected = [*FOREIGN, "10.0.0.1", "[2001:db8::1]", socket.gethostname()]
    for host in rejected:
        status, _, text = ask(server, "/status", host=host)
        assert (host, status) == (host, 403)
        assert "Host header" in text


def test_elsewhere_names_of_this_machine_and_any_address_are_accepted(
    open_server: Callable[..., StatusServer],
) -> None:
    server = open_server(host="0.0.0.0")
    for host in [*LOOPBACK, "0.0.0.0", "10.0.0.1:80", "[2001:db8::1]", socket.gethostname()]:
        assert (host, ask(server, "/", host=host)[0]) == (host, 200)
    for host in FOREIGN:
        assert (host, ask(server, "/", host=host)[0]) == (host, 403)
    # A name of 0.0.0.0, which is neither an address nor a name of this machine.
    assert ask(server, "/", host="0")[0] == 403
    assert ask(open_server(host="0"), "/", host="0")[0] == 200


def test_a_request_without_a_host_is_rejected(server: StatusServer) -> None:
    assert raw(server, b"GET /status HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.0 403 ")


def test_large_requests_are_rejected(server: StatusServer) -> None:
    filler = b"X: " + b"y" * 20_000 + b"\r\n"
    assert b" 431 " in raw(server, b"GET / HTTP/1.1\r\nHost: localhost\r\n" + filler + b"\r\n")
    head = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n"
    assert b" 413 " in raw(server, head)


def raw(server: StatusServer, request: bytes) -> bytes:
    """Send bytes and return the answer, until the server closes the connection."""
    answer = b""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as client:
        client.sendall(request)
        with suppress(ConnectionResetError):  # if the server has not read the whole request
            while received := client.recv(10_000):
                answer += received
    return answer


def test_a_failing_callback_is_an_error_of_its_request_alone(
    open_server: Callable[..., StatusServer], caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> dict[str, Any]:
        raise RuntimeError("no status today")

    server = open_server(status=fail)
    with caplog.at_level(logging.ERROR):
        assert ask(server, "/status")[0] == 500
    assert "no status today" in caplog.text
    assert ask(server, "/healthz")[0] == 200


def test_a_port_that_is_taken_is_an_error(server: StatusServer) -> None:
    with pytest.raises(OSError, match="in use"):
        StatusServer(server.port, "127.0.0.1", dict)


@pytest.mark.parametrize("set_back_s", [0, 10_000])
def test_a_client_that_sends_byte_by_byte_is_dropped(
    open_server: Callable[..., StatusServer], monkeypatch: pytest.MonkeyPatch, set_back_s: int
) -> None:
    """Also if the machine's clock is set back meanwhile."""
    monkeypatch.setattr(server_module, "CONNECTION_S", 1.0)
    server = open_server()
    began_s = time.monotonic()
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as client:
        client.settimeout(0.05)
        ended = False
        client.sendall(b"GET /status HTTP/1.1\r\nX: ")
        while not server._server.active_channels:
            assert time.monotonic() - began_s < 15, "the connection is not accepted"
            time.sleep(0.01)
        clock = time.time
        monkeypatch.setattr(time, "time", lambda: clock() - set_back_s)
        while not ended:
            assert time.monotonic() - began_s < 15, "the connection is still open"
            try:
                client.sendall(b"x")
                ended = client.recv(1) == b""
            except TimeoutError:
                continue
            except OSError:  # reset, as the last byte was never read
                ended = True
    assert time.monotonic() - began_s > 0.9
    assert ask(server, "/healthz")[0] == 200


def test_a_client_with_a_long_queue_of_requests_is_dropped(
    open_server: Callable[..., StatusServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "CONNECTION_S", 1.0)

    def slow_status() -> dict[str, Any]:
        time.sleep(0.2)
        return {}

    server = open_server(status=slow_status)
    began_s = time.monotonic()
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as client:
        client.sendall(b"GET /status HTTP/1.1\r\nHost: localhost\r\n\r\n" * 200)
        while True:
            assert time.monotonic() - began_s < 15, "the connection is still open"
            try:
                if client.recv(10_000) == b"":
                    break
            except ConnectionResetError:
                break
    assert time.monotonic() - began_s > 0.9
    assert ask(server, "/healthz")[0] == 200


def test_clients_that_read_no_answer_are_dropped(
    open_server: Callable[..., StatusServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "CONNECTION_S", 1.0)
    server = open_server(status=lambda: {"long": "x" * 1_000_000})
    with ExitStack() as opened:
        for _ in range(3):  # more than there are threads that answer
            client = opened.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", server.port))
            client.sendall(b"GET /status HTTP/1.1\r\nHost: localhost\r\n\r\n" * 100)
        for connections in (3, 0):  # accepted, then dropped
            deadline_s = time.monotonic() + 15
            while len(server._server.active_channels) != connections:
                assert time.monotonic() < deadline_s
                time.sleep(0.01)
        assert ask(server, "/healthz")[0] == 200


def test_a_single_request_is_answered_however_old_its_connection_is(
    open_server: Callable[..., StatusServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "_POLL_S", 0.05)

    def slow_status() -> dict[str, Any]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(server_module, "CONNECTION_S", 0.0)
            time.sleep(1.0)
        return {"slow": True}

    server = open_server(status=slow_status)
    assert strict_json(ask(server, "/status")[2]) == {"last": {}, "slow": True}


def test_descriptors_above_1023_are_served(open_server: Callable[..., StatusServer]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2048:
        pytest.skip("the limit of open files is too low")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    with ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        while stack.enter_context(open(os.devnull, "rb")).fileno() < 1024:
            pass
        server = open_server()
        assert ask(server, "/healthz")[0] == 200
        server.close()


@pytest.mark.parametrize("version", ["abc", "1.0.0.x", ""])
def test_an_unknown_version_of_openmetrics_is_answered(
    server: StatusServer, caplog: pytest.LogCaptureFixture, version: str
) -> None:
    accept = f"Accept: application/openmetrics-text; version={version}\r\n".encode()
    request = (
        b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n" + accept + b"\r\n"
    )
    assert raw(server, request).startswith(b"HTTP/1.1 200 ")
    assert not caplog.records


def test_idle_connections_are_bounded_and_make_room(
    open_server: Callable[..., StatusServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "CONNECTION_S", 2.0)
    monkeypatch.setattr(server_module, "MOST_CONNECTIONS", 8)
    server = open_server()
    clients = [
        socket.create_connection(("127.0.0.1", server.port), timeout=20)
        for _ in range(9)  # one more waits in the kernel's queue
    ]
    try:
        most, began_s = 0, time.monotonic()
        while most < 8 or time.monotonic() - began_s < 1.0:
            assert time.monotonic() - began_s < 15
            most = max(most, len(server._server.active_channels))
            time.sleep(0.01)
        assert most == 8
        assert ask(server, "/healthz")[0] == 200  # waits until the idle ones are dropped
        assert time.monotonic() - began_s < 15
    finally:
        for client in clients:
            client.close()


def test_close_is_prompt_and_leaves_no_thread_and_no_socket(
    open_server: Callable[..., StatusServer],
) -> None:
    threads, descriptors = threading.enumerate(), psutil.Process().num_fds()
    server = open_server()
    assert ask(server, "/")[0] == 200
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as client:
        client.sendall(b"GET / HT")
        began_s = time.monotonic()
        server.close()
        server.close()
        assert time.monotonic() - began_s < 5
    with pytest.raises(ConnectionRefusedError):
        ask(server, "/")
    while set(threading.enumerate()) - set(threads):
        assert time.monotonic() - began_s < 10, threading.enumerate()
        time.sleep(0.01)
    assert psutil.Process().num_fds() == descriptors


def test_close_wakes_the_thread_before_it_may_end(
    server: StatusServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    pull = server._server.pull_trigger
    alive: list[bool] = []

    def pull_late() -> None:
        server._thread.join(2 * server_module._POLL_S)  # time to end, if it were told to
        alive.append(server._thread.is_alive())
        pull()

    monkeypatch.setattr(server._server, "pull_trigger", pull_late)
    server.close()
    assert alive == [True]
    assert not server._thread.is_alive()
