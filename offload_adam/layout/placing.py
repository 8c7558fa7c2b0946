"""Which buckets of parameters on a device keep their state there, too."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from offload_adam.layout.flat import Bucket


def kept_on_device(
    buckets: Sequence[Bucket], on_device: Collection[int], offload_fraction: float
) -> frozenset[int]:
    """Return the indices of the buckets whose state stays on the device.

    They are those that are updated last: the next forward waits for them last, and their update on
    the device comes after all that the host's update can hide under. The first that does not fit
    ends it, so that the device never holds more than was left to it.

    Args:
        buckets: in the order in which backward completes them, which is the reverse of that of the
            updates.
        on_device: indices of those whose parameters are on a device; only they are chosen from.
        offload_fraction: of the elements, that have their state on the host at least.
    """
    candidates = [bucket for bucket in buckets if bucket.index in on_device]
    total = sum(bucket.numel for bucket in candidates)
    room = total - math.ceil(offload_fraction * total)
    kept = []
    for bucket in candidates:
        room -= bucket.numel
        if room < 0:
            break
        kept.append(bucket.index)
    return frozenset(kept)
