"""What limits a run, in a sentence, and which setting to change."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from offload_adam.profiling.lateness import with_late_ranks
from offload_adam.profiling.phases import BETWEEN_RANKS, LATE, PHASES, WAITS, Resource
from offload_adam.profiling.profile import RankProfile, inside_steps, self_times_ns, steps_of
from offload_adam.spans import Span

NOTABLE_SHARE = 0.1
"""Of a step: a rank that is late by this much is always named."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """Settings of the run that the advice depends on.

    num_threads: threads of each rank's update. num_cores: cores that it could have used.
    pinned: all state in host memory is pinned.
    """

    num_threads: int
    num_cores: int
    pinned: bool
    on_device: bool
    reduce_dtype: str | None
    dtype: str


@dataclass(frozen=True, slots=True)
class LateRank:
    """The rank that accounts for most of the time that ranks wait for late ranks.

    late_ms: time that the other ranks wait for this rank, minus the time that it waits itself; mean
        over the other ranks and the steps.
    phase: the one that takes this rank longer than the other ranks; "" if no phase explains half of
        `late_ms`.
    sentence: what was found and what to check.
    """

    rank: int
    late_ms: float
    phase: str
    sentence: str


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What limits a run.

    resource: takes the largest share of a step.
    shares: part of the step that the training thread spends on each resource, mean over ranks. The
        time by which `late` is late counts as lateness on that rank, too, and not as its own work.
    setting: the key to change; "" if no setting helps.
    sentence: what was found and what to do.
    late: the latest rank, if it costs a notable part of the step.
    """

    resource: Resource
    shares: Mapping[Resource, float]
    step_ms: float
    setting: str
    sentence: str
    late: LateRank | None = None


def diagnose(profiles: Sequence[RankProfile], facts: RunFacts) -> Diagnosis | None:
    """Return what limits the run, None if no step was recorded.

    The first step, which compiles and allocates, is skipped unless it is the only one.
    """
    ranks = [rank for rank in map(_charge, with_late_ranks(profiles)) if rank.total_ns > 0]
    if not ranks:
        return None
    late = _latest(ranks)
    if late is not None:
        slow = next(rank for rank in ranks if rank.profile.rank == late.rank)
        slow.move_to_lateness(round(late.late_ms * 1e6) * slow.num_steps)
    total_ns = sum(rank.total_ns for rank in ranks)
    step_ms = total_ns / sum(rank.num_steps for rank in ranks) / 1e6
    shares = {each: sum(rank.charged[each] for rank in ranks) / total_ns for each in Resource}
    # Lateness and transfers compete with the other resources as one: the same settings reduce both.
    resource = max((r for r in Resource if r not in BETWEEN_RANKS), key=lambda r: shares[r])
    spent = f"{shares[resource]:.0%} of it is spent on {resource.value}"
    together = sum(shares[part] for part in BETWEEN_RANKS)
    if together > shares[resource]:
        parts = sorted(BETWEEN_RANKS, key=lambda part: -shares[part])
        resource = parts[0]
        named = ", ".join(f"{shares[part]:.0%} on {part.value}" for part in parts)
        spent = f"{together:.0%} of it is spent on other ranks: {named}"
    setting, advice = _advice(resource, facts, late)
    if late and late.late_ms < NOTABLE_SHARE * step_ms and resource is not Resource.LATENESS:
        late = None
    sentences = [
        f"A step takes {step_ms:.1f} ms, and {spent}.",
        advice,
        late.sentence if late else "",
    ]
    return Diagnosis(resource, shares, step_ms, setting, " ".join(filter(None, sentences)), late)


@dataclass
class _Charges:
    """Where the time of one rank's steps goes, in nanoseconds.

    charged: by resource.
    waited: time that this rank waited for late ranks, by late rank.
    by_phase: time in phases other than collectives.
    """

    profile: RankProfile
    total_ns: int = 0
    num_steps: int = 0
    charged: Counter[Resource] = field(default_factory=Counter)
    waited: Counter[int] = field(default_factory=Counter)
    by_phase: Counter[str] = field(default_factory=Counter)

    def move_to_lateness(self, late_ns: int) -> None:
        """Charge `late_ns` to lateness, taken from all other resources in proportion."""
        busy_ns = self.charged.total() - self.charged[Resource.LATENESS]
        late_ns = min(late_ns, busy_ns)
        for resource in self.charged.keys() - {Resource.LATENESS}:
            self.charged[resource] -= self.charged[resource] * late_ns // max(1, busy_ns)
        self.charged[Resource.LATENESS] += late_ns


def _charge(profile: RankProfile) -> _Charges:
    """Charge the time of one rank's training thread to the resources."""
    found = _Charges(profile)
    training = {step.thread for step in steps_of(profile.spans)}
    others = [s for s in profile.spans if s.thread not in training and s.name in PHASES]
    starts = [span.start_ns for span in others]
    longest_ns = max((span.end_ns - span.start_ns for span in others), default=0)

    def causes(span: Span) -> Mapping[tuple[str, int], int]:
        """Return the nanoseconds of other threads' phases and buckets during a wait."""
        shared: Counter[tuple[str, int]] = Counter()
        # Spans are sorted by start; one that overlaps starts at most the longest span earlier.
        first = bisect_left(starts, span.start_ns - longest_ns)
        for other in others[first : bisect_left(starts, span.end_ns)]:
            common_ns = min(other.end_ns, span.end_ns) - max(other.start_ns, span.start_ns)
            shared[other.name, other.bucket] += max(0, common_ns)
        return shared

    for step, inside in inside_steps(profile.spans):
        found.total_ns += step.end_ns - step.start_ns
        found.num_steps += 1
        for span, own_ns in self_times_ns(inside):
            if span.name not in PHASES:
                continue
            shared = causes(span) if span.name in WAITS else {}
            total_ns = sum(shared.values())
            if total_ns == 0:
                shared, total_ns = {(span.name, span.bucket): 1}, 1
            for (name, bucket), part in shared.items():
                charged_ns = own_ns * part // total_ns
                found.charged[PHASES[name].resource] += charged_ns
                if name == LATE:
                    found.waited[bucket] += charged_ns
            if PHASES[span.name].resource not in BETWEEN_RANKS:
                found.by_phase[span.name] += own_ns
    return found


def _latest(ranks: Sequence[_Charges]) -> LateRank | None:
    """Return the rank that causes most waits, None if no rank is late or ranks take turns."""
    if len(ranks) < 2:
        return None
    steps = np.array([[rank.num_steps] for rank in ranks])
    numbers = [rank.profile.rank for rank in ranks]
    # Row: the rank that waits; column: the late rank that it waits for.
    waited_ms = np.array([[rank.waited[i] for i in numbers] for rank in ranks]) / steps / 1e6
    late_ms = waited_ms.sum(axis=0) / (len(ranks) - 1) - waited_ms.sum(axis=1)
    slow = int(late_ms.argmax())
    if late_ms[slow] <= 0.5 * np.delete(waited_ms.sum(axis=1), slow).mean():
        return None
    phases = list(ranks[slow].by_phase)
    own_ms = np.array([[rank.by_phase[name] for name in phases] for rank in ranks]) / steps / 1e6
    excess_ms = own_ms[slow] - np.delete(own_ms, slow, axis=0).mean(axis=0)
    phase, longer = "", ""
    if phases and excess_ms.max() >= 0.5 * late_ms[slow]:
        phase = phases[int(excess_ms.argmax())]
        longer = f": its {phase} takes {excess_ms.max():.1f} ms longer"
    rank, host = ranks[slow].profile.rank, ranks[slow].profile.host
    if len({rank.profile.host for rank in ranks}) > 1:
        advice = (
            "and compare the output of `offload-adam doctor` there with that of another rank's "
            "machine"
        )
    else:
        advice = "and start no more ranks than it has cores"
    sentence = (
        f"Rank {rank} on {host} is {late_ms[slow]:.1f} ms later than other ranks{longer}. Look for "
        f"other processes on {host}, {advice}."
    )
    return LateRank(rank, float(late_ms[slow]), phase, sentence)


def _advice(resource: Resource, facts: RunFacts, late: LateRank | None) -> tuple[str, str]:
    """Return the setting to change, and a sentence of advice, for the resource that limits."""
    match resource:
        case Resource.COMPUTE:
            return "", (
                "The optimizer does not limit the run: none of its settings makes steps faster."
            )
        case Resource.UPDATE if facts.num_threads < facts.num_cores:
            return "optimizer.num_threads", (
                f"The update runs on {facts.num_threads} of {facts.num_cores} cores: raise "
                "optimizer.num_threads, or leave it unset."
            )
        case Resource.UPDATE:
            return "--nproc-per-node", (
                "All cores are busy with it: with more ranks on more nodes, each rank updates a "
                "smaller shard. A larger train.gradient_accumulation_steps makes updates rarer."
            )
        case Resource.COPIES if facts.on_device and not facts.pinned:
            return "memory.pin", (
                "Some state in host memory is not pinned: set memory.pin: all, and raise the limit "
                "of locked memory (ulimit -l)."
            )
        case Resource.COPIES if facts.dtype == "fp32":
            return "train.dtype", "Set train.dtype: bf16, which halves the bytes to copy."
        case Resource.COPIES:
            return "train.gradient_accumulation_steps", (
                "Raise train.gradient_accumulation_steps: gradients and parameters are copied once "
                "a step."
            )
        case Resource.TRANSFERS if facts.reduce_dtype is not None and facts.dtype != "fp32":
            return "optimizer.reduce_dtype", (
                "Gradients are averaged in fp32: set optimizer.reduce_dtype: null, which halves "
                "the bytes to send."
            )
        case Resource.TRANSFERS:
            return "train.gradient_accumulation_steps", (
                "Raise train.gradient_accumulation_steps: gradients are averaged and parameters "
                "gathered once a step. To measure the network, run offload-adam doctor under "
                "torchrun."
            )
        case Resource.LATENESS if late is not None:
            return "", ""  # the sentence on the late rank says what to check
        case Resource.LATENESS:
            return "train.gradient_accumulation_steps", (
                "A different rank is late each time: raise train.gradient_accumulation_steps, so "
                "that ranks wait for each other less often, and start no more ranks than there are "
                "cores."
            )
        case Resource.CHECKPOINTS:
            return "checkpoint.every", (
                "Updates wait until their bucket is on the disk: raise checkpoint.every, or set "
                "run.dir to a faster disk."
            )
        case Resource.DATA:
            return "data", "Use a faster disk, or smaller batches."
