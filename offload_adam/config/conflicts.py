"""Finds keys of a configuration whose values are valid alone but not together."""

from __future__ import annotations

from collections.abc import Iterator

from offload_adam.config.optimizer_sections import AdamSection
from offload_adam.config.sections import RunConfig, ScheduleSection


def find_conflicts(config: RunConfig) -> Iterator[tuple[str, str, str]]:
    """Yield the dotted paths of two keys that contradict each other, and the problem.

    The problem is reported for the first key.
    """
    model, sizes, optimizer = config.model, config.model.sizes, config.optimizer
    if (sizes is None) == (model.factory is None):
        problem = "set exactly one of model.sizes and model.factory"
        yield "model.factory", "model.sizes", problem
    if model.arguments and model.factory is None:
        problem = "these are arguments of model.factory, which is not set: set it, or remove them"
        yield "model.arguments", "model.factory", problem
    if sizes is not None and sizes.width % sizes.num_heads:
        problem = f"must be a multiple of model.sizes.num_heads ({sizes.num_heads})"
        yield "model.sizes.width", "model.sizes.num_heads", f"{problem}, got {sizes.width}"
    if (config.data.source is None) == (config.data.path is None):
        yield "data.path", "data.source", "set exactly one of data.source and data.path"
    streaming = "use_offload" if isinstance(optimizer, AdamSection) else "streaming"
    if optimizer.overlap and not optimizer.streams:
        problem = "since otherwise no forward waits for its parameters"
        yield _needs("overlap", streaming, "true", problem)
    needs_streams = optimizer.accumulate in ("host", "error")
    if needs_streams and not optimizer.streams:
        problem = "since otherwise gradients stay in .grad until step()"
        yield _needs("accumulate", streaming, "true", problem)
    if needs_streams and optimizer.gradient_reduction == "external":
        problem = "since DistributedDataParallel accumulates in .grad"
        yield _needs("accumulate", "gradient_reduction", "optimizer", problem)
    if isinstance(optimizer, AdamSection):
        yield from _adam_conflicts(optimizer, config.schedule)


def _needs(key: str, other: str, value: str, reason: str) -> tuple[str, str, str]:
    """Return the conflict of `optimizer.<key>`, which needs `optimizer.<other>` to be `value`."""
    return f"optimizer.{key}", f"optimizer.{other}", f"needs optimizer.{other}: {value}, {reason}"


def _adam_conflicts(adam: AdamSection, schedule: ScheduleSection) -> Iterator[tuple[str, str, str]]:
    exclusive = [
        ("use_lazy", "use_offload", ""),
        ("use_amsgrad", "use_lazy", ""),
        ("use_amsgrad", "use_offload", ""),
    ]
    if not adam.epsilon_hat:
        remedy = ", or set optimizer.epsilon_hat to true, which ignores use_nesterov"
        exclusive.append(("use_nesterov", "use_amsgrad", remedy))
    for one, other, remedy in exclusive:
        if getattr(adam, one) and getattr(adam, other):
            problem = f"conflicts with optimizer.{other}: set one of them to false{remedy}"
            yield f"optimizer.{one}", f"optimizer.{other}", problem
    if adam.schedules_itself and schedule != ScheduleSection():
        problem = (
            "optimizer.learning_rate is a schedule itself: remove this section, or set "
            "optimizer.learning_rate to a number"
        )
        yield "schedule", "optimizer.learning_rate", problem
