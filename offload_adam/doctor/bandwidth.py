"""Measurements of this machine's speeds: host memory, an optimizer step, and the bus to a GPU."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import closing
from statistics import median

import numpy as np
import numpy.typing as npt
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
NUM_PASSES = 7
NUM_PARAMETERS = 8
STEP_NUMEL = 24_000_000
"""Elements of all parameters of the measured step, which needs 15 bytes of memory for each."""
NUM_STEPS = 9
_NUM_WARMUP = 2
COPY_NBYTES = 256 * 1024 * 1024
NUM_COPIES = 10


def counts_to_try(num_cores: int) -> list[int]:
    """Return the powers of two below `num_cores`, and `num_cores`."""
    powers = [1 << exponent for exponent in range(num_cores.bit_length())]
    return [*(power for power in powers if power < num_cores), num_cores]


def measure_bandwidth(
    thread_counts: Iterable[int], *, numel: int = STREAM_NUMEL, num_passes: int = NUM_PASSES
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
    streams = [arena.take(numel, torch.float32).numpy() for _ in range(NUM_STREAMS)]
    return {
        count: STREAM_NBYTES * numel / _pass_s(streams, count, num_passes) / 1e9
        for count in thread_counts
    }


def _pass_s(streams: list[npt.NDArray[np.float32]], num_threads: int, num_passes: int) -> float:
    """Return the median seconds of a pass, without the first, which may compile."""
    gradient, first, second, third = streams
    seconds = []
    for _ in range(1 + num_passes):
        start_s = time.perf_counter()
        pass_over(gradient, first, second, third, num_threads)
        seconds.append(time.perf_counter() - start_s)
    return median(seconds[1:])


def measure_step(num_threads: int, *, numel: int = STEP_NUMEL, num_steps: int = NUM_STEPS) -> float:
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
    optimizer = OffloadAdam(parameters, max_grad_norm=1.0, num_threads=num_threads)
    with closing(optimizer):
        seconds = [_step_s(optimizer) for _ in range(_NUM_WARMUP + num_steps)]
    specs = [ParameterSpec(i, each, 2, "bf16") for i in range(NUM_PARAMETERS)]
    nbytes = sum(map(traffic_nbytes, plan_state(specs, StatePolicy())))
    return nbytes / median(seconds[_NUM_WARMUP:]) / 1e9


def _step_s(optimizer: OffloadAdam) -> float:
    start_s = time.perf_counter()
    optimizer.step()
    return time.perf_counter() - start_s


def bus_gb_per_s(index: int) -> tuple[float, float]:
    """Return the bandwidths of H2D and D2H copies of pinned memory, in 1e9 bytes a second.

    Args:
        index: of the visible GPU.

    Raises:
        HostMemoryError: the memory cannot be allocated or pinned.
    """
    gpu = torch.device("cuda", index)
    arena = HostArena(COPY_NBYTES)
    arena.pin(CudaRuntime(gpu))
    try:
        host = arena.take(COPY_NBYTES, torch.uint8)
        device = torch.empty(COPY_NBYTES, dtype=torch.uint8, device=gpu)
        return _copy_gb_per_s(host, device), _copy_gb_per_s(device, host)
    finally:
        arena.close()


def _copy_gb_per_s(source: torch.Tensor, target: torch.Tensor) -> float:
    """Return the bandwidth of the median copy, without the first, which warms up."""
    device = target.device if target.is_cuda else source.device
    milliseconds: list[float] = []
    with torch.cuda.device(device):
        for _ in range(1 + NUM_COPIES):
            start = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            start.record()
            target.copy_(source, non_blocking=True)
            end.record()
            end.synchronize()
            milliseconds.append(start.elapsed_time(end))
    return source.nbytes / median(milliseconds[1:]) / 1e6
