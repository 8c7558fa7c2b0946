"""Measure pinning and the bus, or the update with several numbers of threads.

    python -m tests.gpu.probe bus|update REPORT.json

Without a GPU, sizes are small, and only the host is measured. The report is written after each
value. If a measurement fails, the report has the reason instead of its values.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from offload_adam import OffloadAdam
from offload_adam.bench.machine import describe_machine
from offload_adam.bench.report import write_json
from offload_adam.bench.training.model import Sizes, make_model, make_tokens
from offload_adam.kernels.threads import allowed_cores, select_threading_layer
from offload_adam.memory.arena import HostArena
from offload_adam.memory.pinning import CudaRuntime

GIB = 2**30
NUM_COPIES = 4
NUM_SMALL_COPIES = 2000
SMALL_NBYTES = 4096
BYTES_PER_ELEMENT = 28
"""Host memory traffic to update one bf16 element: gradient 2, parameter 2, state 24."""
NUM_THREADS = (4, 8, 12, 14, 15, 16)

T = TypeVar("T")
Pair = tuple[torch.Tensor, torch.Tensor]


class Report:
    """Values by name, written to a file after each value."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._start_s = time.perf_counter()
        self.values: dict[str, Any] = {}
        self.failed: list[str] = []

    def note(self, name: str, value: Any) -> None:
        self.values[name] = value
        print(f"[{time.perf_counter() - self._start_s:6.1f} s] {name}: {value}", flush=True)
        write_json(self.values, self._path)

    def attempt(self, name: str, measure: Callable[[], object]) -> None:
        """Run a measurement. If it fails, note the reason; the next measurement still runs."""
        try:
            measure()
        except Exception as error:
            self.failed.append(name)
            self.note(f"{name}_failed", f"{type(error).__name__}: {error}")


def probe_bus(report: Report) -> None:
    """Measure memory, pinning, copies and the GPU, none of which needs our kernels."""
    on_gpu = torch.cuda.is_available()
    nbytes = 8 * GIB if on_gpu else 64 * 2**20
    report.attempt("machine", lambda: note_machine(report))
    report.attempt("commit", lambda: note_commit(report, nbytes))
    if on_gpu:
        report.attempt("matmul", lambda: note_matmul(report))
        report.attempt("pinning", lambda: note_pinning(report, nbytes))


def probe_update(report: Report) -> None:
    """Measure the update with several numbers of threads."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report.attempt("update", lambda: note_update(report, device))


def note_machine(report: Report) -> None:
    """Note versions, processor and GPU."""
    select_threading_layer()
    report.note("machine", describe_machine(allowed_cores()))
    report.note("cuda", torch.version.cuda)
    for name, command in {
        "kernel": "uname -r",
        "processor": "lscpu",
        "huge_pages": "cat /sys/kernel/mm/transparent_hugepage/enabled",
        "memlock": "ulimit -l",
        "memory": "free -g",
        "cgroup": "cat /sys/fs/cgroup/cpu.max /sys/fs/cgroup/memory.max",
        "gpu": "nvidia-smi --query-gpu=name,memory.total,driver_version,pcie.link.gen.current,"
        "pcie.link.width.current,clocks.sm --format=csv,noheader",
    }.items():
        report.note(name, _output_of(command))


def _output_of(command: str) -> str:
    """Return the output of a shell command, empty if the command does not exist."""
    try:
        done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return "timed out"
    return done.stdout.strip()


def note_commit(report: Report, nbytes: int) -> None:
    """Time the commit of an arena."""
    seconds, arena = _timed(lambda: HostArena(nbytes))
    report.note("commit_s_per_gib", seconds / (nbytes / GIB))
    arena.close()


def note_pinning(report: Report, nbytes: int) -> None:
    """Time pinning, copies from and to the pinned arena, and unpinning."""
    arena = HostArena(nbytes)
    gibs = arena.nbytes / GIB
    torch.zeros(1, device="cuda")  # creates the CUDA context before the timed calls
    runtime = CudaRuntime(torch.device("cuda", 0))
    seconds, _ = _timed(lambda: arena.pin(runtime))
    report.note("pin_s_per_gib", seconds / gibs)
    source, target = (arena.allocate(GIB, torch.uint8) for _ in range(2))
    report.note("is_pinned", [source.is_pinned(), source[4096:].is_pinned()])
    first, second = (torch.empty(GIB, dtype=torch.uint8, device="cuda") for _ in range(2))
    report.note("h2d", _copy_rate((first, source)))
    report.note("d2h", _copy_rate((target, second)))
    report.note("both_ways", _copy_rate((first, source), (target, second)))
    report.note("small_d2h", _small_copies(target, second))
    pageable = torch.empty(GIB // 4, dtype=torch.uint8)
    copied_s, _ = _timed(lambda: pageable.copy_(second[: GIB // 4], non_blocking=True))
    report.note("pageable_d2h_blocks_ms", copied_s * 1e3)
    seconds, _ = _timed(arena.close)
    report.note("unpin_s_per_gib", seconds / gibs)


def _copy_rate(*pairs: Pair) -> dict[str, float]:
    """Return the bandwidth of copies (target, source), each pair on a stream of its own."""
    streams = [torch.cuda.Stream() for _ in pairs]
    nbytes = NUM_COPIES * sum(target.nbytes for target, _ in pairs)

    def issue() -> None:
        for stream, (target, source) in zip(streams, pairs, strict=True):
            with torch.cuda.stream(stream):
                for _ in range(NUM_COPIES):
                    target.copy_(source, non_blocking=True)

    _issue_and_finish(issue)  # the first round warms up
    issue_s, all_s = _issue_and_finish(issue)
    return {"gb_per_s": nbytes / all_s / 1e9, "issue_ms": issue_s * 1e3}


def _small_copies(target: torch.Tensor, source: torch.Tensor) -> dict[str, float]:
    """Return the milliseconds of many copies of 4 KiB, 64 KiB apart."""
    starts = range(0, NUM_SMALL_COPIES * 65536, 65536)
    pieces = [slice(start, start + SMALL_NBYTES) for start in starts]

    def issue() -> None:
        for piece in pieces:
            target[piece].copy_(source[piece], non_blocking=True)

    issue_s, all_s = _issue_and_finish(issue)
    return {"issue_ms": issue_s * 1e3, "all_ms": all_s * 1e3}


def _issue_and_finish(issue: Callable[[], None]) -> tuple[float, float]:
    """Return the seconds until all work is issued, and until the device has finished."""
    torch.cuda.synchronize()
    start_s = time.perf_counter()
    issue()
    issued_s = time.perf_counter()
    torch.cuda.synchronize()
    return issued_s - start_s, time.perf_counter() - start_s


def _timed(action: Callable[[], T]) -> tuple[float, T]:
    """Return the duration of a call in seconds, and its result."""
    start_s = time.perf_counter()
    result = action()
    return time.perf_counter() - start_s, result


def note_matmul(report: Report, width: int = 8192, times: int = 20) -> None:
    """Measure the speed of bf16 matrix multiplication on the GPU."""
    a, b = (torch.randn(width, width, device="cuda", dtype=torch.bfloat16) for _ in range(2))

    def multiply() -> None:
        for _ in range(times):
            a @ b

    _issue_and_finish(multiply)
    _, seconds = _issue_and_finish(multiply)
    report.note("matmul_tflops", times * 2 * width**3 / seconds / 1e12)


def note_update(report: Report, device: torch.device) -> None:
    """Time the sequential update of one optimizer with several numbers of threads."""
    sizes = Sizes(num_layers=8, width=2048, num_heads=16)
    if device.type != "cuda":
        sizes = Sizes(num_layers=1, width=64, num_heads=2, sequence_length=16)
    model = make_model(sizes, device)
    tokens = make_tokens(sizes, 2, device)
    seconds, optimizer = _timed(
        lambda: OffloadAdam(model.parameters(), lr=1e-5, module=model, overlap=False)
    )
    numel = sum(parameter.numel() for parameter in model.parameters())
    report.note("construct", {"s": seconds, "numel": numel, "pinned": optimizer.pinned_nbytes})
    host_update = optimizer._alive()._host_update
    assert host_update is not None
    for number in [n for n in NUM_THREADS if n <= allowed_cores()] or [1]:
        host_update._num_threads = number
        steps = []
        for _ in range(4):
            model(tokens).backward()
            optimizer.step()
            assert optimizer.last_step is not None
            steps.append(dict(optimizer.last_step.timings))
            optimizer.zero_grad()
        best_s = min(step["update"] for step in steps[1:])
        rate = numel * BYTES_PER_ELEMENT / best_s / 1e9
        report.note(f"update_threads_{number}", {"ms": best_s * 1e3, "gb_per_s": rate})
    optimizer.close()


PROBES = {"bus": probe_bus, "update": probe_update}


def main() -> None:
    """Run one of the probes; exit with 1 if a measurement failed."""
    name, path = sys.argv[1:]
    report = Report(Path(path))
    PROBES[name](report)
    if report.failed:
        raise SystemExit(f"FAILED: {', '.join(report.failed)}")


if __name__ == "__main__":
    main()
