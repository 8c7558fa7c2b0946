"""Sizes of a kept file's parts, to create the file and to plan its memory."""

from __future__ import annotations

from offload_adam.kept.file import Sizes
from offload_adam.kernels.undo import MAX_PIECES, UndoLog

_MAX_OTHER_NBYTES = 4 * 1024 * 1024
_MAX_VALUES_NBYTES = 256 * 1024  # names, and hyperparameters of 1,000 groups


def payload_nbytes(buffers_nbytes: int) -> int:
    """Return the maximum size of the payload of a step's record: the model's buffers and more.

    Args:
        buffers_nbytes: of the model's persistent buffers.
    """
    return buffers_nbytes + _MAX_OTHER_NBYTES


def kept_sizes(num_parameters: int, payload_nbytes: int, arena_nbytes: int) -> Sizes:
    """Return the sizes of the parts of a file.

    Args:
        arena_nbytes: of the state, and of gradients and parameters that are kept with it.
    """
    counters_nbytes = num_parameters * (4 + 8)  # step counts in float32, scales in float64
    return Sizes(
        payload_nbytes + counters_nbytes + _MAX_VALUES_NBYTES,
        num_parameters + _MAX_VALUES_NBYTES,  # one flag for each
        UndoLog.nbytes(MAX_PIECES),
        arena_nbytes,
    )
