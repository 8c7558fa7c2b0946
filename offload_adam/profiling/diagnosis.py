"""What bounds a run, in a sentence, and which setting to change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from offload_adam.profiling.profile import RankProfile, self_times_ns, steps_of


class Resource(Enum):
    """What the training thread may be waiting for."""

    COMPUTE = "the model's own forward and backward"
    UPDATE = "the update on the host"
    COPIES = "copies between host and device"
    COLLECTIVES = "other ranks"
    DATA = "the data"


RESOURCE_OF = {
    "forward": Resource.COMPUTE,
    "backward": Resource.COMPUTE,
    "loss": Resource.COMPUTE,
    "norm": Resource.UPDATE,
    "update": Resource.UPDATE,
    "update wait": Resource.UPDATE,
    "copy down": Resource.COPIES,
    "copy up": Resource.COPIES,
    "pack": Resource.COPIES,
    "reduce": Resource.COLLECTIVES,
    "agree": Resource.COLLECTIVES,
    "gather": Resource.COLLECTIVES,
    "data": Resource.DATA,
}
"""Whom each span's time is charged to; what stands nowhere here is not charged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """The settings that a diagnosis may ask to change, as the run had them.

    num_cores: those that a rank may use; num_threads those that its update did.
    """

    num_threads: int
    num_cores: int
    pinned: bool
    on_device: bool
    streams: bool
    reduce_dtype: str | None
    dtype: str
    world_size: int
    gradient_accumulation_steps: int


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What bounds a run.

    shares: part of the step that each resource takes on the training thread, mean over ranks.
    setting: the key to change; empty where no setting helps.
    """

    resource: Resource
    shares: Mapping[Resource, float]
    step_ms: float
    setting: str
    advice: str

    @property
    def sentence(self) -> str:
        """Say it."""
        share = 100.0 * self.shares[self.resource]
        return (
            f"A step takes {self.step_ms:.1f} ms, and {share:.0f}% of it is spent on "
            f"{self.resource.value}. {self.advice}"
        )


def diagnose(profiles: Sequence[RankProfile], facts: RunFacts) -> Diagnosis | None:
    """Return what bounds the run, None where no step was recorded.

    The first step, which compiles and allocates, is left out where there are others.
    """
    charged: Counter[Resource] = Counter()
    total_ns = num_steps = 0
    for profile in profiles:
        steps = steps_of(profile.spans)
        steps = steps[1:] or steps
        for start_ns, end_ns, thread in ((s.start_ns, s.end_ns, s.thread) for s in steps):
            total_ns += end_ns - start_ns
            num_steps += 1
            inside = [
                span
                for span in profile.spans
                if span.thread == thread and start_ns <= span.start_ns and span.end_ns <= end_ns
            ]
            for span, own_ns in self_times_ns(inside):
                if span.name in RESOURCE_OF:
                    charged[RESOURCE_OF[span.name]] += own_ns
    if num_steps == 0 or total_ns == 0:
        return None
    shares = {resource: charged[resource] / total_ns for resource in Resource}
    resource = max(shares, key=lambda key: shares[key])
    setting, advice = _advice(resource, facts)
    return Diagnosis(resource, shares, total_ns / num_steps / 1e6, setting, advice)


def _advice(resource: Resource, facts: RunFacts) -> tuple[str, str]:
    """Return the setting to change and why, for what bounds the run."""
    match resource:
        case Resource.COMPUTE:
            return "", "The optimizer is not what bounds it: no setting of it makes steps faster."
        case Resource.UPDATE if facts.num_threads < facts.num_cores:
            return "optimizer.num_threads", (
                f"The update runs on {facts.num_threads} of {facts.num_cores} cores: raise "
                "optimizer.num_threads, or leave it out."
            )
        case Resource.UPDATE:
            return "--nproc-per-node", (
                "All cores are busy with it: with more ranks on more nodes each updates a smaller "
                "share; train.gradient_accumulation_steps makes updates rarer."
            )
        case Resource.COPIES if facts.on_device and not facts.pinned:
            return "memory.pin", "Host memory is not pinned: set memory.pin: true."
        case Resource.COPIES if facts.dtype == "fp32":
            return "train.dtype", "train.dtype: bf16 halves the bytes that are copied."
        case Resource.COPIES:
            return "train.gradient_accumulation_steps", (
                "Raise train.gradient_accumulation_steps: gradients and parameters are copied once "
                "a step."
            )
        case Resource.COLLECTIVES if facts.reduce_dtype is not None and facts.dtype != "fp32":
            return "optimizer.reduce_dtype", (
                "Gradients are averaged in fp32: optimizer.reduce_dtype: null halves the bytes."
            )
        case Resource.COLLECTIVES:
            return "train.gradient_accumulation_steps", (
                "Raise train.gradient_accumulation_steps: gradients are averaged and parameters "
                "gathered once a step."
            )
        case Resource.DATA:
            return "data", "Reading the data takes longest: a faster disk or smaller batches help."
