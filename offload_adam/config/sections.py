"""The configuration of a run and its sections: every key with its type, range and default.

The docstrings of sections are for users: `offload-adam config` prints them. The section `optimizer`
is in optimizer_sections.py, and the keys of options are declared in offload_adam/options.py.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from offload_adam.config.declared import Count, CountOrZero, Nbytes, Section, Text, keys_of
from offload_adam.config.optimizer_sections import OffloadAdamSection, OptimizerSection

NAME_PATTERN = r"^\w[\w.-]*$"
FACTORY_PATTERN = r"^[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*$"


class RunSection(Section):
    """The folder of the run, `<dir>/<name>/`, and the seed of weights, data and dropout."""

    name: str = Field(default="run", pattern=NAME_PATTERN, max_length=255)
    dir: Text = "runs"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0


class ModelSizes(Section):
    """Sizes of the built-in byte-level GPT. `width` is the size of the residual stream."""

    num_layers: Annotated[int, Field(gt=0, le=1024)] = 4
    width: Annotated[int, Field(gt=0, le=2**20)] = 128
    num_heads: Annotated[int, Field(gt=0, le=2**20)] = 4
    tied_head: bool = True


class ModelSection(Section):
    """The model: `sizes` of the built-in GPT, or `factory` for a model of your own.

    `factory` is written `package.module:function`. The function is called with `arguments` as
    keyword arguments and returns a torch.nn.Module.
    """

    sizes: ModelSizes | None = None
    factory: str | None = Field(default=None, pattern=FACTORY_PATTERN, max_length=4096)
    arguments: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _default_to_the_built_in_model(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("factory") is None:
            return {"sizes": {}, **values}
        return values


class DataSection(Section):
    """The training text, read as bytes: a named `source`, or `path`, a glob over your own files.

    About `validation_fraction` of the files are used for validation only. Of a single file, this
    fraction at its end is used for validation.
    """

    source: Literal["python-stdlib"] | None = None
    path: Text | None = None
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1

    @model_validator(mode="before")
    @classmethod
    def _default_to_the_standard_library(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("path") is None:
            return {"source": "python-stdlib", **values}
        return values


class TrainSection(Section):
    """The training loop.

    `batch_size` is the number of sequences in one rank's microbatch, and `sequence_length` the
    number of tokens in each. `dtype` is the dtype of the parameters. The validation loss is
    computed every `eval_every` steps (0: never) and after the last step, over `eval_sequences`
    sequences of all ranks together.
    """

    num_steps: Count = 100
    batch_size: Count = 8
    sequence_length: Count = 128
    gradient_accumulation_steps: Count = 1
    dtype: Literal["fp32", "bf16"] = "fp32"
    eval_every: CountOrZero = 0
    eval_sequences: Count = 256


class ParallelSection(Section):
    """Shards the parameters over the ranks, with FSDP2 and tensor parallelism.

    Without this section, each rank has all parameters, and only the optimizer state is sharded.

    The run needs `replicate * shard * tensor` ranks. There are `replicate` copies of the
    parameters, each sharded over `shard` ranks, by default all that remain. `tensor` ranks divide
    the heads and the MLP of each block of the built-in GPT, and train on the same sequences. FSDP2
    averages the gradients, so `optimizer.gradient_reduction` does not apply.

    With `offload_weights`, the shards are in host memory, and each block is copied to the GPU when
    it is used. With `reshard_after_forward: false`, a block stays gathered until its backward,
    which saves an all-gather and takes more memory. Parameters are gathered and used in
    `param_dtype`, and gradients are averaged in `reduce_dtype`. By default, these are the dtype of
    the parameters and `param_dtype`.
    """

    shard: Count | None = None
    replicate: Count = 1
    tensor: Count = 1
    offload_weights: bool = False
    reshard_after_forward: bool = True
    param_dtype: Literal["fp32", "bf16"] | None = None
    reduce_dtype: Literal["fp32", "bf16"] | None = None


class ScheduleSection(Section):
    """The learning rate: linear warmup for `warmup_steps`, then cosine decay to a minimum.

    The decay ends at `train.num_steps`. The minimum is `min_lr_ratio` times the learning rate of
    the optimizer. With a ratio of 1 the learning rate is constant after the warmup. A run that is
    shorter than its warmup has no decay.
    """

    warmup_steps: CountOrZero = 0
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1


# mypy does not accept a base class that a function returns.
class MemorySection(keys_of("memory")):  # type: ignore[misc]
    """Where the optimizer state is stored, and which host memory is pinned.

    With `keep: shared` or `keeper`, a killed run that is started again on the same nodes completes
    the step that was decided last, and continues. By default, `keep_path` is a folder of this user
    and this run, in /dev/shm or /tmp. See docs/kept_state.md.
    """


class CoordinatorSection(keys_of("coordinator")):  # type: ignore[misc]
    """When a rank counts as dead or hung, which ends the run on all ranks."""


class ProfileSection(Section):
    """Profiling: records how long each part of a step takes, and samples memory.

    Memory is sampled every `interval_ms`. A profiled run writes `report.html`, `trace.json` and
    `memory.jsonl` to its folder.
    """

    enabled: bool = False
    interval_ms: Annotated[float, Field(ge=1, le=86_400_000)] = 100.0


class ObserveSection(Section):
    """Where metrics are written or served, in addition to `metrics.jsonl` in the run's folder.

    With `http_port`, rank 0 serves `/metrics` (Prometheus), `/status` (JSON) and `/healthz` on
    `http_host`, which is loopback by default. With port 0 the system chooses a free port.
    """

    http_port: Annotated[int, Field(ge=0, le=65535)] | None = None
    http_host: Text = "127.0.0.1"
    tensorboard: bool = False
    wandb_project: Text | None = None


class CheckpointSection(Section):
    """When checkpoints are written, which are kept, and where a run resumes.

    A checkpoint is written every `every` steps and after the last step. With 0, one is written only
    if a signal ends the run early. With `mode: async`, training continues while a checkpoint is
    written: the update of a bucket waits only until the bucket is written, or copied to the
    snapshot buffer. `snapshot_buffer_nbytes` limits the host memory of this buffer on each rank.

    The newest `keep_last` checkpoints are kept, and those whose step is a multiple of `keep_every`.
    If a checkpoint cannot be written, the run continues without it, unless checkpoints are
    `required`: then the run ends with an error.

    `resume: auto` resumes from the newest intact checkpoint in the run's folder, or from state that
    `memory.keep` has kept if that is not older. `never` begins at the first step. A path resumes
    from that checkpoint. A run that torchrun restarts always resumes as with `auto`.
    """

    every: CountOrZero = 0
    mode: Literal["sync", "async"] = "sync"
    snapshot_buffer_nbytes: Nbytes = 256 * 1024 * 1024
    keep_last: Count = 2
    keep_every: Count | None = None
    required: bool = False
    resume: Text = "auto"

    @property
    def used_buffer_nbytes(self) -> int:
        """Limit of a rank's snapshot buffer in bytes: 0 if no checkpoint is async."""
        return self.snapshot_buffer_nbytes if self.mode == "async" and self.every > 0 else 0


class RunConfig(Section):
    """The configuration of a run. Each field is a section of the YAML file.

    A section that is None has no defaults, but turns something on if it is given, even if empty.
    """

    run: RunSection = RunSection()
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    train: TrainSection = TrainSection()
    parallel: ParallelSection | None = None
    optimizer: OptimizerSection = OffloadAdamSection()
    schedule: ScheduleSection = ScheduleSection()
    memory: MemorySection = MemorySection()
    coordinator: CoordinatorSection = CoordinatorSection()
    checkpoint: CheckpointSection = CheckpointSection()
    profile: ProfileSection = ProfileSection()
    observe: ObserveSection = ObserveSection()


COMPLETE = RunConfig(parallel=ParallelSection())
"""The defaults of every section, also of those that a configuration may lack."""

TEXT_KEYS = frozenset(
    f"{name}.{key}"
    for name, section in COMPLETE
    for key, field in type(section).model_fields.items()
    if field.annotation in (str, str | None, Text | None)
)
"""Dotted paths of the keys whose value may be any text, even text that looks like a number."""
