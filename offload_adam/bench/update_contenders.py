"""The update alone, in fp32: this package's kernel, and any optimizer on the same planes."""

from __future__ import annotations

import numpy as np
import torch

from offload_adam.bench.contender import ADAMW
from offload_adam.bench.planes import Planes, named
from offload_adam.bench.results import BASELINE
from offload_adam.kernels import adam, threads
from offload_adam.kernels.formats import FloatFormat
from offload_adam.kernels.scalars import scalar_row

_BYTES_PER_PARAM = 28


class OffloadUpdate:
    """Launches the fused kernel over one segment; each run makes its scalars, as a step does."""

    name = BASELINE
    bytes_per_param = _BYTES_PER_PARAM

    def __init__(self, planes: Planes, num_threads: int) -> None:
        adam.compile_kernel(FloatFormat.FLOAT32, None, False)
        self.memory = planes.memory
        self.num_steps = 0
        self._num_threads = num_threads
        self._planes = planes

    def run(self) -> None:
        """Apply one update."""
        self.num_steps += 1
        threads.use_threads(self._num_threads)
        planes = self._planes
        adam.update(
            FloatFormat.FLOAT32,
            np.array([planes.gradient.data_ptr()], dtype=np.int64),
            np.zeros(1, dtype=np.int64),
            np.array([0, planes.numel], dtype=np.int64),
            np.zeros(1, dtype=np.int64),
            scalar_row(ADAMW, self.num_steps, 1.0)[None],
            planes.master_weight.numpy(),
            planes.exp_avg.numpy(),
            planes.exp_avg_sq.numpy(),
            None,
            None,
            self._num_threads,
        )


class OptimizerUpdate:
    """Calls `step()` of an optimizer that keeps its state in the planes."""

    bytes_per_param = _BYTES_PER_PARAM

    def __init__(self, name: str, optimizer: torch.optim.Optimizer, planes: Planes) -> None:
        self.name = named(name, planes.memory)
        self.memory = planes.memory
        self._optimizer = optimizer

    def run(self) -> None:
        """Apply one update."""
        self._optimizer.step()
