"""Room for what is updated before it is written: parts of a checkpoint are copied there at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch

from offload_adam.checkpoint.content import HostBytes, Part, as_bytes
from offload_adam.layout.budget import ROOM_ALIGNMENT_NBYTES
from offload_adam.layout.flat import align


def places_in(rooms: Sequence[torch.Tensor], parts: Iterable[Part]) -> dict[str, Part]:
    """Return by name where copies of parts will lie: of as many, in order, as there is room for.

    A part that finds none does not keep the others out.

    Args:
        rooms: (n,) uint8 each, starting at a multiple of 128 bytes.
    """
    placed: dict[str, Part] = {}
    used = [0] * len(rooms)
    for part in parts:
        for number, room in enumerate(rooms):
            start, end = used[number], used[number] + part.data.nbytes
            if end <= room.nbytes:
                placed[part.name] = replace(part, data=room[start:end].view(part.data.dtype))
                used[number] = align(end, ROOM_ALIGNMENT_NBYTES)
                break
    return placed


def copy_bytes(part: Part, copy: Part) -> None:
    """Fill a copy, by the calling thread alone and without the interpreter's lock."""
    target = np.frombuffer(as_bytes(copy.data), dtype=np.uint8)
    done = 0
    for view in HostBytes(part.data):
        piece = np.frombuffer(view, dtype=np.uint8)
        np.copyto(target[done : done + piece.size], piece)
        done += piece.size
