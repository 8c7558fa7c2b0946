"""Find parameters that the user modified outside of `step()`, and sync master weights with them."""

from __future__ import annotations

import logging
import weakref
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from offload_adam.coordinator.ranks import RankGroup
from offload_adam.errors import ParameterReplacedError, UnreadyParameterError
from offload_adam.layout.flat import BLOCK_NUMEL
from offload_adam.params.bucket import BucketState
from offload_adam.params.elements import in_memory_order, with_own_storage
from offload_adam.params.selection import NewParameter, reject_overlaps
from offload_adam.step.snapshot_lock import SnapshotLock
from offload_adam.torch_private import (
    NO_GRAPH_TASK,
    StorageWeakRef,
    current_graph_task,
    live_storage,
    registered_parameters,
    version_of,
)

logger = logging.getLogger(__name__)


Registration = tuple[dict[str, torch.nn.Parameter | None], str, torch.nn.Parameter]

_CHUNK = 256


class VersionWatch:
    """Compares each parameter's version counter and place with those after the last update.

    Finds in-place writes under no_grad, `load_state_dict`, writes of other optimizers, and replaced
    data. With a module, also finds another object in the parameter's place. Does not find writes
    through `.data` or NumPy, which bump no version counter: `ExternalEdits` finds those by value.

    Replaced data are what `parameter.data = x`, `module.to()` and `share_memory()` leave. If the
    new values fit, `put_back` copies them to the parameter's place in its bucket. This overwrites
    the data from before. So it does not happen while something else refers to these: loops that
    swap averaged weights in (`backup = parameter.data`) put them back later.

    Cost: reads four attributes of each parameter before a step, and one after it.
    """

    def __init__(self, module: torch.nn.Module | None) -> None:
        # A weak reference: the executor's finalizer holds this object, and the model may hold the
        # optimizer. A strong one would keep both alive for ever.
        self._module = None if module is None else weakref.ref(module)
        self._names: list[str] = []
        self._parameters: list[torch.nn.Parameter] = []
        # A parameter is in its place if its address, strides and size are these. They follow from
        # the place and `_forms`, and are here because each step compares those of all parameters.
        self._addresses: list[int] = []
        self._strides: list[tuple[int, ...]] = []
        self._numels: list[int] = []
        self._forms: list[_Form] = []
        self._storages: list[StorageWeakRef] = []
        self._raced: set[int] = set()  # their data were replaced while their update ran
        self._versions: list[int] = []
        self._marked: list[int] = []
        self._registrations: list[Registration] = []

    def extend(self, names: Sequence[str], parameters: Sequence[torch.nn.Parameter]) -> None:
        """Watch more parameters; their present values count as unmodified."""
        self._names += names
        self._parameters += parameters
        self._addresses += map(torch.Tensor.data_ptr, parameters)
        self._strides += map(torch.Tensor.stride, parameters)
        self._numels += map(torch.Tensor.numel, parameters)
        self._forms += map(_form_of, parameters)
        self._storages += [StorageWeakRef(p.untyped_storage()) for p in parameters]
        self._versions += map(version_of, parameters)
        module = None if self._module is None else self._module()
        if module is not None:
            self._registrations += _registrations(module, parameters)

    def accept_versions(self) -> None:
        """Treat the present values of all parameters as unmodified."""
        self._versions = list(map(version_of, self._parameters))

    def mark(self) -> None:
        """Remember the present version counters, for `since_mark`."""
        self._marked = list(map(version_of, self._parameters))

    def since_mark(self, changed: Sequence[int]) -> list[int]:
        """Return the positions in `changed` of parameters that were written to after `mark`."""
        known = len(self._marked)
        return [
            position
            for position in changed
            if position >= known or version_of(self._parameters[position]) != self._marked[position]
        ]

    def count_writes(self, written: npt.NDArray[np.bool_]) -> None:
        """Bump the version counters of parameters that the update will write, and accept them.

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
        """Bump the version counters of these parameters once more, and accept them."""
        torch.autograd.graph.increment_version([self._parameters[p] for p in positions])
        for position in positions:
            self._versions[position] = version_of(self._parameters[position])

    def replaced(self) -> list[int]:
        """Return the positions of parameters whose data were replaced."""
        if self._are_in_place(0, len(self._parameters)):
            self._raced.clear()
            return []
        return [p for p in range(len(self._parameters)) if not self._are_in_place(p, p + 1)]

    def _are_in_place(self, start: int, end: int) -> bool:
        # The strides, too, because of `weight.data = weight.data.t()`.
        parameters = self._parameters[start:end]
        return (
            list(map(torch.Tensor.data_ptr, parameters)) == self._addresses[start:end]
            and list(map(torch.Tensor.stride, parameters)) == self._strides[start:end]
            and list(map(torch.Tensor.numel, parameters)) == self._numels[start:end]
        )

    def has_moved(self) -> bool:
        """Return whether a parameter now has another shape, dtype or device."""
        return any(not self._fits(position) for position in self.replaced())

    def put_back(self, homes: Mapping[int, torch.Tensor]) -> None:
        """Copy replaced parameters' values to their buckets, and make them views of these again.

        These parameters then count as written to, unless the values are the same: one rank alone
        may move its model to the host and back, to save it.

        A parameter stays as it is if its values do not fit, because of another shape, dtype or
        device; or if something else still refers to its data from before.

        Args:
            homes: (numel,) each, the elements in the bucket of each position in `replaced`.

        Raises:
            UnreadyParameterError: the data were replaced while the parameter's update was running,
                so the new values may be older than the update.
            ValueError: two parameters overlap in memory. The optimizer cannot tie them.
        """
        fitting = [position for position in homes if self._fits(position)]
        for position in fitting:
            if position in self._raced:
                raise self._unready(position)
        known = set(range(len(self._parameters))).difference(homes).union(fitting)
        reject_overlaps((self._names[position], self._parameters[position]) for position in known)
        addresses = set(self._addresses)
        given = {position: self._given(position, addresses) for position in fitting}
        for position in fitting:
            form = self._forms[position]
            view = with_own_storage(homes[position]).as_strided(form.shape, form.strides)
            self._parameters[position].data = view
        for position, data in given.items():
            parameter = self._parameters[position]
            view = parameter.data
            ordered = torch.empty_like(view).copy_(data)
            if self._is_held(position):
                # With the strides of its place, by which checkpoints read it.
                parameter.data = data if data.stride() == view.stride() else ordered
                continue
            self._storages[position] = StorageWeakRef(parameter.untyped_storage())
            if data.device.type == "cpu" and data.is_shared():
                logger.warning(
                    "Parameter %r was moved to shared memory, where other processes will not see "
                    "its updates: the optimizer has moved it back to its bucket. Send the weights "
                    "after each step instead.",
                    self._names[position],
                )
            if not torch.equal(_bits(ordered), _bits(view)):
                view.copy_(ordered)
                self._versions[position] = -1  # no counter has this value

    def _given(self, position: int, addresses: Collection[int]) -> torch.Tensor:
        """Return a parameter's replaced data, as a copy if they are a view of a place in a bucket.

        For example, two parameters may have exchanged their data.
        """
        data = self._parameters[position].data
        return data.clone() if data.untyped_storage().data_ptr() in addresses else data

    def _is_held(self, position: int) -> bool:
        """Return whether something refers to the data that a replaced parameter had before."""
        storage = live_storage(self._storages[position])
        # `share_memory()` moves a storage: it no longer is in the bucket.
        return storage is not None and storage.data_ptr() == self._addresses[position]

    def _fits(self, position: int) -> bool:
        now, form = _form_of(self._parameters[position]), self._forms[position]
        return now._replace(strides=form.strides) == form

    def changed(self, take_replaced: Callable[[], None], *, rejects: bool) -> list[int]:
        """Return the positions of parameters written to since `accept_versions`.

        Args:
            take_replaced: calls `put_back` for the parameters whose data were replaced.
            rejects: then check that all are in their places, as `reject_replaced`.
        """
        # 256 at a time, so that the parameters are still in the CPU's cache for the second pass.
        changed: list[int] = []
        for start in range(0, len(self._parameters), _CHUNK):
            end = start + _CHUNK
            if not self._are_in_place(start, end):
                take_replaced()
                if rejects:
                    self._reject_data()
            versions = list(map(version_of, self._parameters[start:end]))
            before = self._versions[start:end]
            if versions != before:
                changed += [start + i for i, v in enumerate(versions) if v != before[i]]
        if rejects:
            self._reject_objects()
        self._raced.clear()
        return changed

    def reject_replaced(self) -> None:
        """Check that all parameters are in their places.

        Raises:
            ParameterReplacedError: naming a parameter whose data or object was replaced.
        """
        self._reject_data()
        self._reject_objects()

    def _reject_data(self) -> None:
        for position in self.replaced():
            now, form = _form_of(self._parameters[position]), self._forms[position]
            if not self._fits(position):
                self._reject(position, f"its data are {now} by now, not {form}")
            raise ParameterReplacedError(
                f"Parameter {self._names[position]!r} was given other data, while its data from "
                "before are still in use, and an update would overwrite them. They are in a backup "
                "that is no copy (of parameter.data, detach(), numpy() or state_dict()), or in the "
                "graph of a forward that had no backward. Put them back or drop them first, or "
                "let the backup be a clone()."
            )

    def _reject_objects(self) -> None:
        for registry, key, parameter in self._registrations:
            if registry.get(key) is not parameter:
                self._find_again()
                break

    def _find_again(self) -> None:
        """Look for the parameters under other names, such as those of torch.nn.utils.prune."""
        module = None if self._module is None else self._module()
        assert module is not None, "it has registered the parameters"
        found = _registrations(module, self._parameters)
        still = {id(parameter) for _, _, parameter in found}
        for _, _, parameter in self._registrations:
            if id(parameter) not in still:
                self._reject(self._position(parameter), "another object took its place")
        self._registrations = found

    def reject_written(self, positions: Iterable[int]) -> None:
        """Raise an error if the user wrote to a parameter during its update, which overwrote it.

        Raises:
            UnreadyParameterError: naming a parameter written to since `accept_versions`.
        """
        for position in positions:
            parameter = self._parameters[position]
            if version_of(parameter) != self._versions[position]:
                raise self._unready(position)
            if parameter.data_ptr() != self._addresses[position]:
                # No error yet: a caller that swaps in averaged weights puts the data back later.
                self._raced.add(position)

    def _unready(self, position: int) -> UnreadyParameterError:
        return UnreadyParameterError(
            f"Parameter {self._names[position]!r} was modified while its update was running, so "
            "the modification or the update is lost. Call synchronize() on the optimizer before "
            "you modify weights."
        )

    def checksum(self, positions: Sequence[int]) -> int:
        """Return a checksum of these positions and their parameters' values, 0 if there are none.

        It is below 2**53, so that float64 holds it exactly in the agreement.
        """
        if not positions:
            return 0
        checksum = zlib.crc32(np.asarray(positions, dtype=np.int64).tobytes())
        for position in positions:
            data = self._parameters[position].detach().cpu()
            flat = in_memory_order(data) if data.numel() else data.flatten()
            checksum = zlib.crc32(flat.view(torch.uint8).numpy().data, checksum)
        return checksum + 1  # 0 is for no positions

    def _position(self, parameter: torch.nn.Parameter) -> int:
        return next(i for i, known in enumerate(self._parameters) if known is parameter)

    def _reject(self, position: int, what: str) -> None:
        raise ParameterReplacedError(
            f"Parameter {self._names[position]!r} is no longer the tensor that this optimizer "
            f"updates: {what}. Move or cast the model (.to, .half) before the first step, load "
            "with assign=True before you construct the optimizer, or construct a new one."
        )


class _Form(NamedTuple):
    """The properties of a parameter's data that its place in a bucket depends on."""

    kind: type[torch.Tensor]
    layout: torch.layout
    dtype: torch.dtype
    device: torch.device
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def __str__(self) -> str:
        kind = "" if self.kind is torch.Tensor else f"{self.kind.__name__} of "
        return f"{kind}{self.dtype} {list(self.shape)} on {self.device}"


def _form_of(parameter: torch.nn.Parameter) -> _Form:
    data = parameter.data  # without the class Parameter, but still with a tensor subclass
    strides = data.stride() if data.layout is torch.strided else ()
    return _Form(type(data), data.layout, data.dtype, data.device, tuple(data.shape), strides)


def _registrations(
    module: torch.nn.Module, parameters: Sequence[torch.nn.Parameter]
) -> list[Registration]:
    """Return where the module registers these parameters: dict, key and parameter of each."""
    wanted = {id(parameter) for parameter in parameters}
    return [
        (registered_parameters(owner), key, parameter)
        for owner in module.modules()
        for key, parameter in registered_parameters(owner).items()
        if parameter is not None and id(parameter) in wanted
    ]


_PIECE = 2**18
"""Elements that are compared at a time, so that comparing all parameters, as after a load, needs
no memory for a copy of them."""

_SAMPLE_BLOCKS = 128
"""A sample has this many blocks of a bucket, or up to twice as many.

Comparing them takes at most 0.1 ms; for comparison, the update of 16 M elements takes 19 ms.
"""


def sync_master(state: BucketState, positions: Collection[int]) -> None:
    """Set each master element to its parameter element, unless it already rounds to this element.

    Master elements that do so keep their low bits. After a `clamp_`, these are the elements that
    were not clamped; after loading the weights that were saved with the optimizer, all elements.

    Args:
        positions: of the modified parameters in the bucket.
    """
    for position, master, parameter in _segments(state):
        if position in positions:
            for part, given in _pieces(master, parameter):
                differs = _differs(part, given)
                part[differs] = given[differs].float()


def differing(state: BucketState) -> list[int]:
    """Return the positions of parameters that no longer equal their rounded masters.

    Cost: reads this rank's shard of parameters and masters once, and copies the parameters from the
        device if the state is on the host.
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
    """Return whether a sample of blocks, spread over the shard, differs from its rounded masters.

    A shard of fewer than 256 blocks is compared as a whole.

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
    """Yield pieces of both tensors, those of the parameter on the master's device."""
    for part, given in zip(master.split(_PIECE), parameter.split(_PIECE), strict=True):
        # The copy from a device waits for the current stream, which waits for the last step's H2D
        # copies. So none of them still reads the master when the caller writes it.
        yield part, given.to(part.device)


def _equal(master: torch.Tensor, parameter: torch.Tensor) -> bool:
    return torch.equal(_bits(master.to(parameter.dtype)), _bits(parameter))


def _differs(master: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    return _bits(master.to(parameter.dtype)) != _bits(parameter)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    # Bits, not values, are compared: NaN equals itself then, and -0 differs from 0.
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


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
        self._watch.extend([item.name for item in new], [item.parameter for item in new])
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

    def wait_for_snapshot(self) -> None:
        """Wait until the reader has released all buckets; check for external edits before."""
        if self.snapshot_lock.is_open:
            self.find(rejects=False)
            self.snapshot_lock.wait_until_all_free()
