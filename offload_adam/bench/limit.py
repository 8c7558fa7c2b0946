"""The machine's limit: one read-modify-write pass over the streams of an update, and no arithmetic.

Two passes compete, Numba's and torch's, and the faster one is the limit. A pass that is slower than
a plain copy says something about the pass, not about the machine, and is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from offload_adam.bench.contender import Contender
from offload_adam.bench.planes import Planes
from offload_adam.kernels.probe import STREAM_NBYTES, pass_over

LIMIT_BYTES_PER_PARAM = STREAM_NBYTES
"""Gradient, master weight and both moments read, the last three written, 4 bytes each."""
_COPY_BYTES_PER_PARAM = 8
LEAST_SHARE_OF_COPY = 0.9


class LimitRefusedError(RuntimeError):
    """The limit lies under 0.9 of a plain copy's bandwidth: the machine was disturbed."""


class NumbaLimit:
    """Reads four streams and writes three, all of them at once."""

    bytes_per_param = LIMIT_BYTES_PER_PARAM

    def __init__(self, planes: Planes, num_threads: int) -> None:
        self.memory = planes.memory
        self.name = f"limit (numba, {planes.memory})"
        self._num_threads = num_threads
        streams = (planes.gradient, planes.master_weight, planes.exp_avg, planes.exp_avg_sq)
        self._streams = [stream.numpy() for stream in streams]

    def run(self) -> None:
        """Multiply by 1 and add 0, which the compiler does not know."""
        gradient, first, second, third = self._streams
        pass_over(gradient, first, second, third, self._num_threads)


class TorchLimit:
    """Reads and writes the same bytes one operation after the other."""

    bytes_per_param = LIMIT_BYTES_PER_PARAM

    def __init__(self, planes: Planes) -> None:
        self.memory = planes.memory
        self.name = f"limit (torch, {planes.memory})"
        self._planes = planes

    def run(self) -> None:
        """Multiply by 1 and add 0."""
        self._planes.master_weight.mul_(1.0)
        self._planes.exp_avg.mul_(1.0)
        self._planes.exp_avg_sq.add_(self._planes.gradient, alpha=0.0)


class PlainCopy:
    """Copies one stream to another."""

    bytes_per_param = _COPY_BYTES_PER_PARAM

    def __init__(self, planes: Planes) -> None:
        self.memory = planes.memory
        self.name = f"copy (torch, {planes.memory})"
        self._source = planes.gradient
        self._target = torch.empty_like(planes.gradient)
        self._target.copy_(self._source)

    def run(self) -> None:
        """Copy it once."""
        self._target.copy_(self._source)


@dataclass(frozen=True, kw_only=True)
class Limit:
    """The fastest of the passes, and the bandwidths of all that it was judged by."""

    name: str
    memory: str
    bytes_per_param: int
    ms_median: float
    gb_per_s: float
    measured_gb_per_s: dict[str, float]
    pairs_ms: tuple[float, ...]


def gb_per_s(bytes_per_param: int, numel: int, milliseconds: float) -> float:
    """Return the bandwidth in 1e9 bytes a second."""
    return bytes_per_param * numel / milliseconds / 1e6


def choose_limit(
    timings: Mapping[str, Sequence[float]],
    passes: Sequence[Contender],
    copies: Sequence[Contender],
    numel: int,
) -> Limit:
    """Return the pass with the largest bandwidth; all move the same bytes.

    Raises:
        LimitRefusedError: it lies under 0.9 of the fastest copy's bandwidth.
    """
    measured = {
        one.name: gb_per_s(one.bytes_per_param, numel, median(timings[one.name]))
        for one in (*passes, *copies)
    }
    best = max(passes, key=lambda one: measured[one.name])
    bandwidth, copied = measured[best.name], max(measured[copy.name] for copy in copies)
    if bandwidth < LEAST_SHARE_OF_COPY * copied:
        raise LimitRefusedError(
            f"the limit was measured at {bandwidth:.1f} GB/s, under {LEAST_SHARE_OF_COPY} of a "
            f"plain copy's {copied:.1f} GB/s: something else used the machine meanwhile"
        )
    return Limit(
        name=best.name,
        memory=best.memory,
        bytes_per_param=best.bytes_per_param,
        ms_median=median(timings[best.name]),
        gb_per_s=bandwidth,
        measured_gb_per_s=measured,
        pairs_ms=tuple(timings[best.name]),
    )
