"""Find parameters that the user modified outside of `step()`, and sync master weights with them."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from offload_adam.coordinator.ranks import RankGroup
from offload_adam.layout.flat import BLOCK_NUMEL
from offload_adam.params.bucket import BucketState
from offload_adam.params.elements import as_integers
from offload_adam.params.selection import NewParameter
from offload_adam.step.kept_steps import KeptSteps
from offload_adam.step.snapshot_lock import SnapshotLock
from offload_adam.step.version_watch import VersionWatch
from offload_adam.torch_private import NO_GRAPH_TASK, current_graph_task

logger = logging.getLogger(__name__)


_PIECE = 2**18
"""Elements that are compared at a time, so that comparing all parameters, as after a load, needs
no memory for a copy of them."""

_SAMPLE_BLOCKS = 128
"""A sample has this many blocks of a bucket, or up to twice as many.

Comparing equal ones takes at most 0.1 ms; the update of 16 M elements takes 19 ms.
"""


def sync_master(state: BucketState, positions: Collection[int]) -> None:
    """Set each master element to its parameter element, unless it already rounds to this element.

    Master elements that do so keep their low bits. After a `clamp_`, these are the elements that
    were not clamped; after loading the weights that were saved with the optimizer, all elements.
    Split master weights always keep their remainders, see `memory.split_master`.

    Args:
        positions: of the modified parameters in the bucket.
    """
    for position, master, parameter in _segments(state):
        if position in positions:
            for part, given in _pieces(master, parameter):
                differs = _differs(part, given)
                part[differs] = given[differs].to(part.dtype)


def differing(state: BucketState) -> list[int]:
    """Return the positions of parameters that no longer equal their rounded masters.

    Cost: reads this rank's shard of parameters and masters once, and copies the parameters from the
        device if the state is on the host.
    """
    if state.own_master:
        return []
    segments = state.segments
    starts, ends = segments.shard_starts, segments.shard_starts + segments.numels
    found = np.zeros(starts.size, dtype=np.bool_)
    start = 0
    for part, given in _pieces(state.planes.master_weight, state.shard):
        end = start + part.numel()
        inside = np.arange(starts.searchsorted(end))[ends.searchsorted(start, side="right") :]
        rows = inside[~found[inside]]
        if rows.size > 0 and not _equal(part, given):
            # The kernels keep a NaN's payload, torch does not.
            differs = _differs(part, given) & ~(part.isnan() & given.isnan())
            lows, highs = np.maximum(starts[rows], start), np.minimum(ends[rows], end)
            found[rows] = _any_between(differs, lows - start, highs - start)
        start = end
    return sorted(segments.positions[found].tolist())


def _any_between(
    flags: torch.Tensor, lows: npt.NDArray[np.int64], highs: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """Return for each range [low, high) whether any of its flags is set.

    Args:
        flags: (n,) bool.
        lows, highs: (k,) ascending ranges of at least one flag, not overlapping.
    """
    bounds = np.stack([lows, highs], axis=1).ravel()
    # The results for the gaps between the ranges are dropped. The last gap needs a flag.
    found: npt.NDArray[np.bool_] = np.logical_or.reduceat(np.append(flags.numpy(), False), bounds)
    return found[::2]


def sample_differs(state: BucketState, turn: int) -> bool:
    """Return whether a sample of blocks, spread over the shard, differs from its rounded masters.

    A shard of fewer than 256 blocks is compared as a whole.

    Args:
        turn: selects the blocks; consecutive turns visit all of them.
    """
    if state.own_master:
        return False
    stride = max(1, state.shard.numel() // BLOCK_NUMEL // _SAMPLE_BLOCKS)
    first = turn % stride
    master, parameter = (
        tensor.view(-1, BLOCK_NUMEL)[first::stride]
        for tensor in (state.planes.master_weight, state.shard)
    )
    parameter = parameter.to(master.device)
    if _equal(master, parameter):
        return False
    rows, columns = _differs(master, parameter).nonzero(as_tuple=True)
    return bool(_positions_at(state, (first + rows * stride) * BLOCK_NUMEL + columns))


def _positions_at(state: BucketState, elements: torch.Tensor) -> set[int]:
    """Return the positions of the parameters at these elements of this rank's shard.

    Padding belongs to none. There a copy from a staging slot leaves what another bucket has written
    to the slot, so parameters on a device may differ from their masters in it.

    Args:
        elements: (n,) int64.
    """
    segments, indices = state.segments, elements.cpu().numpy()
    rows = np.searchsorted(segments.shard_starts, indices, side="right") - 1
    rows, indices = rows[rows >= 0], indices[rows >= 0]
    inside = indices < (segments.shard_starts + segments.numels)[rows]
    return set(segments.positions[rows[inside]].tolist())


def _segments(state: BucketState) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yield position, master weights and elements of each parameter in this rank's shard."""
    if state.own_master:
        return
    for segment in state.segments.each:
        yield segment.position, segment.of(state.planes.master_weight), segment.of(state.shard)


def _pieces(
    master: torch.Tensor, parameter: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield pieces of both tensors, those of the parameter on the master's device."""
    for part, given in zip(master.split(_PIECE), parameter.split(_PIECE), strict=True):
        # The copy from a device waits for the current stream, which waits for the last step's H2D
        # copies. So none of them still reads the master when the caller writes it.
        yield part, given.to(part.device)


def _equal(master: torch.Tensor, parameter: torch.Tensor) -> bool:
    return torch.equal(as_integers(master.to(parameter.dtype)), as_integers(parameter))


def _differs(master: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    return as_integers(master.to(parameter.dtype)) != as_integers(parameter)


_FIRST_STEPS = 2
"""This many first steps compare all elements. The first step finds weights that were written before
it; the second one finds a training loop that writes after every step."""

_STEPS_AFTER_WRITE = 10
"""After a write was found, this many steps compare all elements: a sample may miss the next one."""

_SAMPLED_BUCKETS = 32
"""One step samples at most this many buckets, in turns, to bound its time."""


class ExternalEdits:
    """Finds the parameters that the user modified, for the step and for a background checkpoint.

    All methods identify a parameter by its index in the optimizer.

    Owns: the version watch.

    Args:
        ranks: rank 0 logs for all.
        module: the model, to find another object in a parameter's place.
        states: all buckets; this list grows with `add_param_group`.
        places: the bucket of each parameter and its position there; grows too.
        snapshot_lock: invalidated if the user modifies parameters that a checkpoint still reads.
    """

    def __init__(
        self,
        ranks: RankGroup,
        module: torch.nn.Module | None,
        states: Sequence[BucketState],
        places: Sequence[tuple[int, int]],
        snapshot_lock: SnapshotLock,
    ) -> None:
        self.kept: KeptSteps | None = None  # records that a write makes invalid
        self._ranks = ranks
        self.snapshot_lock = snapshot_lock
        self._watch = VersionWatch(module)
        self._states = states
        self._places = places
        self._num_applied = 0
        self._is_first = True
        self._num_thorough = _FIRST_STEPS  # this many further steps compare all elements
        self._has_warned = False

    def extend(self, new: Sequence[NewParameter]) -> None:
        """Watch more parameters; their present values count as unmodified."""
        self._watch.extend(new)
        self.compare_all()

    def compare_all(self) -> None:
        """Let the next steps compare all elements with their masters, for example after a load."""
        self._is_first = True
        self._num_thorough = _FIRST_STEPS

    def find(self, *, rejects: bool = True) -> list[int]:
        """Return the parameters whose version counter moved since the last step.

        Invalidates an open snapshot that may not have read all of them before they were modified.

        Args:
            rejects: raise an error as `reject_replaced`.
        """
        changed = self._watch.changed(self.take_replaced, rejects=rejects)
        if self.snapshot_lock.is_open:
            since = self._watch.since_mark(changed)
            self.snapshot_lock.note_changes({self._places[index][0] for index in since})
        return changed

    def reject_replaced(self) -> None:
        """Check, after `take_replaced` or `find`, that all parameters are views of their buckets.

        Raises:
            ParameterReplacedError: naming a parameter whose object or data were replaced.
        """
        self._watch.reject_replaced()

    def take_replaced(self) -> None:
        """Copy the values of parameters whose data were replaced to their buckets, if possible.

        These parameters are then views of their buckets again, and count as modified. See
        `VersionWatch.put_back`.
        """
        replaced = self._watch.replaced()
        if replaced:
            # The bucket still holds the values that an open snapshot has to read.
            self.snapshot_lock.wait_until_all_free()
            self._watch.put_back({index: self._home_of(index) for index in replaced})

    def _home_of(self, index: int) -> torch.Tensor:
        bucket, position = self._places[index]
        state = self._states[bucket]
        placed = state.layout.placements[position]
        return state.flat[placed.start : placed.end]

    def has_moved(self) -> bool:
        """Return whether the shape, dtype or device of a parameter has changed."""
        return self._watch.has_moved()

    def find_unseen(self, changed: Sequence[int]) -> list[int]:
        """Return parameters that were written through `.data` or NumPy; may miss some.

        Such a write moves no version counter, but the parameter differs from its rounded master.
        The first steps compare all elements. Later steps compare a sample: it finds a write to the
        whole model, and may miss a write to a few elements.

        Args:
            changed: the result of `find`; these parameters are left out.
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
        """Return the same as `find_unseen`, after comparing all elements."""
        known = set(changed)
        found = [
            int(state.indices[position]) for state in self._states for position in differing(state)
        ]
        return sorted(set(found) - known)

    def report_unseen(self, names: Sequence[str]) -> None:
        """Compare all elements in the next steps, and warn once.

        Args:
            names: the parameters that were written, the same on all ranks.
        """
        if self._is_first:
            return  # nothing was missed: the first step compares all elements
        self._num_thorough = _STEPS_AFTER_WRITE
        if not self._has_warned and self._ranks.rank == 0:
            self._has_warned = True
            logger.warning(
                "%d parameter(s), such as %r, were modified through .data or NumPy. Their master "
                "weights were updated, but not every such modification can be found. Modify "
                "parameters under torch.no_grad() without .data, or call refresh_master() "
                "afterwards.",
                len(names),
                names[0],
            )

    def checksum(self, changed: Sequence[int]) -> int:
        """Return a checksum of these parameters; see `VersionWatch.checksum`."""
        return self._watch.checksum(changed)

    def writes_masters(self, changed: Sequence[int]) -> bool:
        """Return whether `sync` may write: some of these parameters have a master weight apart."""
        return any(not self._states[self._places[index][0]].own_master for index in changed)

    def sync(self, changed: Sequence[int]) -> None:
        """Set the masters of these parameters to the values that the user wrote."""
        if changed:
            # The snapshot's reader may still read these masters.
            self.snapshot_lock.wait_until_all_free()
        positions: dict[int, set[int]] = {}
        for index in changed:
            bucket, position = self._places[index]
            positions.setdefault(bucket, set()).add(position)
        for bucket, members in positions.items():
            sync_master(self._states[bucket], members)

    def sync_all(self) -> None:
        """Sync all masters with their parameters, after writes that moved no version counter."""
        self.snapshot_lock.note_changes([state.layout.index for state in self._states])
        self.snapshot_lock.wait_until_all_free()
        if self.kept is not None:
            self.kept.before_writing()
        for state in self._states:
            sync_master(state, range(len(state.parameters)))
        self._watch.accept_versions()

    def bump_versions(self, written: npt.NDArray[np.bool_]) -> None:
        """Bump the version counters of the parameters that the step is about to write.

        Args:
            written: (num parameters,) bool.
        """
        # The kernels and copies write to the flat bucket's memory, which bumps no counter. Autograd
        # must see these writes, to reject a backward through a graph that saved the old values.
        # It is cheapest now: `find` has just loaded the parameters into the CPU's cache.
        self._watch.count_writes(written)
        self._num_applied += 1
        self._is_first = False
        self._num_thorough = max(0, self._num_thorough - 1)

    def after_update(self, bucket: int) -> None:
        """Bump the version counters of a bucket's parameters again, after its overlapped update.

        Raises:
            UnreadyParameterError: naming a parameter that the user wrote to during the update.
        """
        positions = self._states[bucket].indices.tolist()
        self._watch.reject_written(positions)
        # A graph built between `step()` and now saved old values under the first bump's versions:
        # with this bump its backward raises autograd's error. But not if that backward is running:
        # `ForwardHooks.check` then raises an error that says more.
        if current_graph_task() == NO_GRAPH_TASK:
            self._watch.bump_again(positions)

    def lock_snapshot(self, buckets: Iterable[int]) -> None:
        """Begin a snapshot: updates of these buckets wait until its reader releases them."""
        self._watch.mark()
        for device in {state.device for state in self._states if state.device.type == "cuda"}:
            # The reader copies device buckets on another stream, which does not wait for this one.
            torch.cuda.current_stream(device).synchronize()
        self.snapshot_lock.acquire_buckets(buckets)

    def before_writing(self) -> None:
        """Prepare for writes to the state outside of a step, such as by a load."""
        self.wait_for_snapshot()
        if self.kept is not None:
            self.kept.before_writing()

    def wait_for_snapshot(self) -> None:
        """Wait until the reader has released all buckets; check for external edits before."""
        if self.snapshot_lock.is_open:
            self.find(rejects=False)
            self.snapshot_lock.wait_until_all_free()
