"""Choose a batch whose forward takes longer than the update, from measured times."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from offload_adam.bench.training.batches import choose_batches
from offload_adam.bench.training.contenders import MODEL_ALONE, SEQUENTIAL
from offload_adam.bench.training.measure import Steps, Task, measure
from offload_adam.bench.training.model import Sizes

RATIO = 1.5
"""Of forward to update, with a margin because times vary from run to run."""
PROBED = (8, 64)
LONGEST_FORWARD_MS = 400.0
"""A step takes as long as four forwards, and a test takes about ten steps."""
MEMORY_SHARE = 0.7
"""Of the free GPU memory. The measured peak does not include the optimizer's slots."""


class NoBatchError(Exception):
    """No batch has a long enough forward; the message has the measured times."""


def choose_batch(alone: Mapping[int, Steps], update_ms: float, free_nbytes: int | None) -> int:
    """Return the number of sequences whose forward takes RATIO times the update.

    Times and memory are extrapolated on straight lines through the measured values.

    Args:
        alone: of at least two batches, by number of sequences.
        update_ms: one update without overlap.
        free_nbytes: GPU memory that is free, None without a GPU.

    Raises:
        NoBatchError: the forward would take too long, or too much memory.
    """
    forward_ms = {batch: one.forward_ms or 0.0 for batch, one in alone.items()}
    numbers = f"F = {forward_ms} ms by number of sequences, U = {update_ms:.1f} ms"
    if len(alone) < 2:
        raise NoBatchError(f"fewer than two batches fit into the GPU: {numbers}")
    if update_ms * RATIO > LONGEST_FORWARD_MS:
        raise NoBatchError(f"F would be longer than {LONGEST_FORWARD_MS:.0f} ms: {numbers}")
    batch = choose_batches(forward_ms, update_ms, [RATIO])[RATIO]
    if free_nbytes is not None:
        needed_nbytes = _peak_nbytes(alone, batch)
        if needed_nbytes > MEMORY_SHARE * free_nbytes:
            raise NoBatchError(
                f"{batch} sequences would take {needed_nbytes / 2**30:.1f} GiB of "
                f"{free_nbytes / 2**30:.1f} GiB free: {numbers}"
            )
    return batch


def _peak_nbytes(alone: Mapping[int, Steps], batch: int) -> float:
    """Return the peak of a batch, on the line through the smallest and largest measured batch."""
    low, high = min(alone), max(alone)
    low_nbytes, high_nbytes = (alone[b].peak_gpu_nbytes or 0 for b in (low, high))
    return low_nbytes + (high_nbytes - low_nbytes) * (batch - low) / (high - low)


def measure_and_choose(sizes: Sizes, device: torch.device) -> int:
    """Measure forward and update, and choose a batch.

    Raises:
        NoBatchError: no batch is suitable.
    """

    def task(contender: str, batches: tuple[int, ...]) -> Task:
        return Task(
            contender=contender, sizes=sizes, device=str(device), batches=batches, num_steps=3
        )

    alone = measure(task(MODEL_ALONE, PROBED)).steps
    update_ms = measure(task(SEQUENTIAL, PROBED[:1])).steps[PROBED[0]].updates_only_ms
    assert update_ms is not None
    free_nbytes = None
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free_nbytes, _ = torch.cuda.mem_get_info(device)
    return choose_batch(alone, update_ms, free_nbytes)
