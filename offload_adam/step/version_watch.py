"""Find parameters that were written in place, or whose data or object were replaced."""

from __future__ import annotations

import logging
import weakref
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from offload_adam.errors import ParameterReplacedError, UnreadyParameterError
from offload_adam.fsdp_private import FsdpParameter, is_dtensor, local_of
from offload_adam.params.elements import as_integers, in_memory_order, with_own_storage
from offload_adam.params.selection import NewParameter, reject_overlaps
from offload_adam.torch_private import (
    StorageWeakRef,
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

    A DTensor is watched by its local tensor, which it must keep. Its version is the sum of its own
    counter, which operations on the DTensor bump, and that of the local tensor.

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
        self._has_parts = False  # some parameters are DTensors
        self._differ: set[int] = set()  # positions of those that differ between ranks
        self._records: dict[int, FsdpParameter] = {}  # by position

    def extend(self, new: Sequence[NewParameter]) -> None:
        """Watch more parameters; their present values count as unmodified."""
        first = len(self._parameters)
        parameters = [item.parameter for item in new]
        tensors = [item.local for item in new]
        self._names += [item.name for item in new]
        self._parameters += parameters
        self._has_parts |= any(map(is_dtensor, parameters))
        for position, item in enumerate(new, first):
            if not item.is_the_same_on_all_ranks:
                self._differ.add(position)
            if item.shard is not None and item.shard.record is not None:
                self._records[position] = item.shard.record
        self._addresses += map(torch.Tensor.data_ptr, tensors)
        self._strides += map(torch.Tensor.stride, tensors)
        self._numels += map(torch.Tensor.numel, tensors)
        self._forms += map(_form_of, parameters)
        self._storages += [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors]
        self._versions += self._versions_of(parameters)
        module = None if self._module is None else self._module()
        if module is not None:
            # A module of FSDP2 shows other objects while it is gathered.
            own = [
                p for position, p in enumerate(parameters, first) if position not in self._records
            ]
            self._registrations += _registrations(module, own)

    def _tensors(self, parameters: Sequence[torch.nn.Parameter]) -> Sequence[torch.Tensor]:
        """Return the tensors that hold the elements of parameters on this rank."""
        return list(map(local_of, parameters)) if self._has_parts else parameters

    def _versions_of(self, parameters: Sequence[torch.nn.Parameter]) -> list[int]:
        versions = list(map(version_of, parameters))
        if self._has_parts:
            local = map(version_of, self._tensors(parameters))
            versions = [own + inner for own, inner in zip(versions, local, strict=True)]
        return versions

    def _bump(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        torch.autograd.graph.increment_version(parameters)
        if self._has_parts:
            torch.autograd.graph.increment_version(self._tensors(parameters))

    def accept_versions(self) -> None:
        """Treat the present values of all parameters as unmodified."""
        self._versions = self._versions_of(self._parameters)

    def mark(self) -> None:
        """Remember the present version counters, for `since_mark`."""
        self._marked = self._versions_of(self._parameters)

    def since_mark(self, changed: Sequence[int]) -> list[int]:
        """Return the positions in `changed` of parameters that were written to after `mark`."""
        known = len(self._marked)
        return [
            position
            for position in changed
            if position >= known or self._version_at(position) != self._marked[position]
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
        self._bump(parameters)
        self.accept_versions()

    def bump_again(self, positions: Sequence[int]) -> None:
        """Bump the version counters of these parameters once more, and accept them."""
        self._bump([self._parameters[p] for p in positions])
        for position in positions:
            self._versions[position] = self._version_at(position)

    def _version_at(self, position: int) -> int:
        return self._versions_of(self._parameters[position : position + 1])[0]

    def replaced(self) -> list[int]:
        """Return the positions of parameters whose data were replaced."""
        if self._are_in_place(0, len(self._parameters)):
            self._raced.clear()
            return []
        return [p for p in range(len(self._parameters)) if not self._are_in_place(p, p + 1)]

    def _are_in_place(self, start: int, end: int) -> bool:
        # The strides, too, because of `weight.data = weight.data.t()`.
        tensors = self._tensors(self._parameters[start:end])
        return (
            list(map(torch.Tensor.data_ptr, tensors)) == self._addresses[start:end]
            and list(map(torch.Tensor.stride, tensors)) == self._strides[start:end]
            and list(map(torch.Tensor.numel, tensors)) == self._numels[start:end]
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
            if self._is_held(position):
                # With the strides of its place, by which checkpoints read it.
                fits = data.stride() == view.stride()
                parameter.data = data if fits else torch.empty_like(view).copy_(data)
                continue
            self._storages[position] = StorageWeakRef(parameter.untyped_storage())
            if data.device.type == "cpu" and data.is_shared():
                logger.warning(
                    "Parameter %r was moved to shared memory, where other processes will not see "
                    "its updates: the optimizer has moved it back to its bucket. Send the weights "
                    "after each step instead.",
                    self._names[position],
                )
            ordered = torch.empty_like(view).copy_(data)
            if not torch.equal(as_integers(ordered), as_integers(view)):
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
        if is_dtensor(self._parameters[position]):
            return False
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
            versions = self._versions_of(self._parameters[start:end])
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
            if now == form and not self._fits(position):
                self._reject(position, "its local tensor was replaced by another one")
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
        for position, record in self._records.items():
            if record.sharded is not None and record.sharded is not self._parameters[position]:
                self._reject(position, "FSDP2 has another parameter in its place")
            if not record.is_gathered_from_local:
                self._reject(position, "FSDP2 gathers it from other memory")
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
            if self._version_at(position) != self._versions[position]:
                raise self._unready(position)
            if local_of(parameter).data_ptr() != self._addresses[position]:
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

        It is below 2**53, so that float64 holds it exactly in the agreement. Values that differ
        between ranks anyway, those of shards, are left out.
        """
        if not positions:
            return 0
        checksum = zlib.crc32(np.asarray(positions, dtype=np.int64).tobytes())
        for position in positions:
            if position in self._differ:
                continue
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
    # Without the class Parameter, but still with a tensor subclass.
    data = local_of(parameter) if is_dtensor(parameter) else parameter.data
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
