"""Trace one forward, to see where every parameter is read for the first time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_METADATA = (
    "dtype", "device", "shape", "ndim", "layout", "requires_grad", "grad", "grad_fn", "is_leaf",
    "is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized", "is_nested", "itemsize", "nbytes",
    "_version", "names", "output_nr", "retains_grad",
)  # fmt: skip
_QUESTIONS = (
    "size", "dim", "numel", "nelement", "stride", "storage_offset", "data_ptr", "element_size",
    "is_contiguous", "is_floating_point", "is_complex", "get_device", "ndimension", "__len__",
    "__hash__",
)  # fmt: skip


def _harmless() -> set[Any]:
    """Return the functions that read no element of their arguments."""
    getters = (getattr(torch.Tensor, name, None) for name in _METADATA)
    found: set[Any] = {getter.__get__ for getter in getters if getter is not None}
    questions = (getattr(torch.Tensor, name, None) for name in _QUESTIONS)
    return found | {question for question in questions if question is not None}


class FirstUse(TorchFunctionMode):
    """Calls back when a function of torch is given a parameter, before the function runs.

    Cost: about 1.5 us a function; it is on for one forward.
    """

    def __init__(
        self, parameters: Iterable[torch.nn.Parameter], seen: Callable[[int], None]
    ) -> None:
        """Watch these parameters.

        Args:
            seen: is given the id of the parameter.
        """
        super().__init__()
        self._ids = {id(parameter) for parameter in parameters}
        self._seen = seen
        self._harmless = _harmless()

    def begin(self) -> None:
        """Be on, until `end`, for the calling thread."""
        self.__enter__()  # type: ignore[no-untyped-call]

    def end(self) -> None:
        """Be off."""
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Look at the arguments, and call the function."""
        kwargs = kwargs or {}
        # What is being compiled would be compiled with this very look into it.
        if not torch.compiler.is_compiling() and func not in self._harmless:
            self._look(args)
            self._look(kwargs.values())
        return func(*args, **kwargs)

    def _look(self, values: Iterable[Any]) -> None:
        for value in values:
            if isinstance(value, (list, tuple)):
                self._look(value)
            elif id(value) in self._ids:
                self._seen(id(value))
