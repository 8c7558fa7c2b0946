"""What bounds a run, in a sentence, and which setting to change."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from offload_adam.observe.spans import Span
from offload_adam.profiling.profile import RankProfile, inside_steps, self_times_ns, steps_of


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
    "wait": Resource.UPDATE,
    "copy down": Resource.COPIES,
    "copy up": Resource.COPIES,
    "pack": Resource.COPIES,
    "reduce": Resource.COLLECTIVES,
    "agree": Resource.COLLECTIVES,
    "gather": Resource.COLLECTIVES,
    "all-reduce": Resource.COLLECTIVES,
    "data": Resource.DATA,
}
"""Whom each span's time is charged to; what stands nowhere here is not charged."""

WAITS = frozenset({"wait", "reduce", "norm"})
"""Spans of the training thread that may be waits for another thread of its rank: where there is
one that works, they are charged to what it does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """The settings that a diagnosis may ask to change, as the run had them.

    num_cores: those that a rank may use; num_threads those that its update did.
    pinned: all host state is.
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
        background = _Background(profile.spans)
        for step, inside in inside_steps(profile.spans):
            total_ns += step.end_ns - step.start_ns
            num_steps += 1
            for span, own_ns in self_times_ns(inside):
                if span.name in RESOURCE_OF:
                    charged.update(background.charge(span, own_ns))
    if num_steps == 0 or total_ns == 0:
        return None
    shares = {resource: charged[resource] / total_ns for resource in Resource}
    resource = max(shares, key=lambda key: shares[key])
    setting, advice = _advice(resource, facts)
    return Diagnosis(resource, shares, total_ns / num_steps / 1e6, setting, advice)


class _Background:
    """What the threads beside the training thread do, to be charged for its waits."""

    def __init__(self, spans: Sequence[Span]) -> None:
        training = {step.thread for step in steps_of(spans)}
        self._spans = [s for s in spans if s.thread not in training and s.name in RESOURCE_OF]
        self._starts = [span.start_ns for span in self._spans]
        self._longest_ns = max((s.end_ns - s.start_ns for s in self._spans), default=0)

    def charge(self, span: Span, own_ns: int) -> Mapping[Resource, int]:
        """Return whom a span of the training thread costs its time."""
        shared = self._beside(span) if span.name in WAITS else {}
        total_ns = sum(shared.values())
        if total_ns == 0:
            return {RESOURCE_OF[span.name]: own_ns}
        return {resource: own_ns * part // total_ns for resource, part in shared.items()}

    def _beside(self, span: Span) -> Mapping[Resource, int]:
        """Return the nanoseconds of each resource on other threads during a span."""
        first = bisect_left(self._starts, span.start_ns - self._longest_ns)
        last = bisect_left(self._starts, span.end_ns)
        shared: Counter[Resource] = Counter()
        for other in self._spans[first:last]:
            common_ns = min(other.end_ns, span.end_ns) - max(other.start_ns, span.start_ns)
            shared[RESOURCE_OF[other.name]] += max(0, common_ns)
        return shared


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
            return "memory.pin", (
                "Host state is not pinned: set memory.pin: all, and lift the limit of locked "
                "memory (ulimit -l)."
            )
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
