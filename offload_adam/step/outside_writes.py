"""Weights that others than the step write: noticed, followed, kept out of what is being saved."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from offload_adam.parameters.selection import NewParameter
from offload_adam.parameters.watch import VersionWatch
from offload_adam.step.bucket_state import BucketState
from offload_adam.step.following import follow
from offload_adam.step.read_gate import ReadGate

_NO_BACKWARD = -1


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

    def extend(self, new: Sequence[NewParameter]) -> None:
        """Watch further parameters, from how they are now."""
        self._watch.extend([item.name for item in new], [item.parameter for item in new])

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
        if torch._C._current_graph_task_id() == _NO_BACKWARD:
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
