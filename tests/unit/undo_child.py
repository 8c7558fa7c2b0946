"""A process that updates shared memory and is killed or stepped through by a test.

python -m tests.unit.undo_child steps|loop CASE NUM_PIECES FILE_DESCRIPTOR NUMEL...
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from offload_adam.kernels import adam
from tests.unit.kernel_subprocess import CHECKOUT
from tests.unit.undo_cases import CASES, new_log, run, shared

PTRACE_TRACEME, PTRACE_SINGLESTEP = 0, 9


def start(
    how: str, case: str, num_pieces: int, descriptor: int, numels: Sequence[int]
) -> subprocess.Popen[bytes]:
    """Start the process and wait until its kernel is compiled."""
    numbers = map(str, (num_pieces, descriptor, *numels))
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.unit.undo_child", how, case, *numbers],
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        cwd=CHECKOUT,
        pass_fds=(descriptor,),
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


def ptrace(request: int, pid: int) -> bool:
    """Call ptrace without data; return whether it succeeded."""
    function = ctypes.CDLL(None, use_errno=True).ptrace
    function.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    function.restype = ctypes.c_long
    return bool(function(request, pid, None, None) == 0)


def main(how: str, name: str, *numbers: str) -> None:
    """Update the shared memory once, from an instruction at which the test steps; or forever."""
    num_pieces, descriptor, *numels = map(int, numbers)
    case = CASES[name]
    segments = case.segments(numels)
    before = case.state(segments)
    state, log = shared(before, num_pieces, mmap.mmap(descriptor, 0))
    run(before, segments, case, new_log(num_pieces))  # starts the threads, too
    if how == "loop":
        print("ready", flush=True)
        for launch in itertools.count(1):
            run(state, segments, case, log, launch=launch)
    update = adam._update_segments

    def stop_before(*arguments: Any) -> None:
        # Here, because every instruction from here on is a step.
        print("ready", flush=True)
        if not ptrace(PTRACE_TRACEME, 0):
            sys.exit(3)
        os.kill(os.getpid(), signal.SIGSTOP)
        update(*arguments)

    adam._update_segments = stop_before
    run(state, segments, case, log, num_threads=1)


if __name__ == "__main__":
    main(*sys.argv[1:])
