"""How much of the memory's bandwidth the optimizer's own step gets on this machine."""

from __future__ import annotations

import os
import time
from contextlib import closing
from statistics import median

import torch
from torch import nn

from offload_adam.layout.budget import traffic_nbytes
from offload_adam.layout.flat import ParameterSpec
from offload_adam.layout.state_plan import StatePolicy, plan_state
from offload_adam.optimizer import OffloadAdam

NUM_PARAMETERS = 8
STEP_NUMEL = 24_000_000
"""Elements of all parameters: 15 times as many bytes of host memory."""
NUM_STEPS = 9
_NUM_WARMUP = 2


def can_step() -> bool:
    """Whether an optimizer of one rank can be made here: not among torchrun's ranks."""
    return int(os.environ.get("WORLD_SIZE", "1")) == 1


def measure_step(num_threads: int, *, numel: int = STEP_NUMEL, num_steps: int = NUM_STEPS) -> float:
    """Return the bandwidth of a whole step in 1e9 bytes a second, the median over some steps.

    bf16 parameters on the CPU, drop-in, clipped: the norm and the update of one rank. A plan's time
    of a step is its traffic over this.

    Raises:
        HostMemoryError: the state does not fit.
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
    return _traffic_nbytes(each) / median(seconds[_NUM_WARMUP:]) / 1e9


def _step_s(optimizer: OffloadAdam) -> float:
    start_s = time.perf_counter()
    optimizer.step()
    return time.perf_counter() - start_s


def _traffic_nbytes(each: int) -> int:
    specs = [ParameterSpec(i, each, 2, "bf16") for i in range(NUM_PARAMETERS)]
    return sum(map(traffic_nbytes, plan_state(specs, StatePolicy())))
