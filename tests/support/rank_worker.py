"""One process of the rank pool: it runs calls, each in its own process group."""

from __future__ import annotations

import faulthandler
import gc
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

IDLE = b"idle"
RELEASE = b"release"

# Variables that torchrun sets. A call sees its own values or none, never those of pytest.
_TORCHRUN_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK")
_ORPHAN_MARGIN_S = 30.0


class Call(NamedTuple):
    """One rank's part of `RankPool.run`; `payload` is the pickled function and its arguments."""

    number: int
    rank: int
    world_size: int
    env: Mapping[str, str | None]
    timeout_s: float
    payload: bytes


class Raised(NamedTuple):
    """An exception as it crosses the process boundary: its class, its text and its traceback."""

    type: type[BaseException]
    message: str
    traceback: str


def serve(connection: Connection, store_port: int, stacks: Path) -> None:
    """Run calls until the connection closes.

    After each call, send its outcome. Then wait for `RELEASE`, which the pool sends once every
    rank's outcome is known or this rank has raised. Then destroy the process group and send `IDLE`.
    SIGUSR1 writes the stack of every thread to `stacks`.
    """
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C is for pytest, which then ends this process
    faulthandler.register(signal.SIGUSR1, file=stacks.open("w"), all_threads=True)
    for name in _TORCHRUN_VARIABLES:
        os.environ.pop(name, None)
    # Loopback, whatever this machine's name resolves to.
    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    # One thread per rank: with two, four ranks on two cores run at a tenth of the speed.
    os.environ["NUMBA_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", store_port, is_master=False)
    try:
        connection.send_bytes(IDLE)
        while True:
            _serve_one(connection, store)
    except (EOFError, OSError):
        # Not sys.exit: objects that a call left behind may hold process groups, and abort at exit.
        os._exit(0)


def _serve_one(connection: Connection, store: dist.Store) -> None:
    call = Call(*connection.recv())
    environment = dict(os.environ)
    # Ends this process if pytest itself was killed while a call hangs.
    faulthandler.dump_traceback_later(call.timeout_s + _ORPHAN_MARGIN_S, exit=True)
    try:
        connection.send_bytes(_outcome(call, store))
        connection.recv_bytes()
        gc.collect()
        # The objects that are alive now belong to modules, mostly Numba's. Without this, each later
        # collection would scan them, which takes longer than most calls.
        gc.freeze()
        if dist.is_initialized():
            dist.destroy_process_group()
        # DTensor finds what it has cached for an equal mesh, whose groups no longer exist.
        if "torch.distributed.tensor" in sys.modules:
            from torch.distributed.tensor.debug import _clear_sharding_prop_cache

            _clear_sharding_prop_cache()
    finally:
        faulthandler.cancel_dump_traceback_later()
        os.environ.clear()
        os.environ.update(environment)
    connection.send_bytes(IDLE)


def _outcome(call: Call, store: dist.Store) -> bytes:
    """Return the pickled result, or the pickled `Raised`."""
    try:
        return pickle.dumps(_execute(call, store))
    except BaseException as error:  # also SystemExit: nothing may end the process unseen
        return pickle.dumps(Raised(_importable_class(error), str(error), traceback.format_exc()))


def _execute(call: Call, store: dist.Store) -> Any:
    _set_environment(call)
    torch.manual_seed(0)  # so that no test depends on those before it
    dist.init_process_group(
        "gloo",
        store=dist.PrefixStore(f"call-{call.number}", store),
        rank=call.rank,
        world_size=call.world_size,
        timeout=timedelta(seconds=call.timeout_s),
    )
    # Without this, a rank that destroys the group at once would break connections that its peers
    # are still opening.
    dist.barrier()
    function: Callable[..., Any]
    function, args = pickle.loads(call.payload)
    return function(call.rank, call.world_size, *args)


def _set_environment(call: Call) -> None:
    """Set what torchrun would, and then what the caller asked for; None removes a variable."""
    rank, world_size = str(call.rank), str(call.world_size)
    values: dict[str, str | None] = {"RANK": rank, "LOCAL_RANK": rank}
    values |= {"WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    for name, value in {**values, **call.env}.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _importable_class(error: BaseException) -> type[BaseException]:
    """Return the exception's class, or its first base that another process can import."""
    for cls in type(error).__mro__:
        try:
            pickle.dumps(cls)
        except Exception:
            continue
        if issubclass(cls, BaseException):
            return cls
    return Exception
