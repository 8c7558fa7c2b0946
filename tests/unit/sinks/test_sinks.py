"""Sinks write the numbers of records, and a sink that fails is dropped without an error."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest

from offload_adam.sinks.sink import GuardedSinks, Record, numbers_of
from offload_adam.sinks.trackers import TensorBoardSink

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
    sinks = GuardedSinks()
    sinks.add(broken)
    sinks.add(fine)
    with caplog.at_level(logging.ERROR):
        for step in range(4):
            sinks.write({"step": step})
        sinks.close()
        sinks.close()
    assert (broken.num_written, broken.num_closed) == (2, 1)
    assert (fine.num_written, fine.num_closed) == (4, 1)
    assert "no space left" in caplog.text
    assert caplog.text.count("Cannot close Broken") == 2


def test_names_of_nested_numbers_are_joined() -> None:
    assert numbers_of(RECORD) == {"step": 3.0, "loss": 1.25, "skipped": 0.0, "timings_ms/step": 2.5}
    assert numbers_of({"loss": None}) == {}
    assert math.isnan(numbers_of({"loss": math.nan})["loss"])


def test_tensorboard_reads_back_what_was_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = TensorBoardSink(tmp_path)
    for step in (1, 2):
        sink.write({"step": step, "loss": step / 4})
    sink.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 0.25), (2, 0.5)]
