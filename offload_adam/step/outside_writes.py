"""Weights that others than the step write: noticed, followed, kept out of what is being saved."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from offload_adam.parameters.selection import NewParameter
from offload_adam.parameters.watch import VersionWatch
from offload_adam.step.bucket_state import BucketState
from offload_adam.step.following import differing, follow, sample_differs
from offload_adam.step.read_gate import ReadGate
from offload_adam.torch_private import NO_GRAPH_TASK, current_graph_task

logger = logging.getLogger(__name__)

_FIRST_STEPS = 2
"""Steps that compare everything at first: weights may have been written before the first of them,
and a loop that writes after every step shows in the second."""

_STEPS_AFTER_WRITE = 10
"""Steps that compare everything after a write that was found: another one may be smaller."""

_SAMPLED_BUCKETS = 32
"""Buckets that one step samples at most, in turns: this bounds the time whatever the model."""


class OutsideWrites:
    """Tells the step which parameters were written to, and a checkpoint being written what it lost.

    Parameters are meant by their index over all of the optimizer.

    Owns: the version watch, and the gate that keeps updates off what is still being read.

    Args:
        module: where parameters are registered, to notice another object in their place.
        states: all buckets; grows with the optimizer.
        places: the bucket of each parameter and its position there; grows with the optimizer.
    """

    def __init__(
        self,
        module: torch.nn.Module | None,
        states: Sequence[BucketState],
        places: Sequence[tuple[int, int]],
    ) -> None:
        self.gate = ReadGate()
        self._watch = VersionWatch(module)
        self._states = states
        self._places = places
        self._num_applied = 0
        self._is_first = True
        self._num_thorough = _FIRST_STEPS
        self._has_warned = False

    def extend(self, new: Sequence[NewParameter]) -> None:
        """Watch further parameters, from how they are now."""
        self._watch.extend([item.name for item in new], [item.parameter for item in new])
        self.compare_all()

    def compare_all(self) -> None:
        """Compare every parameter with its master in the next steps: either may be new."""
        self._is_first = True
        self._num_thorough = _FIRST_STEPS

    def find(self) -> list[int]:
        """Return the parameters written to since the last step, and tell the gate of them.

        Raises:
            ParameterReplacedError: naming a parameter whose storage or object was replaced.
        """
        changed = self._watch.changed()
        if self.gate.is_open:
            since = self._watch.since_mark(changed)
            self.gate.note_changes({self._places[index][0] for index in since})
        return changed

    def find_unseen(self, changed: Sequence[int]) -> list[int]:
        """Return parameters that were written through `.data` or NumPy, as far as a look shows.

        No version counter moves then, but the parameter differs from its rounded master. The first
        steps compare everything. Later ones compare a sample, which finds a write to all of a model
        and may miss one to a few elements.

        Args:
            changed: what `find` returned; these are known already.
        """
        if self._num_thorough == 0:
            turn, every = self._num_applied, 1 + len(self._states) // _SAMPLED_BUCKETS
            known = {self._places[index][0] for index in changed}
            if not any(
                sample_differs(state, turn // every)
                for state in self._states[turn % every :: every]
                if state.layout.index not in known
            ):
                return []
        return self.all_unseen(changed)

    def all_unseen(self, changed: Sequence[int]) -> list[int]:
        """Return what `find_unseen` looks for, having compared every parameter."""
        known = set(changed)
        found = [
            int(state.indices[position]) for state in self._states for position in differing(state)
        ]
        return sorted(set(found) - known)

    def report_unseen(self, names: Sequence[str]) -> None:
        """Compare everything for some steps, and warn once.

        A write before the first step needs no warning: every shard is compared then.

        Args:
            names: the parameters that were written.
        """
        if self._is_first:
            return
        self._num_thorough = _STEPS_AFTER_WRITE
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                "%d parameter(s), %r first, were written through .data or NumPy; their master "
                "weights follow. Not every such write can be found: write under torch.no_grad() "
                "without .data, or call refresh_master() after it",
                len(names),
                names[0],
            )

    def checksum(self, changed: Sequence[int]) -> int:
        """Return a checksum below 2**53 over which parameters changed and to what, 0 for none."""
        return self._watch.checksum(changed)

    def follow(self, changed: Sequence[int]) -> None:
        """Let the masters follow these parameters, once nobody reads them any more."""
        if changed:
            self.gate.wait_until_all_free()
        positions: dict[int, set[int]] = {}
        for index in changed:
            bucket, position = self._places[index]
            positions.setdefault(bucket, set()).add(position)
        for bucket, members in positions.items():
            follow(self._states[bucket], members)

    def follow_all(self) -> None:
        """Let every master follow its parameter, for writes that no version counter saw."""
        self.gate.note_changes([state.layout.index for state in self._states])
        self.gate.wait_until_all_free()
        for state in self._states:
            follow(state, range(len(state.parameters)))
        self._watch.settle()

    def count_our_own(self, written: npt.NDArray[np.bool_]) -> None:
        """Bump the versions of the parameters that the step is about to write.

        Our writes go through the flat bucket: autograd's check against stale graphs must see them.
        Counted before they happen, while `find` has the parameters in the cache.

        Args:
            written: (num parameters,) bool.
        """
        self._watch.count_writes(written)
        self._num_applied += 1
        self._is_first = False
        self._num_thorough = max(0, self._num_thorough - 1)

    def arrived(self, bucket: int) -> None:
        """Count our writes to a bucket once more, as its parameters may be read from now on.

        So autograd refuses the gradients of what has read them since `step()`, which was the old
        values. A backward that is running already is left alone: who waited for what is looked at
        when its gradients are taken, and that error says more.

        Raises:
            UnreadyParameterError: naming a parameter that was written to in the meantime.
        """
        positions = self._states[bucket].indices.tolist()
        self._watch.refuse_written(positions)
        if current_graph_task() == NO_GRAPH_TASK:
            self._watch.recount(positions)

    def begin_reading(self, buckets: Iterable[int]) -> ReadGate:
        """Keep updates off these buckets until the gate says that they have been read."""
        self._watch.mark()
        for device in {state.device for state in self._states if state.device.type == "cuda"}:
            # Who reads what lies there does so on a stream of its own.
            torch.cuda.current_stream(device).synchronize()
        self.gate.begin(buckets)
        return self.gate

    def finish_reading(self) -> None:
        """Return when nothing is being read, having looked for further writes until then."""
        if self.gate.is_open:
            self.find()
            self.gate.wait_until_all_free()
