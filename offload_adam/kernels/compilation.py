"""Compile kernels, with a disk cache if a folder is writable; log compilations that take long."""

from __future__ import annotations

import logging
import os
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numba
from filelock import FileLock, Timeout

from offload_adam.errors import warn_user
from offload_adam.kernels.numba_private import (
    cache_folder,
    compile_signature,
    disable_cache,
    is_compiled,
)
from offload_adam.layout.flat import BLOCK_NUMEL

logger = logging.getLogger(__name__)

SLOW_COMPILATION_S = 1.0
"""A compilation that is still running after this many seconds is logged."""

LOCK_TIMEOUT_S = 120.0
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

    Threads: kernels release the GIL. The caller keeps the kernel's memory alive, and lets no other
        thread use it during the call.
    """
    # error_model="numpy": a division by 0 follows IEEE 754 instead of raising. nogil: backward
    # continues during a kernel; parallel loops release the GIL in any case. fastmath stays off,
    # because it lets LLVM assume that no value is NaN.
    options = {"error_model": "numpy", "nogil": True, **options}
    if _may_cache():
        # Raised if Numba found no writable cache folder.
        with suppress(RuntimeError):
            return numba.njit(function, cache=True, **options)
    warn_user(
        "No cache folder for compiled kernels is writable, so every process compiles them again. "
        "Set NUMBA_CACHE_DIR to a writable folder.",
        RuntimeWarning,
    )
    return numba.njit(function, **options)


def _may_cache() -> bool:
    """Return False where Numba would cache in a folder named "~" below the current folder.

    Numba does so for a user without a home folder, unless it finds another folder first.
    """
    return bool(
        os.path.expanduser("~") != "~"
        or numba.config.CACHE_DIR
        or os.environ.get("XDG_CACHE_HOME")
        or os.access(Path(__file__).parent, os.W_OK)
    )


def jit_inlined(function: Callable[..., Any]) -> Any:
    """Return the dispatcher of a function that kernels inline; it has no disk cache.

    A cached function would not be recompiled if a function that it inlines changes: see
    `source_fingerprint`.
    """
    return numba.njit(function, error_model="numpy")


def compile_now(dispatcher: Any, arguments: tuple[Any, ...], label: str) -> None:
    """Compile the specialisation that these example arguments select, or load it from the cache.

    If several processes need it at the same time, one compiles it and the others wait and load it.

    Args:
        label: names the kernel and its formats in the log.
    """
    signature = tuple(numba.typeof(argument) for argument in arguments)
    if is_compiled(dispatcher, signature):
        return
    timer = threading.Timer(SLOW_COMPILATION_S, _log_compilation, [label])
    timer.daemon = True
    timer.start()
    try:
        with _cache_lock(dispatcher):
            _compile(dispatcher, signature)
    finally:
        timer.cancel()


@contextmanager
def _cache_lock(dispatcher: Any) -> Iterator[None]:
    """Hold a file lock, so that no other process with the same cache compiles this kernel.

    The body runs without the lock if the kernel has no disk cache, if the file system has no locks,
    or if the lock is not free within `LOCK_TIMEOUT_S`.
    """
    # Numba's cache index supports one writer. Two writers could give the same file name to two
    # specialisations, and a process would later load the wrong one.
    folder = cache_folder(dispatcher)
    if folder is None:
        yield
        return
    lock = FileLock(folder / f"{dispatcher.py_func.__name__}.lock", timeout=LOCK_TIMEOUT_S)
    try:
        lock.acquire()
    except (OSError, NotImplementedError, Timeout) as error:
        # The file system has no locks, or the process that holds the lock is suspended.
        logger.warning("Compiling without a lock on the kernel cache: %s", error)
        yield
        return
    try:
        yield
    finally:
        lock.release()


def _log_compilation(label: str) -> None:
    logger.info(
        "Compiling the %s kernel for this machine; later runs load it from the cache", label
    )


def _compile(dispatcher: Any, signature: tuple[Any, ...]) -> None:
    try:
        compile_signature(dispatcher, signature)
    except OSError as error:
        # A full or deleted cache folder must not stop training: continue without the cache.
        warn_user(
            f"Cannot cache compiled kernels: {error}. Free space in Numba's cache folder, or set "
            "NUMBA_CACHE_DIR to another one.",
            RuntimeWarning,
        )
        disable_cache(dispatcher)
        compile_signature(dispatcher, signature)
