"""The speed of the update kernel without memory traffic: its data stays in a core's cache."""

from __future__ import annotations

import time
from functools import partial
from statistics import median

import numpy as np

from offload_adam.bench.peers import ADAMW
from offload_adam.kernels import adam, threads
from offload_adam.kernels.formats import FloatFormat
from offload_adam.kernels.scalars import scalar_row
from offload_adam.options import StateFormat

_NUMEL = 8 * 1024
"""Elements of each tensor. All together they have at most 128 KiB, which fits into the L2 cache."""
_NUM_SEGMENTS = 512
"""Segments of one launch, all of the same elements: the launch itself then takes no time."""
_NUM_ROUNDS = 9


def updates_per_s(state_format: StateFormat) -> float:
    """Return how many elements of a bf16 parameter one core updates per second.

    This is the highest speed of the kernel with one thread, for any memory bandwidth.
    """
    is_split = state_format == "bf16"
    moment_format = FloatFormat.BFLOAT16 if is_split else FloatFormat.FLOAT32
    param_format = None if is_split else FloatFormat.BFLOAT16
    adam.compile_kernel(
        FloatFormat.BFLOAT16, param_format, False, moment_format, split_master=is_split
    )
    one = np.array([0x3F80], dtype=np.uint16)  # 1.0 in bfloat16
    gradient = np.tile(one, _NUMEL)
    master = np.tile(one, _NUMEL) if is_split else np.ones(_NUMEL, dtype=np.float32)
    moments = np.zeros((2, _NUMEL), dtype=moment_format.bits_dtype)
    place = (1, 0, _NUMEL, _NUMEL, 0)  # key, first, run, pitch, local_start
    places = np.tile(np.array([place], dtype=np.int64), (_NUM_SEGMENTS, 1))
    update = partial(
        adam.update,
        gradient_format=FloatFormat.BFLOAT16,
        addresses=np.full(_NUM_SEGMENTS, gradient.ctypes.data, dtype=np.int64),
        starts=np.zeros(_NUM_SEGMENTS, dtype=np.int64),
        work_starts=np.arange(_NUM_SEGMENTS + 1, dtype=np.int64) * _NUMEL,
        rows=np.zeros(_NUM_SEGMENTS, dtype=np.int64),
        scalars=scalar_row(ADAMW, 1, 1.0)[None],
        master=master,
        remainder=np.zeros(_NUMEL, dtype=np.int16) if is_split else None,
        exp_avg=moments[0],
        exp_avg_sq=moments[1],
        max_exp_avg_sq=None,
        param_out=None if is_split else np.zeros(_NUMEL, dtype=np.uint16),
        places=places if is_split else None,
        num_pieces=1,
    )
    threads.use_threads(1)
    times_s = []
    for _ in range(_NUM_ROUNDS):
        start_s = time.perf_counter()
        update()
        times_s.append(time.perf_counter() - start_s)
    return _NUM_SEGMENTS * _NUMEL / median(times_s)
