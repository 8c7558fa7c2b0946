"""Notice weights that were changed, or replaced, behind the optimizer's back."""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from offload_adam.errors import ParameterReplacedError, UnreadyParameterError
from offload_adam.torch_private import registered_parameters, version_of

Registration = tuple[dict[str, torch.nn.Parameter | None], str, torch.nn.Parameter]

_CHUNK = 256


class VersionWatch:
    """Compares every parameter's version counter and address with those after our last write.

    Sees: in-place writes under no_grad, `load_state_dict`, other optimizers, replaced storage, and,
    with a module, another object in the parameter's place. Does not see: writes through `.data` or
    NumPy, which bump no version (`OutsideWrites` compares values for those).
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

    def settle(self) -> None:
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
        """Bump the versions of the parameters that we are about to write, and settle.

        Args:
            written: (n,) bool, by position.
        """
        if written.all():
            parameters = self._parameters
        else:
            parameters = [self._parameters[position] for position in np.flatnonzero(written)]
        torch.autograd.graph.increment_version(parameters)
        self.settle()

    def recount(self, positions: Sequence[int]) -> None:
        """Bump the versions of these parameters, and take them for unchanged."""
        torch.autograd.graph.increment_version([self._parameters[p] for p in positions])
        for position in positions:
            self._versions[position] = version_of(self._parameters[position])

    def changed(self) -> list[int]:
        """Return the positions of parameters written to since `settle`.

        Raises:
            ParameterReplacedError: naming a parameter whose storage or object was replaced.
        """
        # A few hundred at a time, so that the second look at each finds it in the cache.
        changed: list[int] = []
        for start in range(0, len(self._parameters), _CHUNK):
            end = start + _CHUNK
            parameters = self._parameters[start:end]
            if list(map(torch.Tensor.data_ptr, parameters)) != self._addresses[start:end]:
                self._refuse_replaced()
            versions = list(map(version_of, parameters))
            before = self._versions[start:end]
            if versions != before:
                changed += [start + i for i, v in enumerate(versions) if v != before[i]]
        for registry, key, parameter in self._registrations:
            if registry.get(key) is not parameter:
                self._refuse(self._position(parameter), "another object took its place")
        return changed

    def refuse_written(self, positions: Iterable[int]) -> None:
        """Refuse writes to parameters whose update was under way: it has written over them.

        Raises:
            UnreadyParameterError: naming a parameter written to since `settle`.
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
            flat = data.as_strided((data.numel(),), (1,)) if data.numel() else data.flatten()
            checksum = zlib.crc32(flat.view(torch.uint8).numpy().data, checksum)
        return checksum + 1

    def _position(self, parameter: torch.nn.Parameter) -> int:
        return next(i for i, known in enumerate(self._parameters) if known is parameter)

    def _refuse_replaced(self) -> None:
        for position, address in enumerate(self._addresses):
            if self._parameters[position].data_ptr() != address:
                self._refuse(position, "its storage was replaced")

    def _refuse(self, position: int, what: str) -> None:
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
