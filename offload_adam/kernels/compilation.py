"""Compile kernels with a disk cache where one can be written, and say so when it takes long."""

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

logger = logging.getLogger(__name__)

SLOW_COMPILATION_S = 1.0
"""A compilation that is still running after this is announced in the log."""


LOCK_S = 120.0
"""How long a process waits for another that compiles the same kernel, before it does so itself."""


def source_fingerprint() -> int:
    """Return a checksum over the sources of this package.

    Numba invalidates a cached kernel when its own file changes, not when a function that it inlines
    from another file does. Kernels close over this number, which makes it part of the cache's key.
    """
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return zlib.crc32(b"\0".join(path.read_bytes() for path in sources))


def jit(function: Callable[..., Any], **options: Any) -> Any:
    """Return Numba's dispatcher for `function`, cached on disk unless no folder can be written.

    `error_model="numpy"` lets division follow IEEE 754 instead of raising; fastmath stays off,
    since it would promise NaN away. The interpreter lock is released while a kernel runs (parallel
    loops do that unasked, `nogil` asks for it), so that backward goes on beside it: the caller
    keeps alive, and to itself, all memory that it was given.
    """
    options = {"error_model": "numpy", "nogil": True, **options}
    try:
        return numba.njit(function, cache=True, **options)
    except RuntimeError:
        warnings.warn(
            "no folder for compiled kernels can be written, so they are compiled anew in every "
            "process; set NUMBA_CACHE_DIR to a writable folder to keep them",
            RuntimeWarning,
            stacklevel=2,
        )
        return numba.njit(function, **options)


def inner(function: Callable[..., Any]) -> Any:
    """Return the dispatcher of a function that kernels call, cached as a part of them only.

    A cache of its own would outlive a change in what it calls: see `source_fingerprint`.
    """
    return numba.njit(function, error_model="numpy")


def compile_now(dispatcher: Any, arguments: tuple[Any, ...], label: str) -> None:
    """Compile (or load from the cache) the specialisation that these example arguments select.

    Of several processes that need it one compiles, and the others load what it has left.
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
    """Keep other processes from compiling this kernel meanwhile, where they share its cache.

    Numba's index does not bear two writers: each may give the next free name to a specialisation
    of its own, and one would later load the other's code.
    """
    folder = cache_folder(dispatcher)
    if folder is None:
        yield
        return
    lock = FileLock(folder / f"{dispatcher.py_func.__name__}.lock", timeout=LOCK_S)
    try:
        lock.acquire()
    except (OSError, NotImplementedError, Timeout) as error:
        # A folder without locks, or a process that is stopped: better compiled twice than never.
        logger.warning("compiling without a lock on the kernels' cache: %s", error)
        yield
        return
    try:
        yield
    finally:
        lock.release()


def _announce(label: str) -> None:
    logger.info("compiling the %s kernel for this machine; it is kept for the next start", label)


def _compile(dispatcher: Any, signature: tuple[Any, ...]) -> None:
    try:
        compile_signature(dispatcher, signature)
    except OSError as error:
        # A full or vanished cache folder must not stop training: only the cache is given up.
        warnings.warn(f"compiled kernels cannot be cached: {error}", RuntimeWarning, stacklevel=3)
        disable_cache(dispatcher)
        compile_signature(dispatcher, signature)
