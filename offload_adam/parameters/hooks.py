"""Gradient hooks: tell when each gradient is ready, and when a backward is over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch.utils.hooks import RemovableHandle

_NO_TASK = -1


class GradientSink(Protocol):
    """What listens to a backward pass."""

    def listener(self, index: int) -> Callable[[], None]:
        """Return what to call when a parameter's `.grad` holds all that a backward has for it."""
        ...

    def backward_ended(self) -> None:
        """The outermost backward is over."""
        ...


class BackwardHooks:
    """Forwards post-accumulate hooks of parameters to a sink.

    The end of a backward is a callback queued once for each graph task. A reentrant checkpoint runs
    nested tasks, and each of their ends calls back too: only the one outside any autograd node
    counts. State is keyed by task, not by a flag, so that a backward that raised leaves nothing
    behind.

    Owns: one hook handle a parameter, until `remove`.
    """

    def __init__(self, sink: GradientSink) -> None:
        self._sink = sink
        self._handles: list[RemovableHandle] = []
        self._tasks: set[int] = set()
        self._last_task = _NO_TASK
        self.enabled = True

    def attach(self, indices: Sequence[int], parameters: Sequence[torch.nn.Parameter]) -> None:
        """Hook these parameters; the sink is told their `indices`."""
        for index, parameter in zip(indices, parameters, strict=True):
            hook = self._hook(index)
            self._handles.append(parameter.register_post_accumulate_grad_hook(hook))

    def remove(self) -> None:
        """Take every hook off. Idempotent."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def forget_tasks(self) -> None:
        """Drop what a backward that raised has left."""
        self._tasks.clear()
        self._last_task = _NO_TASK

    def _hook(self, index: int) -> Callable[[torch.Tensor], None]:
        gradient_ready = self._sink.listener(index)
        current_task = torch._C._current_graph_task_id

        def gradient_accumulated(parameter: torch.Tensor) -> None:
            if not self.enabled:
                return
            task = current_task()
            if task != self._last_task:
                self._enter_task(task)
            gradient_ready()

        return gradient_accumulated

    def _enter_task(self, task: int) -> None:
        self._last_task = task
        if task not in self._tasks:
            engine = torch.autograd.Variable._execution_engine
            engine.queue_callback(self._task_ended)
            self._tasks.add(task)

    def _task_ended(self) -> None:
        if torch._C._current_autograd_node() is not None:
            return
        self.forget_tasks()
        self._sink.backward_ended()
