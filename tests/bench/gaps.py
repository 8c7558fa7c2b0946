"""Measure how long no kernel runs between two updates of one step, on a simulated device.

    python -m tests.bench.gaps

In half of the runs the training thread executes Python and short operations meanwhile, as in a
forward; in the other half it waits. The copies of the simulated device take time of the CPU, so
the result needs some idle cores.
"""

from __future__ import annotations

import argparse
import time
from itertools import pairwise

import numpy as np
import torch

from offload_adam import OffloadAdamW, OffloadPolicy
from offload_adam.spans import SpanRecorder, recorded_by
from tests.support.devices import HOST_AS_DEVICE

NUM_WARMUP, NUM_STEPS = 3, 10


class Layers(torch.nn.Module):
    """Layers side by side, one for each bucket, with a forward and a backward that take little."""

    def __init__(self, num_layers: int, numel: int) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(
            torch.nn.Linear(1, numel, bias=False, dtype=torch.bfloat16) for _ in range(num_layers)
        )

    def forward(self) -> torch.Tensor:
        one = torch.ones(1, dtype=torch.bfloat16)
        return torch.stack([layer(one).sum() for layer in self.layers]).sum()


class Offloading(OffloadAdamW):
    """Treats parameters in host memory like parameters on a device."""

    _backend = HOST_AS_DEVICE


def measure(num_buckets: int, numel: int, *, busy: bool) -> None:
    """Print quantiles of the times of updates, and of the times between two of one step."""
    torch.manual_seed(0)
    model = Layers(num_buckets, numel)
    optimizer = Offloading(
        model.parameters(),
        module=model,
        overlap=True,
        num_threads=1,
        max_grad_norm=1.0,
        offload=OffloadPolicy(bucket_nbytes=2 * numel),
    )
    updates, gaps = [], []
    small = torch.ones(16)
    for step in range(NUM_WARMUP + NUM_STEPS):
        model().backward()
        recorder = SpanRecorder()
        with recorded_by(recorder):
            optimizer.step()
            end_s = time.perf_counter() + 0.002 * num_buckets
            while busy and time.perf_counter() < end_s:
                small = small * 1.0
            optimizer.synchronize()
        spans = [span for span in recorder.spans() if span.name == "update"]
        assert len(spans) == num_buckets
        if step >= NUM_WARMUP:
            updates += [span.end_ns - span.start_ns for span in spans]
            gaps += [after.start_ns - before.end_ns for before, after in pairwise(spans)]
    optimizer.close()
    for name, found in (("updates", updates), ("between them", gaps)):
        low, middle, high = np.quantile(np.array(found) / 1e3, [0.1, 0.5, 0.9])
        print(f"{name:>14}: {middle:6.0f} us ({low:.0f} to {high:.0f}), busy={busy}")


def main() -> None:
    """Measure twice with and twice without a busy training thread."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--buckets", type=int, default=12)
    parser.add_argument("--numel", type=int, default=8_000_000, help="elements of a bucket")
    given = parser.parse_args()
    for busy in (False, True, False, True):
        measure(given.buckets, given.numel, busy=busy)


if __name__ == "__main__":
    main()
