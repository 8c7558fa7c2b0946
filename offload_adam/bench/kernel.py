"""`bench kernel`: the Adam update alone, in fp32."""

from __future__ import annotations

from typing import Any

import numpy as np

from offload_adam.bench.harness import OURS, Contender, compare, prepare_machine
from offload_adam.bench.peers import ADAMW, available_peers, torch_fused
from offload_adam.bench.planes import Planes, make_planes
from offload_adam.kernels import adam, threads
from offload_adam.kernels.formats import FloatFormat
from offload_adam.kernels.scalars import scalar_row

BYTES_PER_PARAM = 28
"""Gradient, master weight and both moments are read, the last three are written, 4 bytes each."""


def measure_kernel(numel: int, num_threads: int, num_pairs: int) -> dict[str, Any]:
    """Return the report of `bench kernel`, a JSON object.

    Raises:
        HostMemoryError: the node does not have enough memory available.
    """
    machine = prepare_machine(2 * 16 * numel, num_threads)  # two sets of planes
    theirs = make_planes(numel, huge_pages=False)
    peers, left_out = available_peers(theirs)
    contenders = [offload_update(make_planes(numel, huge_pages=True), num_threads)]
    for name, optimizer in {"torch_fused": torch_fused(theirs), **peers}.items():
        contenders.append(Contender(name, optimizer.step, BYTES_PER_PARAM))
    return compare(
        "kernel",
        contenders,
        numel=numel,
        num_pairs=num_pairs,
        machine=machine,
        left_out=left_out,
        definitions={"torch_fused": "torch.optim.AdamW(fused=True)"},
    )


def offload_update(planes: Planes, num_threads: int) -> Contender:
    """Return this package's kernel over one segment. Each run makes its scalars, as a step does."""
    adam.compile_kernel(FloatFormat.FLOAT32, None, False)
    num_steps = 0

    def run() -> None:
        nonlocal num_steps
        num_steps += 1
        threads.use_threads(num_threads)
        adam.update(
            FloatFormat.FLOAT32,
            np.array([planes.gradient.data_ptr()], dtype=np.int64),
            np.zeros(1, dtype=np.int64),
            np.array([0, planes.numel], dtype=np.int64),
            np.zeros(1, dtype=np.int64),
            scalar_row(ADAMW, num_steps, 1.0)[None],
            master=planes.master_weight.numpy(),
            remainder=None,
            exp_avg=planes.exp_avg.numpy(),
            exp_avg_sq=planes.exp_avg_sq.numpy(),
            max_exp_avg_sq=None,
            param_out=None,
            exponents=None,
            places=None,
            num_pieces=num_threads,
        )

    return Contender(OURS, run, BYTES_PER_PARAM)
