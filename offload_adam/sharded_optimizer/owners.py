"""One optimizer at a time owns a parameter: a newer one takes over, or is rejected.

A second optimizer would move a parameter's data out of the first one's bucket.
"""

from __future__ import annotations

import gc
import json
import sys
import traceback
import weakref
from collections.abc import Collection
from contextlib import suppress
from typing import TYPE_CHECKING

from offload_adam.coordinator.rank_checks import gather_texts, raise_on_all_ranks
from offload_adam.coordinator.ranks import RankGroup
from offload_adam.errors import is_internal, warn_user
from offload_adam.params.selection import NewParameter, Selection

if TYPE_CHECKING:
    from offload_adam.sharded_optimizer.optimizer import ShardedOptimizer

_OWNERS: weakref.WeakSet[ShardedOptimizer] = weakref.WeakSet()


def add_owner(optimizer: ShardedOptimizer) -> None:
    """Register an optimizer as the owner of its parameters until it is closed or collected."""
    _OWNERS.add(optimizer)


def reject_owned(new: Collection[NewParameter]) -> None:
    """Reject parameters that another open optimizer of this package trains.

    Raises:
        ValueError: the message names the first such parameter.
    """
    _reject_owned(new, _owners_of(new))


def find_older(selection: Selection) -> ShardedOptimizer | None:
    """Return the open optimizer of exactly these parameters, which the new one may take over.

    Raises:
        ValueError: another optimizer trains some of them. The message names the first of these.
    """
    owners = _owners_of(selection.new)
    if len(owners) == 1:
        trained = {item.parameter for item in selection.new}
        given = trained.union(parameter for _, parameter in selection.frozen)
        # Parameters may have been frozen and unfrozen since. The latter may have no state yet.
        if owners[0]._index_of.keys() <= given and trained <= {*owners[0]._grouped_parameters()}:
            return owners[0]
    _reject_owned(selection.new, owners)
    return None


def take_over(older: ShardedOptimizer | None, ranks: RankGroup) -> None:
    """Close the older optimizer of the parameters of a new one, with a warning. Collective.

    Args:
        older: from `find_older`, None if this rank has none. Ranks may differ in that, and may have
            left the older optimizer at different places of a step.
        ranks: those of the new optimizer.

    Raises:
        Exception: raised by an update that the older optimizer was still running.
    """
    own = "" if older is None else json.dumps(older._unfinished())
    found = [json.loads(text) for text in gather_texts(ranks, own) if text]
    failure: Exception | None = None
    if older is not None:
        gathers = [to_gather for to_gather, _ in found]
        all_join = older.ranks.world_size == ranks.world_size == len(found) and all(
            to_gather == gathers[0] for to_gather in gathers
        )
        is_partial = any(is_half_applied for _, is_half_applied in found)
        if not all_join:
            is_partial |= any(buckets for _, buckets in gathers)
        try:
            warn_user(_warning_of(older, is_partial=is_partial))
            older._hand_over(joined=all_join)
            _free_interrupted_calls()
            gc.collect()  # the state is part of reference cycles
        except Exception as error:
            failure = error
    if found:
        # Not around the code above: a body must not issue collectives, and closing may issue them.
        with raise_on_all_ranks(ranks, "closing the older optimizer of its parameters"):
            if failure is not None:
                raise failure


def _warning_of(older: ShardedOptimizer, *, is_partial: bool) -> str:
    lost = ""
    if is_partial:
        lost += " Its last step did not finish: some weights are updated and others are not."
    if older._has_streamed():
        lost += " The gradients of its last backward are dropped."
    return (
        f"A new optimizer takes over the parameters of an older {type(older).__name__}, which is "
        f"closed.{lost} Call close() on an optimizer before you construct another one for its "
        "parameters."
    )


def _free_interrupted_calls() -> None:
    """Drop the local variables of this package's calls that the last uncaught error ended.

    A prompt or notebook keeps that error for a debugger, in `sys.last_value`. If Ctrl-C has ended a
    `step()`, the variables of the calls inside it still refer to the older optimizer's state.
    """
    error = getattr(sys, "last_value", None)
    for frame, _ in traceback.walk_tb(getattr(error, "__traceback__", None)):
        if is_internal(frame):
            with suppress(RuntimeError):  # still running, in another thread
                frame.clear()


def _owners_of(new: Collection[NewParameter]) -> list[ShardedOptimizer]:
    def find() -> list[ShardedOptimizer]:
        return [owner for owner in _OWNERS if any(owner._holds(item.parameter) for item in new)]

    if not find():
        return []
    gc.collect()  # the other optimizer may be garbage that only a reference cycle keeps
    return find()


def _reject_owned(new: Collection[NewParameter], owners: Collection[ShardedOptimizer]) -> None:
    for item in new:
        if any(owner._holds(item.parameter) for owner in owners):
            raise ValueError(
                f"Parameter {item.name!r} is already trained by another optimizer of this package. "
                "Call close() on that optimizer first, or pass other parameters."
            )
