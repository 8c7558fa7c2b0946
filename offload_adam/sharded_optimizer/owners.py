"""Which parameters have an optimizer already: two would lay out and write one memory."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable

from offload_adam.params.selection import NewParameter
from offload_adam.sharded_optimizer.state_access import StateAccess

_OWNERS: weakref.WeakSet[StateAccess] = weakref.WeakSet()


def add_owner(optimizer: StateAccess) -> None:
    """Count an optimizer as the owner of its parameters, until it is closed or collected."""
    _OWNERS.add(optimizer)


def reject_owned(new: Iterable[NewParameter]) -> None:
    """Reject parameters that another optimizer of this package holds.

    Raises:
        ValueError: naming the first one.
    """
    new = list(new)
    if _first_owned(new) is None:
        return
    gc.collect()  # nobody may hold the other any more, but a cycle that it is in
    owned = _first_owned(new)
    if owned is not None:
        raise ValueError(
            f"parameter {owned.name!r} is trained by another optimizer of this package already: "
            "close() that first, or give this one other parameters"
        )


def _first_owned(new: Iterable[NewParameter]) -> NewParameter | None:
    owners = list(_OWNERS)
    for item in new:
        if any(owner._holds(item.parameter) for owner in owners):
            return item
    return None
