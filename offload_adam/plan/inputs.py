"""The inputs of a plan: sizes of the parameters, how they are trained, and the machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from offload_adam.layout.flat import ParameterSpec
from offload_adam.layout.ring import RingSpeed
from offload_adam.layout.state_plan import StatePlan, StatePolicy, plan_state
from offload_adam.options import OffloadPolicy, StateFormat, check_options, resolve_overlap
from offload_adam.plan.shape import COMMUNICATION_NBYTES, CONTEXT_NBYTES, ModelShape

SYNTHETIC_NUMEL = 50_000_000
"""Elements of a parameter of a model of which only the size is known."""
MOST_SYNTHETIC = 4_000
"""Largest number of such parameters: in a larger model each has more elements instead."""
_LEAST_EQUAL = 20
"""Number of such parameters from which all have equal sizes."""
MOST_NUMEL = 10**15


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How a model is trained, as far as memory and time depend on it.

    on_device: parameters are on a GPU, their state on the host.
    streams: gradients are averaged and copied during backward, bucket by bucket.
    reduces: the optimizer averages the gradients over the ranks; if not, another library does.
    overlap: the optimizer's argument of this name.
    accumulates: several backwards of a step add up in the gradient shards, in fp32.
    accumulates_later: without `accumulates`, a step runs several backwards outside `no_sync()`. The
        optimizer then takes memory for their sums.
    reduce_fp32: 16-bit gradients are averaged in fp32.
    state_format: the format of the state of tensors with two or more dimensions.
    replicated: every rank stores all state, where its parameters are.
    sharded: FSDP2 shards the parameters and averages the gradients. The planned parameters are
        then the parts of one rank.
    gathered_nbytes: of the layers that FSDP2 has gathered and the gradients that it averages.
    gathers_on_device: the layers are gathered on a GPU, also if the parts are on the host.
    offload: where state is stored, the bucket size, what is pinned, and the snapshot buffer.
    buffers_nbytes: of the model's persistent buffers, which kept state has for each step.
    saves: checkpoints are written.
    num_tokens: tokens of one rank in a step, over all microbatches; None if unknown.
    frozen_nbytes: of parameters that are not trained, on one rank.
    shape: sizes from which activations are estimated; None leaves them out, and CUDA's own memory.
    batch_size: sequences of one rank in one forward, whose activations are in memory at once.
    sequence_length: tokens of a sequence.
    checkpointing: layers are recomputed in the backward (activation checkpointing).
    """

    world_size: int = 1
    local_world_size: int = 1
    on_device: bool = True
    streams: bool = True
    reduces: bool = True
    overlap: bool | None = None
    accumulates: bool = False
    accumulates_later: bool = False
    reduce_fp32: bool = False
    amsgrad: bool = False
    state_format: StateFormat = "fp32"
    replicated: bool = False
    sharded: bool = False
    gathered_nbytes: int = 0
    gathers_on_device: bool = False
    offload: OffloadPolicy = OffloadPolicy()
    buffers_nbytes: int = 0
    saves: bool = False
    num_tokens: int | None = None
    frozen_nbytes: int = 0
    shape: ModelShape | None = None
    batch_size: int = 1
    sequence_length: int = 0
    checkpointing: bool = False

    def __post_init__(self) -> None:
        check_options(self.offload)
        for name in ("world_size", "local_world_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.world_size % self.local_world_size:
            raise ValueError(
                f"world_size ({self.world_size}) must be a multiple of local_world_size "
                f"({self.local_world_size})"
            )
        if self.state_format != "fp32" and not self.allows_low_precision:
            raise ValueError(
                f"state_format {self.state_format!r} needs state in host memory and no amsgrad: "
                "remove amsgrad, offload_fraction and use_offload: false"
            )

    @property
    def allows_low_precision(self) -> bool:
        """Whether the other settings allow state in low precision."""
        offloads = self.offload.offload_fraction == 1.0 and not self.replicated
        return (offloads or not self.on_device) and not self.amsgrad

    @property
    def uses_device(self) -> bool:
        """Whether the model runs on a GPU, also if its weights are in host memory."""
        return self.on_device or self.gathers_on_device

    @property
    def activation_nbytes(self) -> int:
        """Return an estimate of the bytes of one rank's activations; 0 without a shape."""
        if self.shape is None:
            return 0
        num_tokens = self.batch_size * self.sequence_length
        return self.shape.activation_nbytes(num_tokens, checkpointing=self.checkpointing)

    @property
    def context_nbytes(self) -> int:
        """Return an estimate of what CUDA and NCCL take of a GPU; 0 without a shape."""
        if self.shape is None or not self.uses_device:
            return 0
        return CONTEXT_NBYTES + (COMMUNICATION_NBYTES if self.world_size > 1 else 0)

    @property
    def overlaps(self) -> bool:
        """Return whether updates run during the next forward."""
        hooked = self.streams and not self.replicated
        reduces = self.reduces or self.sharded
        return resolve_overlap(
            self.overlap, hooked=hooked, reduces=reduces, on_device=self.on_device
        )

    @property
    def policy(self) -> StatePolicy:
        """Return the policy that the optimizer would use for these options and this world."""
        streams = self.streams and (self.reduces or self.sharded) and not self.replicated
        return StatePolicy.from_options(
            self.offload,
            world_size=self.world_size,
            reduces=self.reduces,
            accumulates=self.accumulates,
            accumulates_later=self.accumulates_later and streams,
            reduces_in_fp32=self.reduce_fp32,
            streams=streams,
            replicated=self.replicated,
            sharded=self.sharded,
        )

    def with_offload(self, **options: Any) -> Training:
        """Return a copy with changed options of `offload`."""
        return replace(self, offload=replace(self.offload, **options))

    def plan(self, specs: Sequence[ParameterSpec]) -> tuple[StatePlan, ...]:
        """Return how the optimizer would store the state of these parameters.

        Args:
            specs: parameters. Those with `follows_state_format` get the format of this training.
        """
        is_low = self.state_format != "fp32"
        low_key = f"+{self.state_format} state"
        return plan_state(
            [
                # Not `replace`, which takes several times as long: there may be 1e5 of them.
                ParameterSpec(
                    spec.index,
                    spec.numel,
                    spec.itemsize,
                    spec.bucket_key + (low_key if is_low and spec.follows_state_format else ""),
                    amsgrad=self.amsgrad,
                    on_device=self.on_device,
                    unit=spec.unit,
                    padded_numel=spec.padded_numel,
                    num_shards=spec.num_shards,
                    state_format=self.state_format if spec.follows_state_format else "fp32",
                    is_bfloat16=spec.is_bfloat16,
                )
                for spec in specs
            ],
            self.policy,
        )


class Source(StrEnum):
    """Where a speed comes from. Users see the values."""

    GIVEN = "given"
    MEASURED = "measured now"
    KEPT = "measured by doctor"


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The memory and the speeds of one node; None where unknown.

    host_nbytes, device_nbytes: memory that a run may use, of the node and of one GPU.
    host_gb_per_s: bandwidth of an optimizer step in the planned state format, with the threads of
        all ranks of a node, in 1e9 bytes read and written a second.
    bus_gb_per_s: bandwidth of one GPU's copies in one direction.
    network: bandwidth at which a rank sends in collectives.
    tera_flops: speed of one rank's forward and backward, in 1e12 operations a second.
    sources: where the speeds of "update" (host_gb_per_s), "bus" and "network" come from. A speed
        that is not listed was given.
    """

    host_nbytes: int | None = None
    device_nbytes: int | None = None
    host_gb_per_s: float | None = None
    bus_gb_per_s: float | None = None
    network: RingSpeed | None = None
    tera_flops: float | None = None
    sources: Mapping[str, Source] = field(default_factory=dict)

    def source_of(self, resource: str) -> Source:
        """Return where the speed of a resource comes from."""
        return self.sources.get(resource, Source.GIVEN)


def synthetic_specs(
    numel: int, itemsize: int, *, is_bfloat16: bool | None = None
) -> list[ParameterSpec]:
    """Return parameters with `numel` elements together, for a model of which nothing else is known.

    Args:
        is_bfloat16: see `ParameterSpec`. None assumes that 16-bit parameters are bfloat16.

    Raises:
        ValueError: `numel` is not between 1 and MOST_NUMEL.
    """
    if not 1 <= numel <= MOST_NUMEL:
        raise ValueError(
            f"the number of parameters must be at least 1 and at most {MOST_NUMEL:.0e}, not "
            f"{numel:.6g}"
        )
    num_parameters = min(MOST_SYNTHETIC, -(-numel // SYNTHETIC_NUMEL))
    if num_parameters < _LEAST_EQUAL:
        # If few parameters were equal, one more would make each of them, and its bucket, much
        # smaller. From _LEAST_EQUAL on, this lowers the predicted memory by about 0.1% at most.
        whole, rest = divmod(numel, SYNTHETIC_NUMEL)
        sizes = [SYNTHETIC_NUMEL] * whole + ([rest] if rest else [])
    else:
        # Equal parameters fill buckets equally. A smaller last one could make its bucket larger
        # than all others, and all slots with it: slots have the size of the largest bucket.
        smaller, num_larger = divmod(numel, num_parameters)
        sizes = [smaller + 1] * num_larger + [smaller] * (num_parameters - num_larger)
    if is_bfloat16 is None:
        is_bfloat16 = itemsize == 2
    kind = f"{itemsize} bytes"
    return [
        ParameterSpec(i, size, itemsize, kind, is_bfloat16=is_bfloat16, follows_state_format=True)
        for i, size in enumerate(sizes)
    ]


def typical_specs(
    numel: int, itemsize: int, *, is_bfloat16: bool | None = None
) -> list[ParameterSpec]:
    """Return the parameters of a typical transformer: its embedding first, then its layers.

    A large embedding has a bucket of its own, which decides the size of buffers.

    Raises:
        ValueError: as of `synthetic_specs`.
    """
    embedding = ModelShape.typical(numel).root_numel if 1 <= numel <= MOST_NUMEL else 0
    if not 0 < embedding < numel:
        return synthetic_specs(numel, itemsize, is_bfloat16=is_bfloat16)
    layers = synthetic_specs(numel - embedding, itemsize, is_bfloat16=is_bfloat16)
    return [replace(layers[0], index=len(layers), numel=embedding), *layers]


def total_numel(specs: Sequence[ParameterSpec]) -> int:
    """Return the number of elements of all parameters."""
    return sum(spec.numel for spec in specs)
