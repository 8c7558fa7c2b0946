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
    """The folder of the run, and its seed."""

    name: str = Field(
        default="run",
        pattern=NAME_PATTERN,
        max_length=255,
        description="Name of the run, which writes to the folder `<dir>/<name>/`. By default the "
        "name of the YAML file, or `run` without a file.",
    )
    dir: Text = Field(default="runs", description="Folder in which runs have their folders.")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        default=0, description="Seed of the weights, the order of the data, and dropout."
    )


class ModelSizes(Section):
    """Sizes of the built-in byte-level GPT."""

    num_layers: Annotated[int, Field(gt=0, le=1024)] = Field(
        default=4,
        description="Transformer blocks.",
    )
    width: Annotated[int, Field(gt=0, le=2**20)] = Field(
        default=128, description="Size of the residual stream, a multiple of `num_heads`."
    )
    num_heads: Annotated[int, Field(gt=0, le=2**20)] = Field(
        default=4, description="Attention heads of each block."
    )
    tied_head: bool = Field(
        default=True,
        description="Use the token embedding as the output layer, too.",
    )


class ModelSection(Section):
    """The model: `sizes` of the built-in GPT, or `factory` for a model of your own."""

    sizes: ModelSizes | None = Field(
        default=None, description="Sizes of the built-in byte-level GPT. Excludes `factory`."
    )
    factory: str | None = Field(
        default=None,
        pattern=FACTORY_PATTERN,
        max_length=4096,
        description="Function that returns your model, a torch.nn.Module, written "
        "`package.module:function`. The module is imported from sys.path, such as PYTHONPATH, or "
        "the working directory.",
    )
    # pydantic copies the default, so that configurations do not share it.
    arguments: dict[str, Any] = Field(default={}, description="Keyword arguments for `factory`.")

    @model_validator(mode="before")
    @classmethod
    def _default_to_the_built_in_model(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("factory") is None:
            return {"sizes": {}, **values}
        return values


class DataSection(Section):
    """The training text, read as bytes: a named `source`, or `path` for your own files."""

    source: Literal["python-stdlib"] | None = Field(
        default=None,
        description="Name of a text: 'python-stdlib', the source of Python's standard library. "
        "The default unless `path` is set.",
    )
    path: Text | None = Field(
        default=None,
        description="Glob over your own text files, such as notes/**/*.md. Excludes `source`.",
    )
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.1,
        description="About this fraction of the files is used for validation only. Of a single "
        "file, this fraction at its end.",
    )

    @model_validator(mode="before")
    @classmethod
    def _default_to_the_standard_library(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("path") is None:
            return {"source": "python-stdlib", **values}
        return values


class TrainSection(Section):
    """The training loop."""

    num_steps: Count = Field(default=100, description="Optimizer steps of the whole run.")
    batch_size: Count = Field(default=8, description="Sequences in one rank's microbatch.")
    sequence_length: Count = Field(default=128, description="Tokens in each sequence.")
    gradient_accumulation_steps: Count = Field(
        default=1, description="Microbatches of each rank in one step."
    )
    dtype: Literal["fp32", "bf16"] = Field(default="fp32", description="Dtype of the parameters.")
    eval_every: CountOrZero = Field(
        default=0,
        description="Steps from one validation to the next. The last step is always validated. "
        "0 for no other.",
    )
    eval_sequences: Count = Field(
        default=256, description="Sequences of a validation, of all ranks together."
    )


class ParallelSection(Section):
    """Shards the parameters over the ranks, with FSDP2 and tensor parallelism.

    Without this section, each rank has all parameters, and only the optimizer state is sharded. The
    run needs `replicate * shard * tensor` ranks. FSDP2 averages the gradients, so
    `optimizer.gradient_reduction` does not apply.
    """

    shard: Count | None = Field(
        default=None,
        description="Ranks over which each copy of the parameters is sharded. By default all that "
        "remain.",
    )
    replicate: Count = Field(default=1, description="Copies of the parameters.")
    tensor: Count = Field(
        default=1,
        description="Ranks that divide the heads and the MLP of each block of the built-in GPT, "
        "and train on the same sequences.",
    )
    offload_weights: bool = Field(
        default=False,
        description="Store the shards in host memory. Each block is copied to the GPU when it is "
        "used.",
    )
    reshard_after_forward: bool = Field(
        default=True,
        description="With false, a block stays gathered until its backward, which saves an "
        "all-gather and takes more memory.",
    )
    param_dtype: Literal["fp32", "bf16"] | None = Field(
        default=None,
        description="Dtype in which parameters are gathered and used. By default that of the "
        "parameters.",
    )
    reduce_dtype: Literal["fp32", "bf16"] | None = Field(
        default=None, description="Dtype in which gradients are averaged. By default `param_dtype`."
    )


class ScheduleSection(Section):
    """The learning rate: linear warmup, then cosine decay that ends at `train.num_steps`.

    A run that is shorter than its warmup has no decay.
    """

    warmup_steps: CountOrZero = Field(default=0, description="Steps of the linear warmup.")
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.1,
        description="Where the decay ends, as a fraction of the learning rate of the optimizer. "
        "With 1 the learning rate is constant after the warmup.",
    )


# mypy does not accept a base class that a function returns.
class MemorySection(keys_of("memory")):  # type: ignore[misc]
    """Where the optimizer state is stored, and which host memory is pinned.

    With `keep: shared` or `keeper`, a killed run that is started again on the same nodes completes
    the step that was decided last, and continues. By default, `keep_path` is a folder of this user
    and this run, in /dev/shm or /tmp. See docs/internals/kept-state.md.
    """


class CoordinatorSection(keys_of("coordinator")):  # type: ignore[misc]
    """When a rank counts as dead or hung, which ends the run on all ranks."""


class ProfileSection(Section):
    """Profiling: records how long each part of a step takes, and samples memory.

    A profiled run writes `report.html`, `trace.json` and `memory.jsonl` to its folder.
    """

    enabled: bool = Field(
        default=False,
        description="Profile the run, as `offload-adam profile` does.",
    )
    interval_ms: Annotated[float, Field(ge=1, le=86_400_000)] = Field(
        default=100.0, description="Milliseconds from one sample of the memory to the next."
    )


class ObserveSection(Section):
    """Where metrics are written or served, in addition to `metrics.jsonl` in the run's folder."""

    http_port: Annotated[int, Field(ge=0, le=65535)] | None = Field(
        default=None,
        description="Port on which rank 0 serves `/metrics` (Prometheus), `/status` (JSON) and "
        "`/healthz`. With 0 the system chooses a free port. By default nothing is served.",
    )
    http_host: Text = Field(
        default="127.0.0.1",
        description="Address on which `http_port` listens. The default is reachable from this "
        "machine only.",
    )
    tensorboard: bool = Field(
        default=False, description="Write the metrics for TensorBoard to the run's folder."
    )
    wandb_project: Text | None = Field(
        default=None, description="Project of Weights & Biases to which the metrics are sent."
    )


class CheckpointSection(Section):
    """When checkpoints are written, which are kept, and where a run resumes."""

    every: CountOrZero = Field(
        default=0,
        description="Steps from one checkpoint to the next. One is also written after the last "
        "step. With 0, one is written only if a signal ends the run early.",
    )
    mode: Literal["sync", "async"] = Field(
        default="sync",
        description="With 'async', training continues while a checkpoint is written: the update of "
        "a bucket waits only until the bucket is written, or copied to the snapshot buffer.",
    )
    snapshot_buffer_nbytes: Nbytes = Field(
        default=256 * 1024 * 1024,
        description="Largest host memory in bytes of the snapshot buffer, on each rank, with "
        "'async'.",
    )
    keep_last: Count = Field(default=2, description="The newest checkpoints that are kept.")
    keep_every: Count | None = Field(
        default=None,
        description="Checkpoints whose step is a multiple of this number are kept, too.",
    )
    required: bool = Field(
        default=False,
        description="End the run with an error if a checkpoint cannot be written. Otherwise it "
        "continues without this checkpoint.",
    )
    resume: Text = Field(
        default="auto",
        description="'auto' resumes from the newest intact checkpoint in the run's folder, or from "
        "state that `memory.keep` has kept if that is not older. 'never' begins at the first step. "
        "A path resumes from that checkpoint. A run that torchrun restarts always resumes as with "
        "'auto'.",
    )

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
