"""Every name of Numba that this package uses and that Numba does not document.

Such a name may change with any minor version, hence the upper bound on `numba` in pyproject.toml.
`tests/unit/test_kernel_numba_private.py` checks each; it passed with Numba 0.68.1 and llvmlite
0.50.0. To raise the bound, run all `tests/unit/test_kernel_*.py` with the new version.

`llvmlite.ir` and `numba.{njit,prange,carray,types,extending}` are documented and used directly.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from numba.core import cgutils

alloca_once = cgutils.alloca_once
"""Allocate a stack slot in the function's entry block.

Checked with 0.68.1. If it is missing, importing a kernel raises AttributeError.
"""

alloca_once_value = cgutils.alloca_once_value
"""Allocate a stack slot in the function's entry block, and store a value in it.

Checked with 0.68.1. If it is missing, importing a kernel raises AttributeError.
"""

for_range_slice = cgutils.for_range_slice
"""Emit a loop over range(start, stop, step); a context manager that yields the index.

Checked with 0.68.1. If it is missing, importing a kernel raises AttributeError.
"""

get_or_insert_function = cgutils.get_or_insert_function
"""Declare an LLVM function in a module, once.

Checked with 0.68.1. If it is missing, importing a kernel raises AttributeError.
"""


def array_struct(context: Any, builder: Any, kind: Any, value: Any) -> Any:
    """Return the fields of an array argument as LLVM values; `data` and `nitems` are used.

    Checked with 0.68.1. If `make_array` is missing, compiling any kernel raises AttributeError.
    """
    return context.make_array(kind)(context, builder, value)


def llvm_type(context: Any, kind: Any) -> Any:
    """Return the LLVM type that values of a Numba type have.

    Checked with 0.68.1. If `get_value_type` is missing, compiling any kernel raises AttributeError.
    """
    return context.get_value_type(kind)


def no_value(context: Any) -> Any:
    """Return the value that the code generator of a void intrinsic must return.

    Checked with 0.68.1. If `get_dummy_value` is missing, compiling the update raises
    AttributeError.
    """
    return context.get_dummy_value()


def compile_signature(dispatcher: Any, signature: tuple[Any, ...]) -> None:
    """Compile one specialisation, or load it from the disk cache.

    Checked with 0.68.1. If `compile` is missing, constructing an optimizer raises AttributeError.
    """
    dispatcher.compile(signature)


def is_compiled(dispatcher: Any, signature: tuple[Any, ...]) -> bool:
    """Return whether this process has compiled or loaded the specialisation.

    Checked with 0.68.1. If `overloads` is missing, constructing an optimizer raises AttributeError.
    """
    return signature in dispatcher.overloads


def cache_folder(dispatcher: Any) -> Path | None:
    """Return the folder of a kernel's disk cache, or None for a kernel without one.

    Checked with 0.68.1. If `stats.cache_path` is missing, constructing an optimizer raises
    AttributeError.
    """
    folder = dispatcher.stats.cache_path
    return None if folder is None else Path(folder)


def disable_cache(dispatcher: Any) -> None:
    """Stop using a kernel's disk cache in this process.

    Checked with 0.68.1. If `_cache.disable` is missing, a full disk stops the construction of an
    optimizer with AttributeError; otherwise this function is not called.
    """
    dispatcher._cache.disable()
