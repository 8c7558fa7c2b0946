"""Reject parameters that another optimizer already owns.

The second optimizer would move a parameter's data out of the first one's bucket.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable

from offload_adam.params.selection import NewParameter
from offload_adam.sharded_optimizer.state_access import StateAccess

_OWNERS: weakref.WeakSet[StateAccess] = weakref.WeakSet()


def add_owner(optimizer: StateAccess) -> None:
    """Register an optimizer as the owner of its parameters until it is closed or collected."""
    _OWNERS.add(optimizer)


def reject_owned(new: Iterable[NewParameter]) -> None:
    """Reject parameters that another open optimizer of this package trains.

    Raises:
        ValueError: the message names the first such parameter.
    """
    new = list(new)
    if _first_owned(new) is None:
        return
    gc.collect()  # the other optimizer may be garbage that only a reference cycle keeps
    owned = _first_owned(new)
    if owned is not None:
        raise ValueError(
            f"Parameter {owned.name!r} is already trained by another optimizer of this package. "
            "Call close() on that optimizer first, or pass other parameters."
        )


def _first_owned(new: Iterable[NewParameter]) -> NewParameter | None:
    owners = list(_OWNERS)
    for item in new:
        if any(owner._holds(item.parameter) for owner in owners):
            return item
    return None
