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
from offload_adam.layout.flat import BLOCK_NUMEL
from offload_adam.options import CODED_FORMATS, StateFormat

_NUMEL = 8 * 1024
"""Elements of each tensor. All together they have at most 128 KiB, which fits into the L2 cache."""
_NUM_SEGMENTS = 512
"""Segments of one launch, all of the same elements: the launch itself then takes no time."""
_NUM_ROUNDS = 9


def updates_per_s(state_format: StateFormat) -> float:
    """Return how many elements of a bf16 parameter one core updates per second.

    This is the highest speed of the kernel with one thread, for any memory bandwidth.
    """
    is_split = state_format != "fp32"
    has_codes = state_format in CODED_FORMATS
    param_format = None if is_split else FloatFormat.BFLOAT16
    adam.compile_kernel(
        FloatFormat.BFLOAT16, param_format, False, state_format, split_master=is_split
    )
    tags = adam.state_tags(state_format, is_split)
    remainder, exp_avg, exp_avg_sq = (
        None if tag is None else np.zeros(_NUMEL, dtype=tag.dtype) for tag in tags[1:]
    )
    assert exp_avg is not None
    assert exp_avg_sq is not None
    one = np.array([0x3F80], dtype=np.uint16)  # 1.0 in bfloat16
    gradient = np.tile(one, _NUMEL)
    master = np.tile(one, _NUMEL) if is_split else np.ones(_NUMEL, dtype=np.float32)
    # key, first, run, pitch, local_start; the bits of a scale of 1, and no shift
    place = (1, 0, _NUMEL, _NUMEL, 0, 0x3F800000, 0)
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
        remainder=remainder,
        exp_avg=exp_avg,
        exp_avg_sq=exp_avg_sq,
        max_exp_avg_sq=None,
        param_out=None if is_split else np.zeros(_NUMEL, dtype=np.uint16),
        exponents=np.zeros((_NUMEL // BLOCK_NUMEL, 2), dtype=np.uint8) if has_codes else None,
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
