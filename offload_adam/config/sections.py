"""The sections of a run's configuration: every key, its type, its range and its default.

Only keys that something reads stand here: a key without effect would be worse than an unknown one.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    FiniteFloat,
    PositiveInt,
    StringConstraints,
    model_validator,
)

from offload_adam.config.declared import Section, keys_of, short_dtype

# A name that YAML reads as a number (`--run.name=7`) is still a name.
Name = Annotated[str, Field(strict=False, coerce_numbers_to_str=True)]
FACTORY_PATTERN = r"^[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*$"


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
    arguments: dict[str, Any] = Field(default_factory=dict)

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
    dtype: Annotated[Literal["fp32", "bf16"], short_dtype(float32="fp32", bfloat16="bf16")] = "fp32"
    eval_every: Annotated[int, Field(ge=0)] = 0
    eval_sequences: PositiveInt = 256


class ScheduleSection(Section):
    """The learning rate: `warmup_steps` upwards in a line, then a cosine down to a floor.

    The floor is `min_lr_ratio` times `optimizer.lr`; 1 keeps the rate constant after the warmup.
    A run that is shorter than its warmup ends within it.
    """

    warmup_steps: Annotated[int, Field(ge=0)] = 0
    min_lr_ratio: Annotated[FiniteFloat, Field(ge=0, le=1)] = 0.1


# mypy cannot see the keys of a created base class, and takes them for Any.
class MemorySection(keys_of("memory")):  # type: ignore[misc]
    """Which memory holds the optimizer's state, and what of it is page-locked for a GPU."""


class CoordinatorSection(keys_of("coordinator")):  # type: ignore[misc]
    """When ranks give up on each other. A dead or a hung rank ends the run on all of them."""


class ProfileSection(Section):
    """Whether spans and memory are recorded, and how often memory is sampled.

    A profiled run writes `report.html`, `trace.json` and `memory.jsonl`.
    """

    enabled: bool = False
    interval_ms: Annotated[FiniteFloat, Field(ge=1)] = 100.0


class ObserveSection(Section):
    """Where metrics go besides `metrics.jsonl`.

    `http_port` serves `/metrics` (Prometheus), `/status` (JSON) and `/healthz` on rank 0; 0 lets
    the system choose a port. `http_host` is the address to listen on, loopback by default.
    """

    http_port: Annotated[int, Field(ge=0, le=65535)] | None = None
    http_host: Annotated[str, StringConstraints(min_length=1)] = "127.0.0.1"
    tensorboard: bool = False
    wandb_project: Annotated[str, StringConstraints(min_length=1)] | None = None


class CheckpointSection(Section):
    """When checkpoints are written (`every` steps, 0 for never) and which are kept.

    `mode: async` lets training go on while one is written. Updates wait for what has neither been
    written yet nor been copied. `snapshot_buffer_nbytes` limits a rank's host memory for copies.
    `keep_last` of them stay, and those whose step is a multiple of `keep_every`. `resume: auto`
    goes on from the newest whole one of the run's folder, a path from that one, `never` begins;
    what torchrun restarts goes on from the newest in any case. A checkpoint that cannot be written
    ends the run only where it is `required`.
    """

    every: Annotated[int, Field(ge=0)] = 0
    mode: Literal["sync", "async"] = "sync"
    snapshot_buffer_nbytes: Annotated[int, Field(ge=0)] = 256 * 1024 * 1024
    keep_last: PositiveInt = 2
    keep_every: PositiveInt | None = None
    required: bool = False
    resume: Annotated[Name, StringConstraints(min_length=1)] = "auto"

    @property
    def used_buffer_nbytes(self) -> int:
        """Most host bytes of a rank's snapshot buffer: 0 without checkpoints in the background."""
        return self.snapshot_buffer_nbytes if self.mode == "async" and self.every > 0 else 0
