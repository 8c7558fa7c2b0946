"""Compiles every kernel for the tests, unless it is cached: `python -m tests.compile_kernels`.

In a fresh checkout each kernel would be compiled by the first test that needs it, one after the
other, and some by several ranks at once. Two processes divide the kernels by source file, because
Numba's cache index of a source file allows one writer only.
"""

from __future__ import annotations

import itertools
import multiprocessing

from offload_adam.kernels import adam, fold, norm, sparse
from offload_adam.kernels.formats import FloatFormat
from offload_adam.options import CODED_FORMATS
from tests.unit import undo_cases

PARAM_FORMATS = (None, FloatFormat.BFLOAT16, FloatFormat.FLOAT16)
LOW_PRECISION = ((None, True), (None, False), (FloatFormat.FLOAT16, False))
"""With bfloat16 moments: the format of the parameter, and whether the master weight is split."""

CODED: tuple[tuple[FloatFormat, FloatFormat | None, bool], ...] = (
    (FloatFormat.BFLOAT16, None, True),
    (FloatFormat.FLOAT32, None, True),
    (FloatFormat.FLOAT32, None, False),
    (FloatFormat.FLOAT32, FloatFormat.FLOAT16, False),
    (FloatFormat.FLOAT16, FloatFormat.FLOAT16, False),
)
"""With 8-bit codes: the formats of gradients and parameter, and whether the master is split."""


def compile_updates() -> None:
    """Compile the dense update for all formats."""
    for source, param_format, amsgrad in itertools.product(
        FloatFormat, PARAM_FORMATS, (False, True)
    ):
        adam.compile_kernel(source, param_format, amsgrad)
    for source, (param_format, is_split) in itertools.product(FloatFormat, LOW_PRECISION):
        adam.compile_kernel(source, param_format, False, "bf16", is_split)
    for state_format, (source, param_format, is_split) in itertools.product(CODED_FORMATS, CODED):
        adam.compile_kernel(source, param_format, False, state_format, is_split)
    for case in undo_cases.CASES.values():
        case.compile_kernel()


def compile_others() -> None:
    """Compile the norm, the lazy update and the fold for all formats."""
    for source in FloatFormat:
        norm.compile_kernel(source)
        norm.compile_kernel(source, copies=True)
    for source, param_format in itertools.product(FloatFormat, PARAM_FORMATS):
        sparse.compile_kernel(source, param_format)
    for param_format, is_split in LOW_PRECISION:
        sparse.compile_kernel(FloatFormat.FLOAT32, param_format, "bf16", is_split)
    for target, source in itertools.product(FloatFormat, FloatFormat):
        fold.compile_kernel(target, source)


def main() -> None:
    """Compile both halves side by side."""
    other = multiprocessing.get_context("spawn").Process(target=compile_others)
    other.start()
    compile_updates()
    other.join()
    if other.exitcode:
        raise SystemExit(other.exitcode)


if __name__ == "__main__":
    main()
