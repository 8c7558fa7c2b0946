"""Let FSDP2 wait for a group's updates before it gathers the group's parameters.

    step()      update 3   update 2   update 1   update 0            on the update thread
    forward     unshard 3 | wait 3 | gather 3 | unshard 2 | ...      FSDP2, on its own streams

FSDP2 gathers parameters ahead of the module that reads them, so a hook on the module comes too
late. Every gather goes through the group's `unshard`: there the host waits for the group's own
updates, and the stream that reads the parameters waits for their H2D copies.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import ExitStack

from offload_adam.fsdp_private import FsdpGroup
from offload_adam.step.executor import Executor


class UnshardWaits:
    """The waits of all FSDP2 groups of an optimizer.

    Owns: a wrapper of each group's `unshard`. Closing `removals` removes the wrappers; it does not
        keep the model alive.
    """

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self.removals = ExitStack()

    def attach(self, buckets_of: Mapping[FsdpGroup, Collection[int]]) -> None:
        """Put waits on these groups, instead of earlier ones.

        Args:
            buckets_of: the buckets with the parameters of each group.
        """
        self.removals.close()
        for group, buckets in buckets_of.items():
            self._attach_to(group, buckets)

    def _attach_to(self, group: FsdpGroup, buckets: Collection[int]) -> None:
        def wait() -> None:
            self._executor.wait_for_buckets(buckets)

        self.removals.callback(group.call_before_unshard(wait))
