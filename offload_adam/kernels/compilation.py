"""Compile kernels, with a disk cache if a folder is writable; log compilations that take long."""

from __future__ import annotations

import logging
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numba
from filelock import FileLock, Timeout

from offload_adam.kernels.numba_private import (
    cache_folder,
    compile_signature,
    disable_cache,
    is_compiled,
)
from offload_adam.layout.flat import BLOCK_NUMEL

logger = logging.getLogger(__name__)

SLOW_COMPILATION_S = 1.0
"""Seconds after which a compilation that still runs is logged."""

LOCK_S = 120.0
"""Seconds to wait for another process that compiles the same kernel, before compiling it here."""


def source_fingerprint() -> int:
    """Return a checksum over the sources of this package, and over BLOCK_NUMEL from outside it.

    Numba invalidates a cached kernel if its own file changes, but not if an inlined function's file
    changes. Kernels close over this number, which makes it part of the cache key.
    """
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return zlib.crc32(b"\0".join(path.read_bytes() for path in sources), BLOCK_NUMEL)


def jit(function: Callable[..., Any], **options: Any) -> Any:
    """Return Numba's dispatcher for `function`, cached on disk if a folder is writable.

    `error_model="numpy"` makes division follow IEEE 754 instead of raising. fastmath stays off,
    because it lets LLVM assume that no value is NaN. Kernels release the interpreter lock, so that
    backward continues meanwhile: parallel loops always do, others because of `nogil`. The caller
    keeps the kernel's memory alive, and lets no other thread use it.
    """
    options = {"error_model": "numpy", "nogil": True, **options}
    try:
        return numba.njit(function, cache=True, **options)
    except RuntimeError:
        warnings.warn(
            "No cache folder for compiled kernels is writable: every process compiles them again. "
            "Set NUMBA_CACHE_DIR to a writable folder to keep them.",
            RuntimeWarning,
            stacklevel=2,
        )
        return numba.njit(function, **options)


def inner(function: Callable[..., Any]) -> Any:
    """Return the dispatcher of a function that kernels call; it is cached only inside of them.

    A cache of its own would outlive a change in the functions it inlines: see `source_fingerprint`.
    """
    return numba.njit(function, error_model="numpy")


def compile_now(dispatcher: Any, arguments: tuple[Any, ...], label: str) -> None:
    """Compile the specialisation that these example arguments select, or load it from the cache.

    If several processes need it, one compiles it, and the others load the result.
    """
    signature = tuple(numba.typeof(argument) for argument in arguments)
    if is_compiled(dispatcher, signature):
        return
    announcement = threading.Timer(SLOW_COMPILATION_S, _announce, [label])
    announcement.daemon = True
    announcement.start()
    try:
        with _alone(dispatcher):
            _compile(dispatcher, signature)
    finally:
        announcement.cancel()


@contextmanager
def _alone(dispatcher: Any) -> Iterator[None]:
    """Keep other processes that share this kernel's cache from compiling it meanwhile.

    Numba's index allows one writer only: two could give the same file name to two specialisations,
    and one process would later load the other's code.
    """
    folder = cache_folder(dispatcher)
    if folder is None:
        yield
        return
    lock = FileLock(folder / f"{dispatcher.py_func.__name__}.lock", timeout=LOCK_S)
    try:
        lock.acquire()
    except (OSError, NotImplementedError, Timeout) as error:
        # The file system has no locks, or the other process is stopped: compile twice, not never.
        logger.warning("Compiling without a lock on the kernel cache: %s", error)
        yield
        return
    try:
        yield
    finally:
        lock.release()


def _announce(label: str) -> None:
    logger.info("Compiling the %s kernel for this machine; the cache keeps it", label)


def _compile(dispatcher: Any, signature: tuple[Any, ...]) -> None:
    try:
        compile_signature(dispatcher, signature)
    except OSError as error:
        # A full or deleted cache folder must not stop training: continue without the cache.
        warnings.warn(f"Cannot cache compiled kernels: {error}", RuntimeWarning, stacklevel=3)
        disable_cache(dispatcher)
        compile_signature(dispatcher, signature)
