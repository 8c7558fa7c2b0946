"""Counts the operations that torch runs in a block of code: on a GPU, each launches kernels."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Views run no kernel.
_VIEWS = {"slice", "split", "split_with_sizes", "view", "as_strided", "detach", "alias", "select"}


class Dispatched(TorchDispatchMode):
    """Counts operations, the bytes of their tensors, and the elements of the largest new tensor.

    Attributes:
        names: operations other than views and allocations, by name without "aten.".
        nbytes: bytes of all tensors that these operations read, plus those of all that they write.
        largest_numel: of the largest tensor from `torch.empty`.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: Counter[str] = Counter()
        self.nbytes = 0
        self.largest_numel = 0

    @property
    def num_waits(self) -> int:
        """How often the host read a value, and would have waited for a device."""
        return self.names["_local_scalar_dense"]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        found = function(*args, **(kwargs or {}))
        name = function.__name__.split(".")[0]
        if name in _VIEWS:
            return found
        if name == "empty":
            self.largest_numel = max(self.largest_numel, found.numel())
            return found
        self.names[name] += 1
        schema = function._schema
        # A copy does not read its target.
        self.nbytes += nbytes_of(args[1:] if "copy_" in name else args) + nbytes_of(kwargs)
        written = [args[i] for i, one in enumerate(schema.arguments) if _is_written(one, args, i)]
        self.nbytes += nbytes_of(written) if written else nbytes_of(found)
        return found


def _is_written(argument: Any, args: Any, index: int) -> bool:
    # Fused optimizers write gradients only if they have a `grad_scale`.
    is_mutable = argument.alias_info is not None and argument.alias_info.is_write
    return is_mutable and index < len(args) and argument.name != "grads"


def nbytes_of(values: Any) -> int:
    """Return the bytes of all tensors in nested values."""
    return sum(one.nbytes for one in tree_leaves(values) if isinstance(one, torch.Tensor))
