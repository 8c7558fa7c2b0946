"""Gradient hooks: tell when each gradient is ready, and when a backward is over."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.utils.hooks import RemovableHandle

from offload_adam.step.reducer import GradientReduction
from offload_adam.torch_private import (
    NO_GRAPH_TASK,
    current_autograd_node,
    current_graph_task,
    queue_backward_callback,
)

_ALL_DELIVER_UP_TO = 64
_DELIVER_EVERY = 16


class BackwardHooks:
    """Forwards post-accumulate hooks of parameters to the reduction, a few at a time.

    In a bucket of many small parameters most hooks only note the arrival: ten thousand deliveries
    would cost more than the update. Every sixteenth parameter, and the one that backward brings
    last, delivers what has been noted. Undelivered gradients stay in `.grad` until `step()` reads
    them. On a device, a change of the stream on which autograd writes gradients delivers, too: what
    is delivered together was written on one stream.

    The end of a backward is a callback queued once for each graph task. A reentrant checkpoint runs
    nested tasks, and each of their ends calls back too: only the one outside any autograd node
    counts. State is keyed by task, not by a flag, so that a backward that raised leaves nothing
    behind.

    Owns: one hook handle a parameter, until `remove`.
    """

    def __init__(
        self,
        reduction: GradientReduction,
        current_stream: Callable[[torch.device], Hashable],
    ) -> None:
        """Begin without hooks.

        Args:
            current_stream: returns a device's current stream, None for host memory.
        """
        self._reduction = reduction
        self._current_stream = current_stream
        self._has_streams = False
        self._stream: Hashable = None  # that of `_arrived`
        self._handles: list[RemovableHandle] = []
        self._arrived: list[torch.Tensor] = []
        self._tasks: set[int] = set()
        self._last_task = NO_GRAPH_TASK
        self._enabled = True
        # Autograd has a thread for each device: buckets leave one after the other all the same.
        self._lock = threading.RLock()

    def attach(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Hook the parameters of one bucket, given in the order in which backward brings them."""
        every = 1 if len(parameters) <= _ALL_DELIVER_UP_TO else _DELIVER_EVERY
        has_streams = self._current_stream(parameters[0].device) is not None
        self._has_streams |= has_streams
        note = self._note if has_streams else self._arrived.append
        for position, parameter in enumerate(parameters):
            delivers = position % every == 0 or position == len(parameters) - 1
            hook = self._deliver if delivers else note
            self._handles.append(parameter.register_post_accumulate_grad_hook(hook))

    def remove(self) -> None:
        """Take every hook off. Idempotent."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.forget()

    def forget_arrivals(self) -> None:
        """Forget arrivals that were not delivered: the step has read these gradients itself."""
        self._arrived.clear()

    def forget(self) -> None:
        """Forget what a backward that raised has left."""
        self.forget_arrivals()
        self._tasks.clear()
        self._last_task = NO_GRAPH_TASK

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Tell the reduction nothing of the backwards inside."""
        before = self._enabled
        self._enabled = False
        try:
            yield
        finally:
            self._enabled = before
            self._arrived.clear()

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
        # In place: the hooks of most parameters are bound to this very list, and another device's
        # thread may have added to it meanwhile.
        del self._arrived[: len(arrived)]
        self._reduction.gradients_ready(arrived, self._stream)

    def _enter_task(self, task: int) -> None:
        self._last_task = task
        if task not in self._tasks:
            queue_backward_callback(self._task_ended)
            self._tasks.add(task)
            self._reduction.backward_began()

    def _task_ended(self) -> None:
        if current_autograd_node() is not None:
            return
        with self._lock:
            if self._arrived:
                self._pass_on()
            self.forget()
            self._reduction.backward_ended()
