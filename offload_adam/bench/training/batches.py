"""Choose batches by the ratio of forward to update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

TARGET_RATIOS = (0.25, 0.5, 1.0, 2.0, 4.0)
NEAR = 0.25
"""A measured ratio is near its target if they differ by at most this part of the target."""


def choose_batches(
    forward_ms: Mapping[int, float],
    update_ms: float,
    targets: Sequence[float] = TARGET_RATIOS,
    *,
    largest: int | None = None,
) -> dict[float, int]:
    """Return the number of sequences for each ratio of forward to update.

    Times are interpolated and extrapolated on the line through the two nearest measured batches.

    Args:
        forward_ms: of at least two batches, by number of sequences.
        largest: most sequences to choose; ratios that need more are left out.

    Raises:
        ValueError: fewer than two batches were measured.
    """
    chosen = {}
    for target in targets:
        batch = max(1, round(_batch_of(target * update_ms, forward_ms)))
        if largest is None or batch <= largest:
            chosen[target] = batch
    return chosen


def _batch_of(wanted_ms: float, forward_ms: Mapping[int, float]) -> float:
    points = sorted(forward_ms.items())
    if len(points) < 2:
        raise ValueError("The forward must have been measured at two batches at least.")
    number = next((n for n, (_, ms) in enumerate(points) if ms >= wanted_ms), len(points) - 1)
    (low, low_ms), (high, high_ms) = points[max(0, number - 1)], points[max(1, number)]
    slope = (high_ms - low_ms) / (high - low)
    if slope <= 0.0:  # both batches are too small to make a difference: try a larger one
        return 2.0 * high
    return low + (wanted_ms - low_ms) / slope


def is_near(ratio: float, target: float) -> bool:
    """Tell whether a measured ratio is near its target."""
    return abs(ratio - target) <= NEAR * target
