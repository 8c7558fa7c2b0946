"""Let one thread at a time call an optimizer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

P = ParamSpec("P")
R = TypeVar("R")
Method = TypeVar("Method", bound=Callable[..., Any])


def serialized(method: Method) -> Method:
    """Run a method while holding the optimizer's lock, so that calls of other threads wait.

    The lock is reentrant: a closure, a hook or a signal handler may call the optimizer again.
    Threads: only those that call the optimizer take the lock. Gradient hooks, the update thread and
    the thread that writes a checkpoint must not: the thread that holds it waits for them.
    """

    @functools.wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            return method(self, *args, **kwargs)

    return cast(Method, run)


def serialized_by_optimizer(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function while holding the lock of its keyword argument `optimizer`."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        lock = getattr(kwargs.get("optimizer"), "_lock", None)
        if lock is None:  # an argument is missing or of another type: the function reports it
            return function(*args, **kwargs)
        with lock:
            return function(*args, **kwargs)

    return run
