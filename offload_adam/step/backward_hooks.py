"""Hooks on parameters that report ready gradients and the end of a backward to the reduction."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.utils.hooks import RemovableHandle

from offload_adam.step.reducer import GradientReduction
from offload_adam.torch_private import (
    NO_GRAPH_TASK,
    add_gradient_hook,
    current_autograd_node,
    current_graph_task,
    queue_backward_callback,
)

# In a bucket of at most this many parameters, every hook delivers its gradient at once.
_ALL_DELIVER_UP_TO = 64
# In a larger bucket, one hook in this many delivers, for itself and those before it.
_DELIVER_EVERY = 16


class BackwardHooks:
    """Passes ready gradients from post-accumulate hooks to the reduction, in batches.

    In a bucket of many small parameters, most hooks only append the parameter to a list: ten
    thousand calls of the reduction would take longer than the update. Every sixteenth parameter,
    and the last one in backward order, delivers the list. The end of the backward delivers the
    rest. If a backward runs no delivering hook, `step()` calls `deliver_rest`.

    On a device, the list is also delivered when autograd changes the stream on which it writes
    gradients: all gradients of one delivery were written on one stream.

    Autograd calls `_task_ended` at the end of each graph task. Reentrant activation checkpointing
    nests graph tasks; only the end of the outermost task ends the backward.

    Owns: one hook handle per parameter, until `remove`.
    """

    def __init__(
        self,
        reduction: GradientReduction,
        current_stream: Callable[[torch.device], Hashable],
        is_outdated: Callable[[], bool] = lambda: False,
    ) -> None:
        """Construct without hooks.

        Args:
            reduction: receives the gradients.
            current_stream: returns a device's current stream, None for host memory.
            is_outdated: whether the next step will lay the parameters out anew. Gradients then stay
                in `.grad`, where that step reads them.
        """
        self._reduction = reduction
        self._current_stream = current_stream
        self._is_outdated = is_outdated
        self._holds = False  # gradients of the running backward stay in `.grad`
        self._has_streams = False
        self._stream: Hashable = None  # the gradients in `_arrived` were written on it
        self._handles: list[RemovableHandle] = []
        self._arrived: list[torch.Tensor] = []
        # By task, not a flag: a backward that raised an error has no end that could reset a flag.
        self._tasks: set[int] = set()  # graph tasks whose end will call `_task_ended`
        self._last_task = NO_GRAPH_TASK
        self._enabled = True
        # Autograd runs hooks on one thread per device, but buckets must be sent one after another.
        self._lock = threading.RLock()

    def attach(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Put hooks on the parameters of one bucket, given in backward order."""
        every = 1 if len(parameters) <= _ALL_DELIVER_UP_TO else _DELIVER_EVERY
        has_streams = self._current_stream(parameters[0].device) is not None
        self._has_streams |= has_streams
        note = self._note if has_streams else self._arrived.append
        # If the user compiles a whole training step, torch.compile also compiles what runs during
        # its backward(), and crashes on the memory that these hooks exchange.
        deliver = torch.compiler.disable(self._deliver)
        for position, parameter in enumerate(parameters):
            delivers = position % every == 0 or position == len(parameters) - 1
            hook = deliver if delivers else note
            self._handles.append(add_gradient_hook(parameter, hook))

    def remove(self) -> None:
        """Remove all hooks. Idempotent."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.forget()

    @property
    def has_undelivered(self) -> bool:
        """Whether a backward ran no delivering hook, so that its gradients are still in `.grad`."""
        return bool(self._arrived)

    def deliver_rest(self) -> None:
        """Deliver the gradients of a backward that ran no delivering hook.

        Raises:
            ValueError: `.grad` was set to None before this backward; see `backward_began`.
            ValueError, HostMemoryError: as `GradientReduction.gradients_ready`.
        """
        with self._lock:
            if self._arrived:
                self._reduction.backward_began()
                self._pass_on()

    def forget_arrivals(self) -> None:
        """Forget undelivered arrivals: `step()` has read these gradients from `.grad`."""
        self._arrived.clear()

    def forget(self) -> None:
        """Forget the arrivals and tasks of a backward that raised an error."""
        self.forget_arrivals()
        self._tasks.clear()
        self._last_task = NO_GRAPH_TASK

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Report no gradients of backwards in the body, which stay in `.grad`; see `no_sync`."""
        before, arrived = self._enabled, self._arrived[:]
        self._enabled = False
        try:
            yield
        finally:
            self._enabled = before
            self._arrived[:] = arrived

    def _note(self, parameter: torch.Tensor) -> None:
        with self._lock:
            if self._current_stream(parameter.device) == self._stream:
                self._arrived.append(parameter)
            else:
                self._deliver(parameter)

    def _deliver(self, parameter: torch.Tensor) -> None:
        if not self._enabled:
            return
        with self._lock:
            task = current_graph_task()
            if task != self._last_task:
                self._enter_task(task)
            if self._holds:
                self._arrived.clear()
                return
            if self._has_streams:
                self._enter_stream(self._current_stream(parameter.device))
            self._arrived.append(parameter)
            self._pass_on()

    def _enter_stream(self, stream: Hashable) -> None:
        if not stream == self._stream:  # noqa: SIM201 (see `Streams.current`)
            if self._arrived:
                self._pass_on()
            self._stream = stream

    def _pass_on(self) -> None:
        arrived = self._arrived[:]
        # Empty the list in place, because most hooks are its `append`. Delete only what was copied:
        # autograd's thread of another device may have appended more since the copy.
        del self._arrived[: len(arrived)]
        self._reduction.gradients_ready(arrived, self._stream)

    def _enter_task(self, task: int) -> None:
        self._last_task = task
        self._holds = self._is_outdated()
        if not self._holds and task not in self._tasks:
            queue_backward_callback(torch.compiler.disable(self._task_ended))
            self._tasks.add(task)
            self._reduction.backward_began()

    def _task_ended(self) -> None:
        if current_autograd_node() is not None:
            return  # a nested task ended: an outer autograd node is still running
        with self._lock:
            if self._arrived:
                self._pass_on()
            self.forget()
            self._reduction.backward_ended()
