"""Measurements of this machine's speeds: host memory, an optimizer step, and the bus to a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import closing
from functools import partial
from statistics import median

import torch
from torch import nn

from offload_adam.kernels.probe import STREAM_NBYTES, pass_over
from offload_adam.layout.budget import traffic_nbytes
from offload_adam.layout.flat import ParameterSpec
from offload_adam.layout.state_plan import StatePolicy, plan_state
from offload_adam.memory.arena import HostArena, padded_nbytes
from offload_adam.memory.pinning import CudaRuntime
from offload_adam.optimizer import OffloadAdam

NUM_STREAMS = 4
# Four arrays of 128 MB do not fit into the caches that cores share. Their size is not a power of
# two: arrays that far apart compete for the same cache lines and take twice the time.
STREAM_NUMEL = 32_000_000
NUM_PARAMETERS = 8
STEP_NUMEL = 24_000_000
"""Elements of all parameters of the measured step, which needs 15 bytes of memory for each."""
COPY_NBYTES = 256 * 1024 * 1024


def counts_to_try(num_cores: int) -> list[int]:
    """Return the powers of two below `num_cores`, and `num_cores`."""
    powers = [1 << exponent for exponent in range(num_cores.bit_length())]
    return [*(power for power in powers if power < num_cores), num_cores]


def measure_bandwidth(
    thread_counts: Iterable[int], *, numel: int = STREAM_NUMEL, num_passes: int = 7
) -> dict[int, float]:
    """Return the bandwidth of host memory in 1e9 bytes a second, by number of threads.

    The arrays are allocated as optimizer state is, and read and written as an update does it. The
    median pass counts. The arrays are freed on return.

    Args:
        numel: float32 elements of each of the four arrays.

    Raises:
        HostMemoryError: the arrays do not fit into the available memory.
    """
    arena = HostArena(NUM_STREAMS * padded_nbytes(numel, torch.float32))
    a, b, c, d = (arena.allocate(numel, torch.float32).numpy() for _ in range(NUM_STREAMS))

    def gb_per_s(count: int) -> float:
        seconds = _median_s(partial(pass_over, a, b, c, d, count), num_passes)
        return STREAM_NBYTES * numel / seconds / 1e9

    return {count: gb_per_s(count) for count in thread_counts}


def measure_step(num_threads: int, *, numel: int = STEP_NUMEL, num_steps: int = 9) -> float:
    """Return the bandwidth of an optimizer step in 1e9 bytes a second, the median over the steps.

    One rank steps bf16 parameters on the CPU with clipping and without streaming: norm and update.
    A plan predicts the time of a step as its traffic over this bandwidth. WORLD_SIZE must be 1 or
    unset.

    Raises:
        HostMemoryError: the state does not fit into the available memory.
    """
    each = max(1, numel // NUM_PARAMETERS)
    parameters = [
        nn.Parameter(torch.zeros(each, dtype=torch.bfloat16, device="cpu"))
        for _ in range(NUM_PARAMETERS)
    ]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 0.01)
    with closing(OffloadAdam(parameters, max_grad_norm=1.0, num_threads=num_threads)) as optimizer:
        step_s = _median_s(optimizer.step, num_steps, num_warmup=2)
    specs = [ParameterSpec(i, each, 2, "bf16") for i in range(NUM_PARAMETERS)]
    return sum(map(traffic_nbytes, plan_state(specs, StatePolicy()))) / step_s / 1e9


def bus_gb_per_s(index: int) -> tuple[float, float]:
    """Return the bandwidths of H2D and D2H copies of pinned memory, in 1e9 bytes a second.

    Args:
        index: of the visible GPU.

    Raises:
        HostMemoryError: the memory cannot be allocated or pinned.
    """
    gpu = torch.device("cuda", index)
    with closing(HostArena(COPY_NBYTES)) as arena:
        arena.pin(CudaRuntime(gpu))
        host = arena.allocate(COPY_NBYTES, torch.uint8)
        device = torch.empty(COPY_NBYTES, dtype=torch.uint8, device=gpu)
        # A copy that is not `non_blocking` returns when it is over.
        h2d_s, d2h_s = (
            _median_s(partial(device.copy_, host)),
            _median_s(partial(host.copy_, device)),
        )
    return COPY_NBYTES / h2d_s / 1e9, COPY_NBYTES / d2h_s / 1e9


def _median_s(call: Callable[[], object], num_calls: int = 10, num_warmup: int = 1) -> float:
    """Return the median seconds of a call. The first calls, which may compile, do not count."""
    seconds = []
    for _ in range(num_warmup + num_calls):
        start_s = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start_s)
    return median(seconds[num_warmup:])
