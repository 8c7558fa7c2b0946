"""The cores that a run may use, how its ranks share them, and what Numba makes of them."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import numba

from offload_adam.doctor.finding import Finding, ok, warning
from offload_adam.kernels.threads import (
    allowed_cores,
    cgroup_cores,
    select_threading_layer,
    threads_per_rank,
)

_REGISTER_BITS = {"zmm": 512, "ymm": 256, "xmm": 128}


def core_findings(local_world_size: int, *, on_device: bool) -> Iterator[Finding]:
    """Yield what bounds the cores, and the threads of each local rank."""
    num_threads = threads_per_rank(local_world_size, on_device=on_device)
    yield _affinity()
    yield _quota(cgroup_cores())
    yield from thread_plan(local_world_size, _affinity_mask(), num_threads)
    yield _numba_threads(num_threads)


def _affinity_mask() -> list[int]:
    try:
        return sorted(os.sched_getaffinity(0))
    except AttributeError:  # not on every platform
        return list(range(os.cpu_count() or 1))


def _affinity() -> Finding:
    mask, present = _affinity_mask(), os.cpu_count() or 1
    return ok("affinity", f"core(s) {ranges(mask)}: {len(mask)} of {present}")


def _quota(cores: float | None) -> Finding:
    """Judge the control group's CPU quota, version 1 or 2."""
    if cores is None:
        return ok("CPU quota", "no control group limits the time of the cores")
    found = f"the control group grants the time of {cores:g} core(s)"
    if cores < 1.0:
        return warning("CPU quota", found, "grant at least one: every thread will be stopped")
    return ok("CPU quota", found)


def thread_plan(local_world_size: int, mask: Sequence[int], num_threads: int) -> Iterator[Finding]:
    """Yield the kernels' threads of each local rank, and where a rank has no core of its own."""
    crowded = local_world_size > allowed_cores()
    for rank in range(local_world_size):
        topic = f"local rank {rank}"
        found = f"{num_threads} thread(s) on core(s) {ranges(mask)}"
        if crowded:
            yield warning(
                topic, f"{found}, shared with others", "start no more ranks than there are cores"
            )
        else:
            yield ok(topic, found)


def _numba_threads(num_threads: int) -> Finding:
    """Compare what a rank is to use with what Numba has been started with."""
    most = int(numba.config.NUMBA_NUM_THREADS)
    found = f"Numba has {most} thread(s), and a rank is to use {num_threads}"
    if most < num_threads:
        return warning("Numba's threads", found, "unset NUMBA_NUM_THREADS, or set it higher")
    return ok("Numba's threads", found)


def threading_layer() -> Finding:
    """Return the layer that Numba's threads run on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # said below, with what to do
        layer = select_threading_layer()
    if layer == "workqueue":
        return warning(
            "threading layer",
            "workqueue: a second thread that runs a parallel Numba function aborts the process",
            "install an OpenMP runtime: apt-get install libgomp1",
        )
    return ok("threading layer", layer)


def vector_width() -> Finding:
    """Return the width of the vectors that Numba compiles loops to on this processor.

    It is read off the compiled code of a loop, for what the processor could do is not what the
    compiler chooses.
    """
    bits = widest_register(_compiled_loop())
    if bits is None:
        return ok("vector width", f"not known for {_architecture()}")
    if bits < 256:
        return warning(
            "vector width",
            f"{bits} bits",
            "unset NUMBA_CPU_NAME and NUMBA_CPU_FEATURES if set; or the processor has no AVX2",
        )
    return ok("vector width", f"{bits} bits")


def widest_register(assembly: str) -> int | None:
    """Return the bits of the widest x86 vector register that multiplies packed floats."""
    used = re.findall(r"\bv?mulps\b[^\n]*?%?([xyz]mm)\d", assembly)
    return max((_REGISTER_BITS[name] for name in used), default=None)


def _compiled_loop() -> str:
    def scale(values, factor):  # type: ignore[no-untyped-def]
        for i in range(values.size):
            values[i] = values[i] * factor

    signature = (numba.float32[::1], numba.float32)
    dispatcher = numba.njit(signature, error_model="numpy")(scale)
    return "\n".join(dispatcher.inspect_asm().values())


def _architecture() -> str:
    import platform

    return platform.machine()


def ranges(numbers: Iterable[int]) -> str:
    """Return ascending numbers as ranges, such as '0-3,8'."""
    ordered = list(numbers)
    starts = ordered[:1] + [high for low, high in pairwise(ordered) if high != low + 1]
    ends = [low for low, high in pairwise(ordered) if high != low + 1] + ordered[-1:]
    return ",".join(
        str(start) if start == end else f"{start}-{end}"
        for start, end in zip(starts, ends, strict=True)
    )
