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
from offload_adam.layout.flat import BLOCK_NUMEL, ParameterSpec
from offload_adam.layout.state_plan import StatePolicy, plan_state
from offload_adam.memory.arena import HostArena, padded_nbytes
from offload_adam.memory.pinning import CudaRuntime
from offload_adam.optimizer import OffloadAdam
from offload_adam.options import StateFormat

NUM_STREAMS = 4
# Four arrays of 128 MB do not fit into the caches that cores share. Their size is not a power of
# two: elements at power-of-two distances map to the same cache sets, which doubles the time.
STREAM_NUMEL = 32_000_000
NUM_PARAMETERS = 8
STEP_NUMEL = 24_000_000
"""Elements of all parameters of the measured step. Each needs 16 bytes: 2 for the parameter, 2 for
its gradient and 12 for its state."""
COPY_NBYTES = 256 * 1024 * 1024


def counts_to_try(num_cores: int) -> list[int]:
    """Return the powers of two below `num_cores`, and `num_cores`."""
    powers = [1 << exponent for exponent in range(num_cores.bit_length())]
    return [*(power for power in powers if power < num_cores), num_cores]


def measure_bandwidth(
    thread_counts: Iterable[int], *, numel: int = STREAM_NUMEL, num_passes: int = 7
) -> dict[int, float]:
    """Return the bandwidth of host memory in 1e9 bytes a second, by number of threads.

    A pass reads four arrays and writes three of them, as an update does. The arrays are allocated
    like optimizer state and freed on return.

    Args:
        thread_counts: numbers of threads to measure with.
        numel: float32 elements of each of the four arrays.
        num_passes: passes for each number of threads, after one warmup pass; the median counts.

    Raises:
        HostMemoryError: the arrays do not fit into the available memory.
    """
    arena = HostArena(NUM_STREAMS * padded_nbytes(numel, torch.float32))
    a, b, c, d = (arena.allocate(numel, torch.float32).numpy() for _ in range(NUM_STREAMS))

    def gb_per_s(count: int) -> float:
        seconds = _median_s(partial(pass_over, a, b, c, d, count), num_passes)
        return STREAM_NBYTES * numel / seconds / 1e9

    return {count: gb_per_s(count) for count in thread_counts}


def measure_step(
    num_threads: int,
    *,
    state_format: StateFormat = "fp32",
    numel: int = STEP_NUMEL,
    num_steps: int = 9,
) -> float:
    """Return the bandwidth of an optimizer step in 1e9 bytes a second, the median over the steps.

    The measured steps of one rank with bf16 parameters on the CPU, with clipping and without
    streaming, consist of norm and update only. A plan predicts the time of a step as its memory
    traffic divided by this bandwidth. WORLD_SIZE must be 1 or unset.

    Raises:
        HostMemoryError: the state does not fit into the available memory.
    """
    parameter_numel = max(1, numel // NUM_PARAMETERS)
    parameters = [
        nn.Parameter(torch.zeros(parameter_numel, dtype=torch.bfloat16, device="cpu"))
        for _ in range(NUM_PARAMETERS)
    ]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 0.01)
    group = {"params": parameters, "state_format": state_format}
    with closing(OffloadAdam([group], max_grad_norm=1.0, num_threads=num_threads)) as optimizer:
        step_s = _median_s(optimizer.step, num_steps, num_warmup=2)
    return step_nbytes(NUM_PARAMETERS, parameter_numel, state_format) / step_s / 1e9


def step_nbytes(num_parameters: int, parameter_numel: int, state_format: StateFormat) -> int:
    """Return the memory traffic of a clipped step of bf16 parameters on the CPU."""
    specs = [
        ParameterSpec(i, parameter_numel, 2, "bf16", state_format=state_format, is_bfloat16=True)
        for i in range(num_parameters)
    ]
    return sum(traffic_nbytes(plan) for plan in plan_state(specs, StatePolicy()))


def step_nbytes_per_element(state_format: StateFormat) -> float:
    """Return the memory traffic of such a step for each element, without padding."""
    return step_nbytes(1, BLOCK_NUMEL, state_format) / BLOCK_NUMEL


def bus_gb_per_s(index: int) -> tuple[float, float]:
    """Return the bandwidths of H2D and of D2H copies of pinned memory, in 1e9 bytes a second.

    The host's clock times blocking copies of 256 MiB, and the median copy of each direction counts.
    The time includes the launch and the wait, some microseconds of the milliseconds of a copy.

    Args:
        index: index of a visible GPU.

    Raises:
        HostMemoryError: the memory cannot be allocated or pinned.
    """
    gpu = torch.device("cuda", index)
    with closing(HostArena(COPY_NBYTES)) as arena:
        arena.pin(CudaRuntime(gpu))
        host = arena.allocate(COPY_NBYTES, torch.uint8)
        device = torch.empty(COPY_NBYTES, dtype=torch.uint8, device=gpu)
        # Without `non_blocking`, `copy_` calls cudaMemcpyAsync and then cudaStreamSynchronize, also
        # for pinned memory and in both directions. Nothing else is on this stream, so the host's
        # clock suffices.
        h2d_s = _median_s(partial(device.copy_, host))
        d2h_s = _median_s(partial(host.copy_, device))
    return COPY_NBYTES / h2d_s / 1e9, COPY_NBYTES / d2h_s / 1e9


def _median_s(call: Callable[[], object], num_calls: int = 10, num_warmup: int = 1) -> float:
    """Return the median seconds of a call, without the first `num_warmup`, which may compile."""
    seconds = []
    for _ in range(num_warmup + num_calls):
        start_s = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start_s)
    return median(seconds[num_warmup:])
