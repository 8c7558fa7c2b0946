"""Launches of the update kernel that a later process can complete: their numbers, and their log."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from offload_adam.gradients.segments import BucketGradients
from offload_adam.kept.file import KeptFile
from offload_adam.kernels.undo import MAX_PIECES, UndoLog
from offload_adam.params.bucket import BucketState

_BUCKET_BITS, _PART_BITS = 20, 18


def launch_number(sequence: int, bucket: int, part: int) -> int:
    """Return the number of a launch, which grows in the order in which launches run.

    A step updates its buckets in forward order, which is the reverse of their indices.

    Args:
        sequence: see `UpdateInputs`.
    """
    position = (1 << _BUCKET_BITS) - 1 - bucket
    return ((sequence << _BUCKET_BITS | position) << _PART_BITS) | part


class KeptLaunches:
    """Runs launches, and records in the file of kept state how far they have come.

    Args:
        file: has the number of the last complete launch, and the undo log of the running one.
    """

    def __init__(self, file: KeptFile) -> None:
        self._file = file
        self._log = UndoLog(file.undo)

    def run(
        self,
        number: int,
        num_pieces: int,
        update: Callable[..., None],
        arrays: Sequence[Any],
    ) -> None:
        """Run a launch, or what is left of it if the process that ran it was killed.

        Args:
            number: from `launch_number`.
            update: `adam.update` without its last arguments.
            arrays: the arguments of `UndoLog.restore`.
        """
        file = self._file
        if number <= file.done:
            return
        if file.launch == number:
            self._log.restore(number, *arrays)
        # Complete a killed launch with its own number of pieces: each piece has an area of the log.
        num_pieces = file.begin_launch(number, min(num_pieces, MAX_PIECES))
        update(num_pieces, file.undo, number)
        file.done = number


def reject_unkept(state: BucketState, gradients: BucketGradients) -> None:
    """Reject gradients that a later process could not read.

    Raises:
        ValueError: a gradient is sparse; the message names the parameter.
    """
    for position in gradients.rows:
        raise ValueError(
            f"Parameter {state.names[position]!r} has a sparse gradient, which kept state does "
            "not support. Construct its layer with sparse=False, or pass keep='none'."
        )
    shard = gradients.shard
    assert shard is None or shard is state.planes.gradient_shard, "no accumulators are allocated"
