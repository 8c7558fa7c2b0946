"""Finds keys of a configuration whose values are valid alone but not together."""

from __future__ import annotations

from collections.abc import Iterator

from offload_adam.config.optimizer_sections import AdamSection
from offload_adam.config.sections import ParallelSection, RunConfig, ScheduleSection
from offload_adam.options import CODED_FORMATS


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
    external = optimizer.gradient_reduction == "external" and config.parallel is None
    if needs_streams and external:
        problem = "since DistributedDataParallel accumulates in .grad"
        yield _needs("accumulate", "gradient_reduction", "optimizer", problem)
    if optimizer.state_format != "fp32":
        yield from _low_precision_conflicts(config)
    if isinstance(optimizer, AdamSection):
        yield from _adam_conflicts(optimizer, config.schedule)
    if config.parallel is not None:
        yield from _parallel_conflicts(config, config.parallel)
    yield from _keep_conflicts(config)


def _needs(key: str, other: str, value: str, reason: str) -> tuple[str, str, str]:
    """Return the conflict of `optimizer.<key>`, which needs `optimizer.<other>` to be `value`."""
    return f"optimizer.{key}", f"optimizer.{other}", f"needs optimizer.{other}: {value}, {reason}"


def _low_precision_conflicts(config: RunConfig) -> Iterator[tuple[str, str, str]]:
    """Yield the options that state in low precision cannot be combined with."""
    optimizer = config.optimizer
    is_mindspore = isinstance(optimizer, AdamSection)
    amsgrad = "use_amsgrad" if is_mindspore else "amsgrad"
    if getattr(optimizer, amsgrad):
        problem = "since the largest second moment needs fp32"
        yield _needs("state_format", amsgrad, "false", problem)
    on_device = "since state in low precision is updated in host memory"
    if is_mindspore and not optimizer.streams:
        yield _needs("state_format", "use_offload", "true", on_device)
    if is_mindspore and optimizer.use_lazy and optimizer.state_format in CODED_FORMATS:
        problem = "since it updates single rows, and 8-bit codes share an exponent in blocks"
        yield _needs("state_format", "use_lazy", "false", problem)
    if config.memory.offload_fraction < 1.0:
        key = "memory.offload_fraction"
        yield "optimizer.state_format", key, f"needs {key}: 1.0, {on_device}"


def _keep_conflicts(config: RunConfig) -> Iterator[tuple[str, str, str]]:
    """Yield the options that kept state cannot be combined with."""
    memory, optimizer = config.memory, config.optimizer
    if memory.keep == "none":
        if memory.keep_path is not None:
            problem = (
                "has no effect without memory.keep: shared or keeper: set it, or remove this key"
            )
            yield "memory.keep_path", "memory.keep", problem
        return
    problem = "since only state in host memory outlives the process"
    if memory.offload_fraction < 1.0:
        key = "memory.offload_fraction"
        yield "memory.keep", key, f"needs {key}: 1.0, {problem}"
    if isinstance(optimizer, AdamSection) and not optimizer.use_offload:
        key = "optimizer.use_offload"
        yield "memory.keep", key, f"needs {key}: true, {problem}"


def _parallel_conflicts(
    config: RunConfig, parallel: ParallelSection
) -> Iterator[tuple[str, str, str]]:
    sizes, optimizer = config.model.sizes, config.optimizer
    if optimizer.reduce_dtype is not None:
        problem = "has no effect, since FSDP2 averages the gradients: set parallel.reduce_dtype"
        yield "optimizer.reduce_dtype", "parallel", problem
    if isinstance(optimizer, AdamSection) and not optimizer.use_offload:
        problem = "since each rank then keeps the state of its shards in host memory"
        yield "parallel", "optimizer.use_offload", f"needs optimizer.use_offload: true, {problem}"
    if parallel.tensor == 1:
        return
    if sizes is None:
        problem = "divides only the built-in model: set it to 1, which leaves more ranks to shard"
        yield "parallel.tensor", "model.factory", f"{problem} your own model"
    elif sizes.num_heads % parallel.tensor:
        problem = f"must divide model.sizes.num_heads ({sizes.num_heads}), got {parallel.tensor}"
        yield "parallel.tensor", "model.sizes.num_heads", f"{problem}: change one of them"
    if isinstance(optimizer, AdamSection):
        problem = "above 1 needs optimizer.name: OffloadAdam, since Adam has no groups for copies"
        yield "parallel.tensor", "optimizer.name", f"{problem} of parameters"


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
