"""The configuration as a whole, and the rules that tie keys of different places together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from pydantic import model_validator

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
    """Keys that are each in range and still do not go together; the first is the one to blame."""

    paths: tuple[str, ...]
    problem: str


class ConflictError(ValueError):
    """Carries every conflict out of pydantic's validation, which passes on one error only."""

    def __init__(self, conflicts: tuple[Conflict, ...]) -> None:
        self.conflicts = conflicts
        super().__init__("; ".join(f"{c.paths[0]}: {c.problem}" for c in conflicts))


class RunConfig(Section):
    """Everything a run is told; each section is a mapping of the YAML file."""

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

    @model_validator(mode="after")
    def _reject_conflicts(self) -> RunConfig:
        conflicts = tuple(find_conflicts(self))
        if conflicts:
            raise ConflictError(conflicts)
        return self


def find_conflicts(config: RunConfig) -> Iterator[Conflict]:
    """Yield every pair of keys that contradict each other."""
    yield from _model_conflicts(config.model)
    yield from _data_conflicts(config.data)
    yield from _streaming_conflicts(config.optimizer)
    if isinstance(config.optimizer, AdamSection):
        yield from _adam_conflicts(config.optimizer, config.schedule)


def _model_conflicts(model: ModelSection) -> Iterator[Conflict]:
    if (model.sizes is None) == (model.factory is None):
        yield Conflict(
            ("model.factory", "model.sizes"),
            "give either model.sizes or model.factory, the other one null or left out",
        )
    if model.arguments and model.factory is None:
        yield Conflict(
            ("model.arguments", "model.factory"),
            "these go to model.factory, which is not given",
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
            "give either data.source or data.path, the other one null or left out",
        )


def _adam_conflicts(adam: AdamSection, schedule: ScheduleSection) -> Iterator[Conflict]:
    exclusive = (("use_lazy", "use_offload"), ("use_amsgrad", "use_lazy"))
    for one, other in (*exclusive, ("use_amsgrad", "use_offload")):
        if getattr(adam, one) and getattr(adam, other):
            yield Conflict(
                (f"optimizer.{one}", f"optimizer.{other}"),
                f"excludes optimizer.{other}: set one of them to false",
            )
    if adam.use_nesterov and adam.use_amsgrad and not adam.epsilon_hat:
        yield Conflict(
            ("optimizer.use_nesterov", "optimizer.use_amsgrad"),
            "excludes optimizer.use_amsgrad: set one of them to false",
        )
    if adam.schedules_itself and schedule != ScheduleSection():
        yield Conflict(
            ("schedule", "optimizer.learning_rate"),
            "optimizer.learning_rate changes with the step by itself: leave out this section, or "
            "give a single number there",
        )


def _streaming_conflicts(optimizer: OffloadAdamSection | AdamSection) -> Iterator[Conflict]:
    key = "use_offload" if isinstance(optimizer, AdamSection) else "streaming"
    if optimizer.overlap and not optimizer.streams:
        yield Conflict(
            ("optimizer.overlap", f"optimizer.{key}"),
            f"overlap needs optimizer.{key}: true, for without it no forward waits for its "
            "parameters",
        )
    if optimizer.accumulate is None:
        return
    if not optimizer.streams:
        yield Conflict(
            ("optimizer.accumulate", f"optimizer.{key}"),
            f"host accumulation needs optimizer.{key}: true, "
            "for without it gradients stay in .grad until step()",
        )
    if optimizer.gradient_reduction == "external":
        yield Conflict(
            ("optimizer.accumulate", "optimizer.gradient_reduction"),
            "host accumulation needs optimizer.gradient_reduction: optimizer, "
            "for DistributedDataParallel adds up in .grad",
        )
