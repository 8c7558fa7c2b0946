"""The loop of every wait that must not hang: it polls, checks for failures, and pauses."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import torch.distributed as dist

SLICE_S = 0.5
"""Timeout of one blocking call in a wait.

Until the call returns, the thread does not notice that a peer has failed. If the call blocks in
C++, the thread does not notice Ctrl-C either.
"""


def wait_until(
    is_over: Callable[[], bool],
    *,
    check: Callable[[], None] | None = None,
    pause_s: float = 0.0,
    longest_pause_s: float | None = None,
    timeout_s: float | None = None,
) -> bool:
    """Call `is_over` until it returns True; return False if that takes longer than `timeout_s`.

    Args:
        is_over: polls without blocking, or blocks for up to `SLICE_S` itself.
        check: called after each `is_over` that returned False; an error in it ends the wait.
        pause_s: seconds to sleep between two calls; 0 for an `is_over` that blocks.
        longest_pause_s: the pause doubles after each call up to this; None keeps it constant.
        timeout_s: seconds, None for no limit.
    """
    deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
    while not is_over():
        if check is not None:
            check()
        if deadline_s is not None and time.monotonic() > deadline_s:
            return False
        if pause_s > 0:
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, pause_s if longest_pause_s is None else longest_pause_s)
    return True


def wait_for_ranks(
    store: dist.Store,
    prefix: str,
    ranks: Iterable[int],
    *,
    pause_s: float,
    longest_pause_s: float | None = None,
    timeout_s: float,
) -> list[int]:
    """Wait until the store has a key `prefix/rank` for each rank.

    The pauses are as in `wait_until`.

    Returns:
        The ranks whose key is missing after `timeout_s`.
    """
    missing = list(ranks)

    def have_all() -> bool:
        # `check` returns at once. `Store.wait` blocks in C++ and does not name the missing keys.
        missing[:] = [rank for rank in missing if not store.check([f"{prefix}/{rank}"])]
        return not missing

    wait_until(have_all, pause_s=pause_s, longest_pause_s=longest_pause_s, timeout_s=timeout_s)
    return missing
