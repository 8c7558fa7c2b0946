"""Sinks show what they are given; one that fails is dropped, and training never notices."""

from __future__ import annotations

import builtins
import json
import logging
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from offload_adam.errors import MissingExtraError
from offload_adam.sinks.server import StatusServer
from offload_adam.sinks.sink import GuardedSinks, Record, numbers_of
from offload_adam.sinks.tensorboard import TensorBoardSink
from offload_adam.sinks.wandb import WandbSink

RECORD = {"step": 3, "loss": 1.25, "skipped": False, "timings_ms": {"step": 2.5}, "names": ("a",)}


class Broken:
    def __init__(self, fails_from: int) -> None:
        self.num_written, self.num_closed, self._fails_from = 0, 0, fails_from

    def write(self, record: Record) -> None:
        if record["step"] >= self._fails_from:
            raise OSError("no space left")
        self.num_written += 1

    def close(self) -> None:
        self.num_closed += 1
        raise RuntimeError("cannot close")


def test_a_sink_that_fails_is_dropped_and_the_others_go_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    broken, fine = Broken(2), Broken(100)
    sinks = GuardedSinks([broken, fine])
    with caplog.at_level(logging.ERROR):
        for step in range(4):
            sinks.write({"step": step})
        sinks.close()
        sinks.close()
    assert (broken.num_written, broken.num_closed) == (2, 1)
    assert (fine.num_written, fine.num_closed) == (4, 1)
    assert "no space left" in caplog.text


def test_numbers_are_named_by_where_they_stand() -> None:
    assert numbers_of(RECORD) == {"step": 3.0, "loss": 1.25, "skipped": 0.0, "timings_ms/step": 2.5}
    assert numbers_of({"loss": None}) == {}


@pytest.fixture
def server() -> Iterator[StatusServer]:
    pytest.importorskip("prometheus_client")
    server = StatusServer(0, "127.0.0.1", lambda: {"phases": ["forward", "update"]})
    yield server
    server.close()


def fetch(server: StatusServer, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}{path}", timeout=60) as answer:
        text: bytes = answer.read()
    return text.decode()


def test_the_server_shows_the_newest_record(server: StatusServer) -> None:
    assert json.loads(fetch(server, "/status")) == {"last": {}, "phases": ["forward", "update"]}
    server.write({**RECORD, "loss": 9.0})
    server.write(RECORD)
    assert json.loads(fetch(server, "/status"))["last"]["loss"] == 1.25
    metrics = dict(
        line.split(" ")
        for line in fetch(server, "/metrics").splitlines()
        if not line.startswith("#")
    )
    assert float(metrics["offload_adam_loss"]) == 1.25
    assert float(metrics["offload_adam_timings_ms_step"]) == 2.5
    assert "offload_adam" in fetch(server, "/")
    with pytest.raises(urllib.error.HTTPError, match="404"):
        fetch(server, "/nowhere")


def test_the_server_is_on_loopback_and_says_a_taken_port(server: StatusServer) -> None:
    assert server._server.server_address[0] == "127.0.0.1"
    with pytest.raises(OSError, match="in use"):
        StatusServer(server.port, "127.0.0.1", dict)


@pytest.mark.parametrize(
    ("package", "make"),
    [
        ("prometheus_client", lambda folder: StatusServer(0, "127.0.0.1", dict)),
        ("torch.utils.tensorboard", TensorBoardSink),
        ("wandb", lambda folder: WandbSink("p", "n", folder, {})),
    ],
)
def test_a_missing_package_names_its_extra(
    package: str,
    make: Callable[[Path], object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    imported = builtins.__import__

    def refuse(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name == package:
            raise ImportError(name)
        return imported(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingExtraError, match=r"pip install 'offload-adam\[\w+\]'"):
        make(tmp_path)


def test_tensorboard_reads_back_what_was_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = TensorBoardSink(tmp_path)
    for step in (1, 2):
        sink.write({"step": step, "loss": step / 4})
    sink.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 0.25), (2, 0.5)]
