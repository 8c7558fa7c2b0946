"""The progress record that the watchdog reads."""

from __future__ import annotations

import dataclasses
import errno
import os
import subprocess
import sys
import threading
import time
from typing import Any

import psutil
import pytest

from offload_adam.coordinator import progress
from offload_adam.coordinator.progress import Process, ProgressRecord


def test_long_running_phases_of_two_threads_end_in_any_order() -> None:
    record = ProgressRecord()
    inside, leave = threading.Event(), threading.Event()

    def save() -> None:
        with record.at("checkpoint", long_running=True):
            inside.set()
            assert leave.wait(10)

    thread = threading.Thread(target=save)
    try:
        with record.at("checkpoint", long_running=True):
            thread.start()
            assert inside.wait(10)
        # This thread's phase ended first, and the other thread's is still open.
        assert record.long_running
    finally:
        leave.set()
        thread.join(10)
    assert not thread.is_alive()
    assert not record.long_running


def test_a_phase_in_a_long_running_one_is_long_running() -> None:
    record = ProgressRecord()
    with record.at("checkpoint", long_running=True):
        with record.at("write"):
            assert record.long_running
        assert record.long_running
    assert not record.long_running
    with record.at("write"):
        assert not record.long_running


def test_an_error_keeps_the_phase_and_ends_the_exemption() -> None:
    record = ProgressRecord()
    with pytest.raises(OSError, match="full"), record.at("checkpoint", long_running=True):
        raise OSError("full")
    assert record.phase == "checkpoint"
    assert not record.long_running


def test_untracked_threads_change_neither_phase_nor_exemption() -> None:
    record = ProgressRecord()
    with record.untracked():
        with record.untracked():
            pass
        with record.at("checkpoint", long_running=True):
            assert not record.long_running
            assert record.phase == "start"
    with record.at("update"):
        assert record.phase == "update"


STOPPED = """
import ctypes, os, signal, sys
if "traced" in sys.argv:
    assert ctypes.CDLL(None).ptrace(0, 0, 0, 0) == 0  # the parent becomes the debugger
os.kill(os.getpid(), signal.SIGSTOP)
"""


@pytest.mark.parametrize(
    ("traced", "change", "resumes"),
    [
        ("", {}, True),
        ("", {"born": 1}, False),  # another process that has the same id
        ("", {"machine": "another"}, False),
        ("traced", {}, False),
    ],
)
def test_only_a_stopped_process_itself_is_resumed(
    traced: str, change: dict[str, Any], resumes: bool
) -> None:
    child = subprocess.Popen([sys.executable, "-c", STOPPED, traced])
    try:
        seen = psutil.Process(child.pid)
        deadline_s = time.monotonic() + 10
        while seen.status() not in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP):
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        dataclasses.replace(Process.of(child.pid), **change).resume(Process.own())
        if resumes:
            assert child.wait(10) == 0
        else:
            time.sleep(0.2)
            assert seen.status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
    finally:
        child.kill()
        child.wait(10)


def test_a_process_that_cannot_be_identified_is_not_resumed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Such as for lack of file descriptors: another process may have its id by now."""
    process = Process.own()
    sent: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, signal: sent.append(pid))
    process.resume(process)
    assert sent == [process.pid]

    def fail(pid: int) -> tuple[str, float]:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(progress, "_state_and_start", fail)
    process.resume(process)
    assert sent == [process.pid]
