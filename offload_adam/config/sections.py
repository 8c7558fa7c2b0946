"""The configuration of a run and its sections: every key with its type, range and default.

`offload-adam config` prints the docstrings. The optimizer's section is in optimizer_sections.py.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from offload_adam.config.declared import Section, keys_of
from offload_adam.config.optimizer_sections import OffloadAdamSection, OptimizerSection

NAME_PATTERN = r"^\w[\w.-]*$"
FACTORY_PATTERN = r"^[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*$"


class RunSection(Section):
    """The folder of the run, `<dir>/<name>/`, and the seed of its random numbers."""

    name: str = Field(default="run", pattern=NAME_PATTERN)
    dir: str = Field(default="runs", min_length=1)
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0


class ModelSizes(Section):
    """Sizes of the built-in byte-level GPT. `width` is that of the residual stream."""

    num_layers: PositiveInt = 4
    width: PositiveInt = 128
    num_heads: PositiveInt = 4
    tied_head: bool = True


class ModelSection(Section):
    """The model: `sizes` of the built-in one, or `factory` for your own.

    `factory` is `package.module:function`. It is called with `arguments` as keyword arguments.
    """

    sizes: ModelSizes | None = None
    factory: str | None = Field(default=None, pattern=FACTORY_PATTERN)
    arguments: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _default_to_the_built_in_model(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("factory") is None:
            return {"sizes": {}, **values}
        return values


class DataSection(Section):
    """The training text, read as bytes: a named `source`, or `path`, a glob over your own files."""

    source: Literal["python-stdlib"] | None = None
    path: str | None = Field(default=None, min_length=1)
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1

    @model_validator(mode="before")
    @classmethod
    def _default_to_the_standard_library(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("path") is None:
            return {"source": "python-stdlib", **values}
        return values


class TrainSection(Section):
    """The training loop.

    `batch_size` is the number of sequences in one rank's microbatch, `sequence_length` the number
    of tokens in each. `eval_every` is in steps; 0 evaluates only at the end. `eval_sequences` is
    the number of sequences of an evaluation, over all ranks.
    """

    num_steps: PositiveInt = 100
    batch_size: PositiveInt = 8
    sequence_length: PositiveInt = 128
    gradient_accumulation_steps: PositiveInt = 1
    dtype: Literal["fp32", "bf16"] = "fp32"
    eval_every: NonNegativeInt = 0
    eval_sequences: PositiveInt = 256


class ScheduleSection(Section):
    """The learning rate: linear warmup for `warmup_steps`, then cosine decay to a minimum.

    The minimum is `min_lr_ratio` times `optimizer.lr`. With a ratio of 1 the learning rate is
    constant after the warmup. A run that is shorter than its warmup has no decay.
    """

    warmup_steps: NonNegativeInt = 0
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1


# mypy does not accept a base class that a function returns.
class MemorySection(keys_of("memory")):  # type: ignore[misc]
    """Where the optimizer state is stored, and which host memory is pinned."""


class CoordinatorSection(keys_of("coordinator")):  # type: ignore[misc]
    """When a peer counts as dead or hung. A dead or hung rank ends the run on all ranks."""


class ProfileSection(Section):
    """Profiling: records spans, and samples memory every `interval_ms`.

    A profiled run writes `report.html`, `trace.json` and `memory.jsonl`.
    """

    enabled: bool = False
    interval_ms: Annotated[float, Field(ge=1)] = 100.0


class ObserveSection(Section):
    """Where metrics go besides `metrics.jsonl`.

    With `http_port`, rank 0 serves `/metrics` (Prometheus), `/status` (JSON) and `/healthz` on
    `http_host`, which is loopback by default. Port 0 lets the system choose a free port.
    """

    http_port: Annotated[int, Field(ge=0, le=65535)] | None = None
    http_host: str = Field(default="127.0.0.1", min_length=1)
    tensorboard: bool = False
    wandb_project: str | None = Field(default=None, min_length=1)


class CheckpointSection(Section):
    """When checkpoints are written, which are kept, and where a run resumes.

    A checkpoint is written after `every` steps; 0 writes none. With `mode: async`, training
    continues meanwhile: an update waits only for buckets that are neither written nor copied to
    the snapshot buffer. `snapshot_buffer_nbytes` limits the host memory of this buffer on each
    rank.

    The newest `keep_last` checkpoints are kept, and those whose step is a multiple of `keep_every`.
    If a checkpoint cannot be written, the run continues, unless checkpoints are `required`.

    `resume: auto` resumes from the newest intact checkpoint in the run's folder, `never` starts
    from step 0, and a path resumes from that checkpoint. A run that torchrun restarts always
    resumes from its newest checkpoint.
    """

    every: NonNegativeInt = 0
    mode: Literal["sync", "async"] = "sync"
    snapshot_buffer_nbytes: NonNegativeInt = 256 * 1024 * 1024
    keep_last: PositiveInt = 2
    keep_every: PositiveInt | None = None
    required: bool = False
    resume: str = Field(default="auto", min_length=1)

    @property
    def used_buffer_nbytes(self) -> int:
        """Limit of a rank's snapshot buffer in bytes: 0 unless checkpoints are asynchronous."""
        return self.snapshot_buffer_nbytes if self.mode == "async" and self.every > 0 else 0


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


TEXT_KEYS = frozenset(
    f"{name}.{key}"
    for name, section in RunConfig()
    for key, field in type(section).model_fields.items()
    if field.annotation in (str, str | None)
)
"""Dotted paths of the keys whose value is any text."""
