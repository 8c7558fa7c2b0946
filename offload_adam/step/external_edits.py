"""Find weights that were edited outside of `step()`, and sync master weights with them."""

from __future__ import annotations

import logging
import weakref
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from offload_adam.errors import ParameterReplacedError, UnreadyParameterError
from offload_adam.layout.flat import BLOCK_NUMEL
from offload_adam.params.bucket import BucketState
from offload_adam.params.elements import in_memory_order
from offload_adam.params.selection import NewParameter
from offload_adam.step.snapshot_lock import SnapshotLock
from offload_adam.torch_private import (
    NO_GRAPH_TASK,
    current_graph_task,
    registered_parameters,
    version_of,
)

logger = logging.getLogger(__name__)


Registration = tuple[dict[str, torch.nn.Parameter | None], str, torch.nn.Parameter]

_CHUNK = 256


class VersionWatch:
    """Compares every parameter's version counter and address with those after our last write.

    Sees: in-place writes under no_grad, `load_state_dict`, other optimizers, replaced storage, and,
    with a module, another object in the parameter's place. Does not see: writes through `.data` or
    NumPy, which bump no version (`ExternalEdits` compares values for those).
    Cost: two attributes of each parameter before a step, and one after it.
    """

    def __init__(self, module: torch.nn.Module | None) -> None:
        # Weakly: the model may hold the optimizer, and the executor's finalizer holds this object.
        self._module = None if module is None else weakref.ref(module)
        self._names: list[str] = []
        self._parameters: list[torch.nn.Parameter] = []
        self._addresses: list[int] = []
        self._versions: list[int] = []
        self._marked: list[int] = []
        self._registrations: list[Registration] = []

    def extend(self, names: Sequence[str], parameters: Sequence[torch.nn.Parameter]) -> None:
        """Watch further parameters, from how they are now."""
        self._names += names
        self._parameters += parameters
        self._addresses += [parameter.data_ptr() for parameter in parameters]
        self._versions += map(version_of, parameters)
        module = None if self._module is None else self._module()
        if module is not None:
            self._registrations += _registrations(module, parameters)

    def accept_versions(self) -> None:
        """Take the parameters as they are now for unchanged."""
        self._versions = list(map(version_of, self._parameters))

    def mark(self) -> None:
        """Remember the parameters as they are now, for `since_mark`."""
        self._marked = list(map(version_of, self._parameters))

    def since_mark(self, changed: Sequence[int]) -> list[int]:
        """Return those of what `changed` returned that were written to after `mark`."""
        known = len(self._marked)
        return [
            position
            for position in changed
            if position >= known or version_of(self._parameters[position]) != self._marked[position]
        ]

    def count_writes(self, written: npt.NDArray[np.bool_]) -> None:
        """Bump and accept the versions of the parameters that we are about to write.

        Args:
            written: (n,) bool, by position.
        """
        if written.all():
            parameters = self._parameters
        else:
            parameters = [self._parameters[position] for position in np.flatnonzero(written)]
        torch.autograd.graph.increment_version(parameters)
        self.accept_versions()

    def bump_again(self, positions: Sequence[int]) -> None:
        """Bump the versions of these parameters, and take them for unchanged."""
        torch.autograd.graph.increment_version([self._parameters[p] for p in positions])
        for position in positions:
            self._versions[position] = version_of(self._parameters[position])

    def changed(self) -> list[int]:
        """Return the positions of parameters written to since `accept_versions`.

        Raises:
            ParameterReplacedError: naming a parameter whose storage or object was replaced.
        """
        # A few hundred at a time, so that the second look at each finds it in the cache.
        changed: list[int] = []
        for start in range(0, len(self._parameters), _CHUNK):
            end = start + _CHUNK
            parameters = self._parameters[start:end]
            if list(map(torch.Tensor.data_ptr, parameters)) != self._addresses[start:end]:
                self._reject_replaced()
            versions = list(map(version_of, parameters))
            before = self._versions[start:end]
            if versions != before:
                changed += [start + i for i, v in enumerate(versions) if v != before[i]]
        for registry, key, parameter in self._registrations:
            if registry.get(key) is not parameter:
                self._reject(self._position(parameter), "another object took its place")
        return changed

    def reject_written(self, positions: Iterable[int]) -> None:
        """Reject writes to parameters whose update was under way: it has written over them.

        Raises:
            UnreadyParameterError: naming a parameter written to since `accept_versions`.
        """
        for position in positions:
            if version_of(self._parameters[position]) != self._versions[position]:
                raise UnreadyParameterError(
                    f"parameter {self._names[position]!r} was written to while its update was "
                    "under way, which has overwritten it: call synchronize() on the optimizer "
                    "before you change weights"
                )

    def checksum(self, positions: Sequence[int]) -> int:
        """Return a checksum below 2**53 over which parameters changed and to what, 0 for none."""
        if not positions:
            return 0
        checksum = zlib.crc32(np.asarray(positions, dtype=np.int64).tobytes())
        for position in positions:
            data = self._parameters[position].detach().cpu()
            flat = in_memory_order(data) if data.numel() else data.flatten()
            checksum = zlib.crc32(flat.view(torch.uint8).numpy().data, checksum)
        return checksum + 1

    def _position(self, parameter: torch.nn.Parameter) -> int:
        return next(i for i, known in enumerate(self._parameters) if known is parameter)

    def _reject_replaced(self) -> None:
        for position, address in enumerate(self._addresses):
            if self._parameters[position].data_ptr() != address:
                self._reject(position, "its storage was replaced")

    def _reject(self, position: int, what: str) -> None:
        raise ParameterReplacedError(
            f"parameter {self._names[position]!r} is no longer what this optimizer updates: "
            f"{what}. Move or cast the model (.to, .half) and load with assign=True before the "
            "optimizer is made, or make a new one; to change weights in place use copy_() under "
            "no_grad"
        )


def _registrations(
    module: torch.nn.Module, parameters: Sequence[torch.nn.Parameter]
) -> list[Registration]:
    """Return where the module registers these parameters; reading that later is a dict look-up."""
    wanted = {id(parameter) for parameter in parameters}
    return [
        (registered_parameters(owner), key, parameter)
        for owner in module.modules()
        for key, parameter in registered_parameters(owner).items()
        if parameter is not None and id(parameter) in wanted
    ]


_PIECE = 2**18
"""Elements at a time: loading a checkpoint ends with this, and must not copy what it has loaded."""

_SAMPLE_BLOCKS = 128
"""Blocks of a bucket in one sample: up to 0.1 ms, where the update of 16 M elements takes 19 ms."""


def sync_master(state: BucketState, positions: Collection[int]) -> None:
    """Give exactly those master elements the parameter's value whose rounding differs from it.

    So a `clamp_` moves only what it clamped, and loading the weights that were saved with the
    optimizer loses none of the master's low bits. Bits are compared, so that NaN equals itself.

    Args:
        positions: the changed parameters, by their place in the bucket.
    """
    for position, master, parameter in _segments(state):
        if position in positions:
            for part, given in _pieces(master, parameter):
                differs = _differs(part, given)
                part[differs] = given[differs].float()


def differing(state: BucketState) -> list[int]:
    """Return the positions of parameters that no longer equal their rounded masters.

    Cost: one pass over this rank's shard of parameters and masters, and a D2H copy of the
        parameters where they are on a device and the state is not.
    """
    if state.own_master or all(
        _equal(*piece) for piece in _pieces(state.planes.master_weight, state.shard)
    ):
        return []
    return [
        position
        for position, master, parameter in _segments(state)
        if any(
            # The kernels keep a NaN's payload, torch does not.
            bool((_differs(part, given) & ~(part.isnan() & given.isnan())).any())
            for part, given in _pieces(master, parameter)
        )
    ]


def sample_differs(state: BucketState, turn: int) -> bool:
    """Tell whether parameters differ from their rounded masters in blocks spread over the shard.

    A shard of less than 256 blocks is compared as a whole.

    Args:
        turn: selects the blocks; consecutive turns visit all of them.
    """
    if state.own_master:
        return False
    master, parameter = state.planes.master_weight, state.shard
    stride = parameter.numel() // BLOCK_NUMEL // _SAMPLE_BLOCKS
    if stride > 1:
        chosen = slice(turn % stride, None, stride)
        master = master.view(-1, BLOCK_NUMEL)[chosen]
        parameter = parameter.view(-1, BLOCK_NUMEL)[chosen]
    return not _equal(master, parameter.to(master.device))


def _segments(state: BucketState) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yield position, master weights and elements of each parameter in this rank's shard."""
    if state.own_master:
        return
    for segment in state.segments.each:
        yield segment.position, segment.of(state.planes.master_weight), segment.of(state.shard)


def _pieces(
    master: torch.Tensor, parameter: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield both a piece at a time, the parameter's on the master's device."""
    for part, given in zip(master.split(_PIECE), parameter.split(_PIECE), strict=True):
        # From a device, the host waits here for the stream that waits for the last step's H2D
        # copies: none of them reads the master when it is written.
        yield part, given.to(part.device)


def _equal(master: torch.Tensor, parameter: torch.Tensor) -> bool:
    return torch.equal(_bits(master.to(parameter.dtype)), _bits(parameter))


def _differs(master: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    return _bits(master.to(parameter.dtype)) != _bits(parameter)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


_FIRST_STEPS = 2
"""Steps that compare everything at first: weights may have been written before the first of them,
and a loop that writes after every step shows in the second."""

_STEPS_AFTER_WRITE = 10
"""Steps that compare everything after a write that was found: another one may be smaller."""

_SAMPLED_BUCKETS = 32
"""Buckets that one step samples at most, in turns: this bounds the time whatever the model."""


class ExternalEdits:
    """Tells the step which parameters were written to, and a checkpoint being written what it lost.

    Parameters are meant by their index over all of the optimizer.

    Owns: the version watch.

    Args:
        module: where parameters are registered, to notice another object in their place.
        states: all buckets; grows with the optimizer.
        places: the bucket of each parameter and its position there; grows with the optimizer.
        snapshot_lock: keeps updates off what a checkpoint still reads.
    """

    def __init__(
        self,
        module: torch.nn.Module | None,
        states: Sequence[BucketState],
        places: Sequence[tuple[int, int]],
        snapshot_lock: SnapshotLock,
    ) -> None:
        self.snapshot_lock = snapshot_lock
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
        """Return the parameters written to since the last step, and tell the snapshot lock of them.

        Raises:
            ParameterReplacedError: naming a parameter whose storage or object was replaced.
        """
        changed = self._watch.changed()
        if self.snapshot_lock.is_open:
            since = self._watch.since_mark(changed)
            self.snapshot_lock.note_changes({self._places[index][0] for index in since})
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

    def sync(self, changed: Sequence[int]) -> None:
        """Let the masters follow these parameters, once nobody reads them any more."""
        if changed:
            self.snapshot_lock.wait_until_all_free()
        positions: dict[int, set[int]] = {}
        for index in changed:
            bucket, position = self._places[index]
            positions.setdefault(bucket, set()).add(position)
        for bucket, members in positions.items():
            sync_master(self._states[bucket], members)

    def sync_all(self) -> None:
        """Let every master follow its parameter, for writes that no version counter saw."""
        self.snapshot_lock.note_changes([state.layout.index for state in self._states])
        self.snapshot_lock.wait_until_all_free()
        for state in self._states:
            sync_master(state, range(len(state.parameters)))
        self._watch.accept_versions()

    def bump_versions(self, written: npt.NDArray[np.bool_]) -> None:
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

        A graph that read the old values after `step()` then fails autograd's version check. A
        backward that is running already is left alone: `ForwardHooks.check` looks at its gradients,
        and that error says more.

        Raises:
            UnreadyParameterError: naming a parameter that was written to in the meantime.
        """
        positions = self._states[bucket].indices.tolist()
        self._watch.reject_written(positions)
        if current_graph_task() == NO_GRAPH_TASK:
            self._watch.bump_again(positions)

    def lock_snapshot(self, buckets: Iterable[int]) -> None:
        """Begin a snapshot: updates of these buckets wait until its reader releases them."""
        self._watch.mark()
        for device in {state.device for state in self._states if state.device.type == "cuda"}:
            # The reader copies device buckets on a stream of its own.
            torch.cuda.current_stream(device).synchronize()
        self.snapshot_lock.acquire_buckets(buckets)

    def wait_for_snapshot(self) -> None:
        """Wait until the reader has released all buckets; note external edits up to then."""
        if self.snapshot_lock.is_open:
            self.find()
            self.snapshot_lock.wait_until_all_free()
