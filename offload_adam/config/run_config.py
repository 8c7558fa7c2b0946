"""The whole configuration, and the conflicts between its keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from offload_adam.config.declared import Section
from offload_adam.config.optimizer_sections import (
    AdamSection,
    OffloadAdamSection,
    OptimizerSection,
)
from offload_adam.config.sections import (
    CheckpointSection,
    CoordinatorSection,
    DataSection,
    MemorySection,
    ModelSection,
    ObserveSection,
    ProfileSection,
    RunSection,
    ScheduleSection,
    TrainSection,
)


class Conflict(NamedTuple):
    """Keys whose values are valid but contradict each other.

    paths: dotted paths of the keys. The mistake is reported at the first one.
    """

    paths: tuple[str, ...]
    problem: str


class RunConfig(Section):
    """The configuration of a run. Each field is a section of the YAML file."""

    run: RunSection = RunSection()
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    train: TrainSection = TrainSection()
    optimizer: OptimizerSection = OffloadAdamSection()
    schedule: ScheduleSection = ScheduleSection()
    memory: MemorySection = MemorySection()
    coordinator: CoordinatorSection = CoordinatorSection()
    checkpoint: CheckpointSection = CheckpointSection()
    profile: ProfileSection = ProfileSection()
    observe: ObserveSection = ObserveSection()


def find_conflicts(config: RunConfig) -> Iterator[Conflict]:
    """Yield the conflicts between keys."""
    yield from _model_conflicts(config.model)
    yield from _data_conflicts(config.data)
    yield from _streaming_conflicts(config.optimizer)
    if isinstance(config.optimizer, AdamSection):
        yield from _adam_conflicts(config.optimizer, config.schedule)


def _model_conflicts(model: ModelSection) -> Iterator[Conflict]:
    if (model.sizes is None) == (model.factory is None):
        yield Conflict(
            ("model.factory", "model.sizes"),
            "set exactly one of model.sizes and model.factory",
        )
    if model.arguments and model.factory is None:
        yield Conflict(
            ("model.arguments", "model.factory"),
            "these are passed to model.factory, which is not set",
        )
    if model.sizes is not None and model.sizes.width % model.sizes.num_heads:
        yield Conflict(
            ("model.sizes.width", "model.sizes.num_heads"),
            f"must be a multiple of model.sizes.num_heads ({model.sizes.num_heads}), "
            f"got {model.sizes.width}",
        )


def _data_conflicts(data: DataSection) -> Iterator[Conflict]:
    if (data.source is None) == (data.path is None):
        yield Conflict(
            ("data.path", "data.source"),
            "set exactly one of data.source and data.path",
        )


def _adam_conflicts(adam: AdamSection, schedule: ScheduleSection) -> Iterator[Conflict]:
    exclusive = (("use_lazy", "use_offload"), ("use_amsgrad", "use_lazy"))
    for one, other in (*exclusive, ("use_amsgrad", "use_offload")):
        if getattr(adam, one) and getattr(adam, other):
            yield Conflict(
                (f"optimizer.{one}", f"optimizer.{other}"),
                f"conflicts with optimizer.{other}: set one of them to false",
            )
    if adam.use_nesterov and adam.use_amsgrad and not adam.epsilon_hat:
        yield Conflict(
            ("optimizer.use_nesterov", "optimizer.use_amsgrad"),
            "conflicts with optimizer.use_amsgrad: set one of them to false",
        )
    if adam.schedules_itself and schedule != ScheduleSection():
        yield Conflict(
            ("schedule", "optimizer.learning_rate"),
            "optimizer.learning_rate already is a schedule: remove this section, or set "
            "optimizer.learning_rate to a number",
        )


def _streaming_conflicts(optimizer: OffloadAdamSection | AdamSection) -> Iterator[Conflict]:
    key = "use_offload" if isinstance(optimizer, AdamSection) else "streaming"
    if optimizer.overlap and not optimizer.streams:
        yield Conflict(
            ("optimizer.overlap", f"optimizer.{key}"),
            f"needs optimizer.{key}: true, since otherwise no forward waits for its parameters",
        )
    if optimizer.accumulate is None:
        return
    if not optimizer.streams:
        yield Conflict(
            ("optimizer.accumulate", f"optimizer.{key}"),
            f"host accumulation needs optimizer.{key}: true, "
            "since otherwise gradients stay in .grad until step()",
        )
    if optimizer.gradient_reduction == "external":
        yield Conflict(
            ("optimizer.accumulate", "optimizer.gradient_reduction"),
            "host accumulation needs optimizer.gradient_reduction: optimizer, "
            "since DistributedDataParallel accumulates in .grad",
        )
