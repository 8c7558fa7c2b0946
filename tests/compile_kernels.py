"""Compiles every kernel for the tests, or finds it compiled: `python -m tests.compile_kernels`.

In a fresh checkout each would be compiled where a test first needs it, one after the other, and
some by several ranks at once. Here two processes share the work by files: Numba's index of what is
kept of one file does not bear two that write.
"""

from __future__ import annotations

import itertools
import multiprocessing

from offload_adam.kernels import adam, norm, sparse
from offload_adam.kernels.formats import FloatFormat

ROUNDED = (None, FloatFormat.BFLOAT16, FloatFormat.FLOAT16)


def compile_updates() -> None:
    """Compile the dense update for all formats."""
    for source, rounded, amsgrad in itertools.product(FloatFormat, ROUNDED, (False, True)):
        adam.prepare(source, rounded, amsgrad)


def compile_others() -> None:
    """Compile the norm and the lazy update for all formats."""
    for source in FloatFormat:
        norm.prepare(source)
    for source, rounded in itertools.product(FloatFormat, ROUNDED):
        sparse.prepare(source, rounded)


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
