"""Numba's undocumented names do what `kernels.numba_private` says, and no other file uses them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

import offload_adam
from offload_adam.kernels import numba_private
from offload_adam.kernels.compilation import jit_inlined

SIGNATURE = (types.float64,)


@intrinsic  # type: ignore[untyped-decorator]
def sum_of_roots(typingctx: Any, array: Any) -> Any:
    """Return the sum of the square roots of a float64 array."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        double, index = ir.DoubleType(), ir.IntType(64)
        assert numba_private.llvm_type(context, types.float64) == double
        values = numba_private.array_struct(context, builder, array, arguments[0])
        kind = ir.FunctionType(double, [double])
        root = numba_private.get_or_insert_function(builder.module, kind, "llvm.sqrt.f64")
        same = numba_private.get_or_insert_function(builder.module, kind, "llvm.sqrt.f64")
        assert root is same
        total = numba_private.alloca_once_value(builder, ir.Constant(double, 0.0))
        zero, one = ir.Constant(index, 0), ir.Constant(index, 1)
        with numba_private.for_range_slice(builder, zero, values.nitems, one, index) as (i, _):
            value = builder.load(builder.gep(values.data, [i]))
            added = builder.fadd(builder.load(total), builder.call(root, [value]))
            builder.store(added, total)
        return builder.load(total)

    return types.float64(array), codegen


@intrinsic  # type: ignore[untyped-decorator]
def nothing(typingctx: Any) -> Any:
    """Return nothing."""
    return types.void(), lambda context, *_: numba_private.no_value(context)


def test_the_names_of_code_generation_work() -> None:
    def both(array: Any) -> Any:
        nothing()
        return sum_of_roots(array)

    assert jit_inlined(both)(np.array([1.0, 4.0, 9.0])) == 6.0


def test_a_specialisation_is_compiled_once_and_known() -> None:
    kernel = jit_inlined(lambda value: value * 2)
    assert not numba_private.is_compiled(kernel, SIGNATURE)
    numba_private.compile_signature(kernel, SIGNATURE)
    assert numba_private.is_compiled(kernel, SIGNATURE)
    assert not numba_private.is_compiled(kernel, (types.float32,))


def test_a_kernel_knows_its_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def double(value: Any) -> Any:
        return value * 2

    assert numba_private.cache_folder(numba.njit(double)) is None
    monkeypatch.setattr("numba.core.config.CACHE_DIR", str(tmp_path))
    kernel = numba.njit(double, cache=True)
    folder = numba_private.cache_folder(kernel)
    assert folder is not None
    assert folder.is_relative_to(tmp_path)
    numba_private.disable_cache(kernel)
    numba_private.compile_signature(kernel, SIGNATURE)
    assert not list(tmp_path.rglob("*.nbc"))


PRIVATE = re.compile(
    r"numba\.core|from numba import core|\bcgutils\.|\._cache\b|\.overloads\b|\.stats\b"
    r"|\bcontext\.\w|\bdispatcher\.compile\b"
)


def test_no_other_module_uses_private_names() -> None:
    package = Path(offload_adam.__file__).parent
    modules = [path for path in package.rglob("*.py") if "numba" in path.read_text("utf-8")]
    users = {
        path.name
        for path in modules
        if PRIVATE.search(re.sub(r'""".*?"""', "", path.read_text("utf-8"), flags=re.DOTALL))
    }
    assert users == {"numba_private.py"}
