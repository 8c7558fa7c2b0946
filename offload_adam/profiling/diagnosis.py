"""What limits a run, in a sentence, and which setting to change."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from offload_adam.profiling.lateness import with_late_ranks
from offload_adam.profiling.phases import BETWEEN_RANKS, LATE, PHASES, WAITS, Resource
from offload_adam.profiling.profile import RankProfile, inside_steps, self_times_ns, steps_of
from offload_adam.spans import NO_BUCKET, Span

NOTABLE_SHARE = 0.1
"""Of a step: a rank that is late by this much is always named."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """Settings of the run that the advice depends on.

    num_threads: that each rank's update used. num_cores: that it might have used.
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

    late_ms: time a step that the other ranks wait for this rank, minus the time that it waits
        itself; mean over the other ranks and the steps.
    phase, phase_ms: the phase that takes it longer than the other ranks, and how much longer a
        step; "" if no phase explains half of `late_ms`.
    """

    rank: int
    host: str
    late_ms: float
    phase: str
    phase_ms: float

    @property
    def sentence(self) -> str:
        """Return what was found and what to check."""
        found = f"Rank {self.rank} on {self.host} is {self.late_ms:.1f} ms later than other ranks"
        if self.phase:
            found += f": its {self.phase} takes {self.phase_ms:.1f} ms longer"
        return (
            f"{found}. Look for other processes on {self.host}, and compare the output of "
            "`offload-adam doctor` there with that of another rank's machine."
        )


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What limits a run.

    resource: takes the largest share of a step.
    shares: part of the step that the training thread spends on each resource, mean over ranks. The
        time by which `late` is late counts as lateness on that rank, too, and not as its own work.
    setting: the key to change; "" if no setting helps.
    late: the latest rank, if it costs a notable part of the step.
    """

    resource: Resource
    shares: Mapping[Resource, float]
    step_ms: float
    setting: str
    advice: str
    late: LateRank | None = None

    @property
    def sentence(self) -> str:
        """Return what was found and what to do."""
        if self.resource in BETWEEN_RANKS:
            parts = sorted(BETWEEN_RANKS, key=lambda part: part is not self.resource)
            together = sum(self.shares[part] for part in parts)
            named = ", ".join(f"{self.shares[part]:.0%} on {part.value}" for part in parts)
            spent = f"{together:.0%} of it is spent on other ranks: {named}"
        else:
            spent = f"{self.shares[self.resource]:.0%} of it is spent on {self.resource.value}"
        sentences = [f"A step takes {self.step_ms:.1f} ms, and {spent}.", self.advice]
        sentences += [] if self.late is None else [self.late.sentence]
        return " ".join(filter(None, sentences))


def diagnose(profiles: Sequence[RankProfile], facts: RunFacts) -> Diagnosis | None:
    """Return what limits the run, None if no step was recorded.

    The first step, which compiles and allocates, is skipped unless it is the only one.
    """
    found = [_charge(profile) for profile in with_late_ranks(profiles)]
    total_ns = sum(rank.total_ns for rank in found)
    num_steps = sum(rank.num_steps for rank in found)
    if num_steps == 0 or total_ns == 0:
        return None
    late = _latest(profiles, found)
    if late is not None:
        slow = next(rank for rank in found if rank.rank == late.rank)
        slow.move_to_lateness(round(late.late_ms * 1e6) * slow.num_steps)
    shares = {each: sum(rank.charged[each] for rank in found) / total_ns for each in Resource}
    # Lateness and transfers compete with the other resources as one: the same settings reduce both.
    resource = max((r for r in Resource if r not in BETWEEN_RANKS), key=lambda r: shares[r])
    if sum(shares[part] for part in BETWEEN_RANKS) > shares[resource]:
        resource = max(BETWEEN_RANKS, key=lambda part: shares[part])
    setting, advice = _advice(resource, facts, late)
    step_ms = total_ns / num_steps / 1e6
    is_notable = late is not None and late.late_ms >= NOTABLE_SHARE * step_ms
    named = late if is_notable or resource is Resource.LATENESS else None
    return Diagnosis(resource, shares, step_ms, setting, advice, named)


@dataclass
class _Charges:
    """Where the time of one rank's steps goes, in nanoseconds.

    waited: by the late rank that it waited for.
    by_phase: own work, without collectives.
    """

    rank: int
    total_ns: int = 0
    num_steps: int = 0
    charged: Counter[Resource] = field(default_factory=Counter)
    waited: Counter[int] = field(default_factory=Counter)
    by_phase: Counter[str] = field(default_factory=Counter)

    def move_to_lateness(self, late_ns: int) -> None:
        """Charge `late_ns` to lateness, taken from all other resources in proportion."""
        busy_ns = sum(self.charged.values()) - self.charged[Resource.LATENESS]
        late_ns = min(late_ns, busy_ns)
        for resource in Resource:
            if resource is not Resource.LATENESS and busy_ns > 0:
                self.charged[resource] -= self.charged[resource] * late_ns // busy_ns
        self.charged[Resource.LATENESS] += late_ns


_Account = tuple[Resource, int]
"""A resource with, for lateness, the rank that is late."""


def _account_of(span: Span) -> _Account:
    return PHASES[span.name].resource, span.bucket if span.name == LATE else NO_BUCKET


def _charge(profile: RankProfile) -> _Charges:
    """Charge the time of one rank's training thread to the resources."""
    found = _Charges(profile.rank)
    background = _Background(profile.spans)
    for step, inside in inside_steps(profile.spans):
        found.total_ns += step.end_ns - step.start_ns
        found.num_steps += 1
        for span, own_ns in self_times_ns(inside):
            if span.name not in PHASES:
                continue
            for (resource, rank), charged_ns in background.charge(span, own_ns).items():
                found.charged[resource] += charged_ns
                if resource is Resource.LATENESS:
                    found.waited[rank] += charged_ns
            if PHASES[span.name].resource not in BETWEEN_RANKS:
                found.by_phase[span.name] += own_ns
    return found


class _Background:
    """The spans of one rank's other threads, which are charged with the training thread's waits."""

    def __init__(self, spans: Sequence[Span]) -> None:
        training = {step.thread for step in steps_of(spans)}
        self._spans = [s for s in spans if s.thread not in training and s.name in PHASES]
        self._starts = [span.start_ns for span in self._spans]
        self._longest_ns = max((s.end_ns - s.start_ns for s in self._spans), default=0)

    def charge(self, span: Span, own_ns: int) -> Mapping[_Account, int]:
        """Divide the time of a span of the training thread over the accounts that cause it."""
        shared = self._during(span) if span.name in WAITS else {}
        total_ns = sum(shared.values())
        if total_ns == 0:
            return {_account_of(span): own_ns}
        return {account: own_ns * part // total_ns for account, part in shared.items()}

    def _during(self, span: Span) -> Mapping[_Account, int]:
        """Return the nanoseconds that other threads spend on each account during a span."""
        # Spans are sorted by start; one that overlaps starts at most the longest span earlier.
        first = bisect_left(self._starts, span.start_ns - self._longest_ns)
        last = bisect_left(self._starts, span.end_ns)
        shared: Counter[_Account] = Counter()
        for other in self._spans[first:last]:
            common_ns = min(other.end_ns, span.end_ns) - max(other.start_ns, span.start_ns)
            shared[_account_of(other)] += max(0, common_ns)
        return shared


def _latest(profiles: Sequence[RankProfile], found: Sequence[_Charges]) -> LateRank | None:
    """Return the rank that causes most waits, None if no rank is late or ranks take turns."""
    counted = [rank for rank in found if rank.num_steps > 0]
    if len(counted) < 2:
        return None

    def waits_ms(ranks: Sequence[_Charges]) -> float:
        waited = [sum(rank.waited.values()) / rank.num_steps for rank in ranks]
        return sum(waited) / len(ranks) / 1e6

    def late_ms(slow: _Charges) -> float:
        others = [rank for rank in counted if rank is not slow]
        waited_for = sum(rank.waited[slow.rank] / rank.num_steps for rank in others)
        return waited_for / len(others) / 1e6 - waits_ms([slow])

    slow = max(counted, key=late_ms)
    others = [rank for rank in counted if rank is not slow]
    if late_ms(slow) <= 0.5 * waits_ms(others):
        return None

    def excess_ms(phase: str) -> float:
        of_others = sum(rank.by_phase[phase] / rank.num_steps for rank in others) / len(others)
        return (slow.by_phase[phase] / slow.num_steps - of_others) / 1e6

    phase = max(slow.by_phase, key=excess_ms, default="")
    if not phase or excess_ms(phase) < 0.5 * late_ms(slow):
        phase = ""
    host = next(profile.host for profile in profiles if profile.rank == slow.rank)
    return LateRank(slow.rank, host, late_ms(slow), phase, excess_ms(phase) if phase else 0.0)


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
