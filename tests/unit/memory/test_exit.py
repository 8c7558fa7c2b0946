"""Memory is unpinned when nothing uses it any more, also where nobody closes the optimizer."""

from __future__ import annotations

import gc
import logging
import subprocess
import sys
import threading
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch

from offload_adam import OffloadAdam
from offload_adam.memory import arena
from offload_adam.step import update_thread
from tests.support.cuda_runtime import StandInRuntime
from tests.support.devices import HOST_AS_DEVICE
from tests.support.policies import in_policies

SCRIPT = """
import os, sys, time
from dataclasses import replace
from typing import NamedTuple
import torch
from offload_adam import OffloadAdam
from offload_adam.step import update_thread
from tests.support.cuda_runtime import StandInRuntime
from tests.support.devices import HOST_AS_DEVICE
from tests.support.policies import in_policies

parent = os.getpid()

def tell(*words):
    print("parent" if os.getpid() == parent else "child", *words, flush=True)

class Told(StandInRuntime):
    def finish_copies(self):
        tell(self.name, "waits for copies, updates over:", self.num_over)
    def unregister(self, address):
        tell(self.name, "unpins, updates over:", self.num_over)
        return super().unregister(address)

def start_step(name, seconds, error=None, **options):
    runtime = Told()
    runtime.name, runtime.num_over = name, 0
    class Offloaded(OffloadAdam):
        _backend = replace(HOST_AS_DEVICE, make_runtime=lambda device: runtime)
    model = torch.nn.Sequential(
        *(torch.nn.Linear(16, 16, bias=False, dtype=torch.bfloat16) for _ in range(4)))
    optimizer = Offloaded(
        model.parameters(), module=model, overlap=True, **in_policies(bucket_nbytes=1, **options))
    tasks = optimizer._alive().tasks
    launch = tasks.launch
    def slow_launch(*arguments):
        time.sleep(seconds)
        if error is not None:
            raise error
        launch(*arguments)
        runtime.num_over += 1
    tasks.launch = slow_launch
    model(torch.ones(2, 16, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    return optimizer

"""


BODIES = {
    "two": """
kept = [start_step('one', 0.2, pin='all'), start_step('two', 0.05, pin='staging')]
tell('script ends')
""",
    "errors": """
kept = [start_step('one', 0.1), start_step('two', 0.1, error=KeyError())]
raise KeyError
""",
    "fork": """
kept = start_step('one', 0.2)
lock = kept._alive().snapshot_lock
lock.acquire_buckets([3])  # a child that waits for the reader of this snapshot never ends
child = os.fork()
if child:
    _, status = os.waitpid(child, 0)
    tell('child ended with', status)
    lock.finish_reading()
""",
    "stuck": "update_thread.CLOSE_TIMEOUT_S = 0.2\nkept = start_step('one', 3600.0)",
}


class Ended(NamedTuple):
    """A script's exit status, the distinct lines that it printed, in order, and what it logged."""

    returncode: int
    lines: list[str]
    log: str


@pytest.fixture(scope="module")
def ended() -> dict[str, Ended]:
    """Run all scripts, at once, for most of their time is that of imports."""
    running = {
        name: subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", SCRIPT + body],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, body in BODIES.items()
    }
    found = {}
    for name, process in running.items():
        try:
            out, log = process.communicate(timeout=100)
        finally:
            process.kill()
        found[name] = Ended(process.returncode, list(dict.fromkeys(out.splitlines())), log)
    return found


def unpinning(name: str, num_over: int, process: str = "parent") -> list[str]:
    return [
        f"{process} {name} waits for copies, updates over: {num_over}",
        f"{process} {name} unpins, updates over: {num_over}",
    ]


def test_at_exit_each_optimizer_unpins_after_its_last_update(ended: dict[str, Ended]) -> None:
    expected = ["parent script ends", *unpinning("two", 4), *unpinning("one", 4)]
    assert ended["two"] == Ended(0, expected, "")


def test_errors_of_the_script_and_of_an_update_change_nothing(ended: dict[str, Ended]) -> None:
    returncode, lines, log = ended["errors"]
    assert returncode == 1, log
    assert lines == [*unpinning("two", 0), *unpinning("one", 4)]


def test_a_forked_child_ends_and_leaves_the_memory_pinned(ended: dict[str, Ended]) -> None:
    assert ended["fork"] == Ended(0, ["parent child ended with 0", *unpinning("one", 4)], "")


def test_at_exit_memory_that_an_update_still_uses_stays_pinned(ended: dict[str, Ended]) -> None:
    returncode, lines, log = ended["stuck"]
    assert (returncode, lines) == (0, []), log
    assert "An update was still running when its optimizer was dropped" in log


class HeldUp:
    """An optimizer whose update waits for the test."""

    def __init__(self) -> None:
        runtime = self.runtime = StandInRuntime()
        self.may_go_on = threading.Event()

        class Offloading(OffloadAdam):
            _backend = replace(HOST_AS_DEVICE, make_runtime=lambda device: runtime)

        model = torch.nn.Linear(4, 4)
        self.optimizer: OffloadAdam | None = Offloading(
            model.parameters(), module=model, overlap=True, **in_policies(pin="all")
        )
        self.core = self.optimizer._alive()
        launch = self.core.tasks.launch

        def wait_then_launch(*arguments: Any) -> None:
            self.may_go_on.wait(60.0)
            launch(*arguments)

        self.core.tasks.launch = wait_then_launch  # type: ignore[method-assign,assignment]
        model(torch.ones(2, 4)).sum().backward()
        self.optimizer.step()
        self.pinned_nbytes = self.runtime.nbytes
        assert self.pinned_nbytes > 0


@pytest.fixture
def held_up(monkeypatch: pytest.MonkeyPatch) -> HeldUp:
    """Return a held-up optimizer; arenas that are left in this test are pinned in name only."""
    monkeypatch.setattr(arena, "_LEFT", [])
    return HeldUp()


def test_a_dropped_optimizer_waits_for_its_update(held_up: HeldUp) -> None:
    threading.Timer(0.3, held_up.may_go_on.set).start()
    calls = held_up.runtime.calls
    del held_up.core
    held_up.optimizer = None
    gc.collect()
    assert held_up.may_go_on.is_set()
    assert held_up.runtime.nbytes == 0
    assert calls[-1] == "unregister"


def test_a_dropped_optimizer_leaves_what_an_update_still_uses(
    held_up: HeldUp, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(update_thread, "CLOSE_TIMEOUT_S", 0.1)
    del held_up.core
    with caplog.at_level(logging.ERROR):
        held_up.optimizer = None
        gc.collect()
    assert held_up.runtime.nbytes == held_up.pinned_nbytes
    assert "4.00 KiB of them pinned, until the process ends" in caplog.text
    held_up.may_go_on.set()
    gc.collect()
    assert held_up.runtime.nbytes == held_up.pinned_nbytes


def test_an_interrupted_close_leaves_what_an_update_may_use(
    held_up: HeldUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt() -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(held_up.core.executor, "close", interrupt)
    held_up.may_go_on.set()
    assert held_up.optimizer is not None
    with pytest.raises(KeyboardInterrupt):
        held_up.optimizer.close()
    gc.collect()
    assert held_up.runtime.nbytes == held_up.pinned_nbytes
