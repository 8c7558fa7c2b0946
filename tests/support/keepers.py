"""Keepers that tests start."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from shutil import rmtree

from offload_adam.kept.keeper_client import RunningKeeper, running_keepers

_WAIT_S = 10.0


def keeper_in(folder: Path) -> RunningKeeper | None:
    """Return the keeper of a folder, None if there is none."""
    found = [keeper for keeper in running_keepers() if keeper.folder == folder]
    assert len(found) <= 1
    return found[0] if found else None


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for up to 10 seconds."""
    deadline_s = time.monotonic() + _WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s, "the condition is still false"
        time.sleep(0.02)


def kill_keeper(folder: Path) -> None:
    """Kill the keeper of a folder, and wait until it has ended."""
    keeper = keeper_in(folder)
    assert keeper is not None
    os.kill(keeper.pid, signal.SIGKILL)
    wait_until(lambda: keeper_in(folder) is None)


@contextmanager
def keeper_folder() -> Iterator[Path]:
    """Provide a folder, and end its keepers at the end."""
    folder = Path(tempfile.mkdtemp(prefix="offload_adam-test-"))
    try:
        yield folder / "kept"
    finally:
        for keeper in running_keepers():
            if folder in keeper.folder.parents:
                with suppress(ProcessLookupError):
                    os.kill(keeper.pid, signal.SIGKILL)
        rmtree(folder)
