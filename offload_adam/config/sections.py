"""The sections of a run's configuration: every key, its type, its range and its default.

Only keys that something reads stand here: a key without effect would be worse than an unknown one.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    PositiveInt,
    StringConstraints,
    model_validator,
)

# A name that YAML reads as a number (`--run.name=7`) is still a name.
Name = Annotated[str, Field(strict=False, coerce_numbers_to_str=True)]
FACTORY_PATTERN = r"^[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*$"

_TORCH_DTYPE_NAMES = {"float32": "fp32", "bfloat16": "bf16"}


def _short_dtype(name: object) -> object:
    """Return the short form of torch's own dtype names, and everything else unchanged."""
    return _TORCH_DTYPE_NAMES.get(name, name) if isinstance(name, str) else name


ShortDtype = Annotated[Literal["fp32"], BeforeValidator(_short_dtype)]


class Section(BaseModel):
    """A mapping of the YAML file that admits no unknown key and no value of another type."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class RunSection(Section):
    """Where the run writes (`<dir>/<name>/`) and what it draws its random numbers from."""

    name: Annotated[Name, StringConstraints(pattern=r"^\w[\w.-]*$")] = "run"
    dir: Annotated[Name, StringConstraints(min_length=1)] = "runs"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0


class ModelSizes(Section):
    """The sizes of the byte-level GPT; `width` is that of the residual stream."""

    num_layers: PositiveInt = 4
    width: PositiveInt = 128
    num_heads: PositiveInt = 4
    tied_head: bool = True


class ModelSection(Section):
    """Either the sizes of the built-in model or the import path of the user's own.

    `factory` is `package.module:function`, called with `arguments` as keywords.
    """

    sizes: ModelSizes | None = None
    factory: Annotated[str, StringConstraints(pattern=FACTORY_PATTERN)] | None = None
    arguments: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _default_to_the_built_in_model(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("factory") is None:
            return {"sizes": {}, **values}
        return values


class DataSection(Section):
    """Either a named source or a glob over the user's own files, read as bytes."""

    source: Literal["python-stdlib"] | None = None
    path: Annotated[str, StringConstraints(min_length=1)] | None = None
    validation_fraction: Annotated[FiniteFloat, Field(gt=0, lt=1)] = 0.1

    @model_validator(mode="before")
    @classmethod
    def _default_to_the_standard_library(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("path") is None:
            return {"source": "python-stdlib", **values}
        return values


class TrainSection(Section):
    """How long and in what portions to train.

    `batch_size` counts the sequences of one rank's microbatch, `sequence_length` is in tokens.
    `eval_every` is in steps, and 0 evaluates at the end only; `eval_sequences` is over all ranks.
    """

    num_steps: PositiveInt = 100
    batch_size: PositiveInt = 8
    sequence_length: PositiveInt = 128
    gradient_accumulation_steps: PositiveInt = 1
    dtype: Annotated[Literal["fp32", "bf16"], BeforeValidator(_short_dtype)] = "fp32"
    eval_every: Annotated[int, Field(ge=0)] = 0
    eval_sequences: PositiveInt = 256


class ScheduleSection(Section):
    """The learning rate: `warmup_steps` upwards in a line, then a cosine down to a floor.

    The floor is `min_lr_ratio` times `optimizer.lr`; 1 keeps the rate constant after the warmup.
    A run that is shorter than its warmup ends within it.
    """

    warmup_steps: Annotated[int, Field(ge=0)] = 0
    min_lr_ratio: Annotated[FiniteFloat, Field(ge=0, le=1)] = 0.1


class MemorySection(Section):
    """What is page-locked for a GPU: all state, the buffers of copies only, or nothing.

    `offload_fraction` of the elements have their state on the host, the others on the GPU.
    `allow_overcommit` starts a run whose state the node seems to have no memory for.
    """

    pin: Literal["all", "staging", "none"] = "all"
    offload_fraction: Annotated[FiniteFloat, Field(ge=0, le=1)] = 1.0
    allow_overcommit: bool = False


class CoordinatorSection(Section):
    """How long ranks bear with each other, in seconds.

    A rank without a heartbeat for `dead_after` is dead. One that lives, but does not get on while
    others have waited for it for `stuck_after`, is stuck. Either ends the run on all of them.
    """

    dead_after: Annotated[FiniteFloat, Field(gt=0)] = 10.0
    stuck_after: Annotated[FiniteFloat, Field(gt=0)] = 300.0


class ProfileSection(Section):
    """Whether spans and memory are recorded, and how often memory is sampled.

    A profiled run writes `report.html`, `trace.json` and `memory.jsonl`.
    """

    enabled: bool = False
    interval_ms: Annotated[FiniteFloat, Field(ge=1)] = 100.0


class ObserveSection(Section):
    """Where metrics go besides `metrics.jsonl`.

    `http_port` serves `/status`, `/metrics` and a live page on rank 0, on loopback unless
    `http_host` says otherwise; 0 lets the system choose a port.
    """

    http_port: Annotated[int, Field(ge=0, le=65535)] | None = None
    http_host: Annotated[str, StringConstraints(min_length=1)] = "127.0.0.1"
    tensorboard: bool = False
    wandb_project: Annotated[str, StringConstraints(min_length=1)] | None = None


class CheckpointSection(Section):
    """When checkpoints are written (`every` steps, 0 for never) and which are kept.

    `mode: async` lets training go on while one is written. Updates wait for what has neither been
    written yet nor been copied: `room_nbytes` is the host memory of a rank for copies, at most.
    `keep_last` of them stay, and those whose step is a multiple of `keep_every`. `resume: auto`
    goes on from the newest whole one of the run's folder, a path from that one, `never` begins;
    what torchrun restarts goes on from the newest in any case. A checkpoint that cannot be written
    ends the run only where it is `required`.
    """

    every: Annotated[int, Field(ge=0)] = 0
    mode: Literal["sync", "async"] = "sync"
    room_nbytes: Annotated[int, Field(ge=0)] = 256 * 1024 * 1024
    keep_last: PositiveInt = 2
    keep_every: PositiveInt | None = None
    required: bool = False
    resume: Annotated[Name, StringConstraints(min_length=1)] = "auto"

    @property
    def held_nbytes(self) -> int:
        """Host bytes that a rank keeps for copies, at most: 0 where nothing is written beside."""
        return self.room_nbytes if self.mode == "async" and self.every > 0 else 0
