"""What bounds a run, in a sentence, and which setting to change."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from offload_adam.profiling.lateness import LATE, with_late_ranks
from offload_adam.profiling.profile import RankProfile, inside_steps, self_times_ns, steps_of
from offload_adam.spans import NO_BUCKET, Span


class Resource(Enum):
    """What the training thread may be waiting for."""

    COMPUTE = "the model's own forward and backward"
    UPDATE = "the update on the host"
    COPIES = "copies between host and device"
    LATENESS = "waiting for ranks that come later"
    TRANSFERS = "transfers between ranks"
    CHECKPOINTS = "checkpoints that are still being written"
    DATA = "the data"


BETWEEN_RANKS = (Resource.LATENESS, Resource.TRANSFERS)
"""What rarer collectives help against, whichever takes more of it."""

RESOURCE_OF = {
    "forward": Resource.COMPUTE,
    "backward": Resource.COMPUTE,
    "loss": Resource.COMPUTE,
    "norm": Resource.UPDATE,
    "update": Resource.UPDATE,
    "device update": Resource.UPDATE,
    "update wait": Resource.UPDATE,
    "D2H copy": Resource.COPIES,
    "H2D copy": Resource.COPIES,
    "pack": Resource.COPIES,
    "reduce": Resource.TRANSFERS,
    "agree": Resource.TRANSFERS,
    "gather": Resource.TRANSFERS,
    "all-reduce": Resource.TRANSFERS,
    "checkpoint wait": Resource.CHECKPOINTS,
    LATE: Resource.LATENESS,
    "data": Resource.DATA,
}
"""Whom each span's time is charged to; what stands nowhere here is not charged."""

WAITS = frozenset({"update wait", "reduce", "norm"})
"""Spans of the training thread that may be waits for another thread of its rank: where there is
one that works, they are charged to what it does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """The settings that a diagnosis may ask to change, as the run had them.

    num_cores: those that the update of a rank may use. num_threads: those that it used.
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


NOTABLE_SHARE = 0.1
"""Of a step: a rank that comes this much later is told of, whatever else bounds the run."""


@dataclass(frozen=True, slots=True)
class LateRank:
    """The rank that the others wait for, for most of what they wait for each other.

    late_ms: how much longer they wait for it than it waits itself, mean over them and the steps.
    phase: in what it spends more time than the others do, and how much more in a step; "" where
        that does not account for half of it.
    """

    rank: int
    host: str
    late_ms: float
    phase: str
    phase_ms: float

    @property
    def sentence(self) -> str:
        """Say it, and what to look at."""
        said = (
            f"Rank {self.rank}, on {self.host}, comes {self.late_ms:.1f} ms later than the others"
        )
        if self.phase:
            said += f": its {self.phase} takes {self.phase_ms:.1f} ms more"
        return f"{said}. Compare what runs there, and offload-adam doctor's lines of both machines."


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What bounds a run.

    shares: part of the step that each resource takes on the training thread, mean over ranks. A
        rank that comes late by itself has this time taken off what it did, for that alone bounds
        the run.
    setting: the key to change; empty where no setting helps.
    late: the rank that comes latest, where it costs a notable part of the step.
    """

    resource: Resource
    shares: Mapping[Resource, float]
    step_ms: float
    setting: str
    advice: str
    late: LateRank | None = None

    @property
    def sentence(self) -> str:
        """Say it."""
        said = f"A step takes {self.step_ms:.1f} ms, and {self._spent()}. {self.advice}"
        return said if self.late is None else f"{said} {self.late.sentence}".replace("  ", " ")

    def _spent(self) -> str:
        """Say what it is spent on; what takes place between ranks in its two parts."""
        if self.resource not in BETWEEN_RANKS:
            return f"{self.shares[self.resource]:.0%} of it is spent on {self.resource.value}"
        parts = sorted(BETWEEN_RANKS, key=lambda part: part is not self.resource)
        together = sum(self.shares[part] for part in parts)
        named = ", ".join(f"{self.shares[part]:.0%} on {part.value}" for part in parts)
        return f"{together:.0%} of it is spent on other ranks: {named}"


def _bounding(shares: Mapping[Resource, float]) -> Resource:
    """Return what takes most; the two parts of what takes place between ranks count together."""
    within = max((r for r in Resource if r not in BETWEEN_RANKS), key=lambda r: shares[r])
    if sum(shares[part] for part in BETWEEN_RANKS) > shares[within]:
        return max(BETWEEN_RANKS, key=lambda part: shares[part])
    return within


def diagnose(profiles: Sequence[RankProfile], facts: RunFacts) -> Diagnosis | None:
    """Return what bounds the run, None where no step was recorded.

    The first step, which compiles and allocates, is left out where there are others.
    """
    found = [_charge(profile) for profile in with_late_ranks(profiles)]
    total_ns = sum(rank.total_ns for rank in found)
    num_steps = sum(rank.num_steps for rank in found)
    if num_steps == 0 or total_ns == 0:
        return None
    late = _latest(profiles, found)
    if late is not None:
        slow = next(rank for rank in found if rank.rank == late.rank)
        slow.blame(round(late.late_ms * 1e6) * slow.num_steps)
    shares = {each: sum(rank.charged[each] for rank in found) / total_ns for each in Resource}
    resource = _bounding(shares)
    setting, advice = _advice(resource, facts, late)
    step_ms = total_ns / num_steps / 1e6
    notable = late is not None and late.late_ms >= NOTABLE_SHARE * step_ms
    told = late if notable or resource is Resource.LATENESS else None
    return Diagnosis(resource, shares, step_ms, setting, advice, told)


@dataclass
class _Charges:
    """Where one rank's steps go, in nanoseconds.

    waited: for each rank that came later. by_phase: its own work, collectives left out.
    """

    rank: int
    total_ns: int = 0
    num_steps: int = 0
    charged: Counter[Resource] = field(default_factory=Counter)
    waited: Counter[int] = field(default_factory=Counter)
    by_phase: Counter[str] = field(default_factory=Counter)

    def blame(self, late_ns: int) -> None:
        """Take the time that this rank is late off all that it does beside waiting for others."""
        busy_ns = sum(self.charged.values()) - self.charged[Resource.LATENESS]
        late_ns = min(late_ns, busy_ns)
        for resource in Resource:
            if resource is not Resource.LATENESS and busy_ns > 0:
                self.charged[resource] -= self.charged[resource] * late_ns // busy_ns
        self.charged[Resource.LATENESS] += late_ns


def _charge(profile: RankProfile) -> _Charges:
    """Charge the time of one rank's training thread."""
    found = _Charges(profile.rank)
    background = _Background(profile.spans)
    for step, inside in inside_steps(profile.spans):
        found.total_ns += step.end_ns - step.start_ns
        found.num_steps += 1
        for span, own_ns in self_times_ns(inside):
            if span.name not in RESOURCE_OF:
                continue
            charges = background.charge(span, own_ns)
            for (resource, rank), charged_ns in charges.items():
                found.charged[resource] += charged_ns
                if resource is Resource.LATENESS:
                    found.waited[rank] += charged_ns
            if RESOURCE_OF[span.name] not in (Resource.LATENESS, Resource.TRANSFERS):
                found.by_phase[span.name] += own_ns
    return found


def _latest(profiles: Sequence[RankProfile], found: Sequence[_Charges]) -> LateRank | None:
    """Return the rank that comes late, None where they do by turns, or none does."""
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
    excess_ms = {
        phase: (spent_ns / slow.num_steps - _mean_ns(others, phase)) / 1e6
        for phase, spent_ns in slow.by_phase.items()
    }
    phase = max(excess_ms, key=lambda name: excess_ms[name], default="")
    if not phase or excess_ms[phase] < 0.5 * late_ms(slow):
        phase = ""
    host = next(profile.host for profile in profiles if profile.rank == slow.rank)
    return LateRank(slow.rank, host, late_ms(slow), phase, excess_ms.get(phase, 0.0))


def _mean_ns(ranks: Sequence[_Charges], phase: str) -> float:
    return sum(rank.by_phase[phase] / rank.num_steps for rank in ranks) / len(ranks)


_Account = tuple[Resource, int]
"""A resource, and for lateness whose it is."""


def _account_of(span: Span) -> _Account:
    return RESOURCE_OF[span.name], span.bucket if span.name == LATE else NO_BUCKET


class _Background:
    """What the threads beside the training thread do, to be charged for its waits."""

    def __init__(self, spans: Sequence[Span]) -> None:
        training = {step.thread for step in steps_of(spans)}
        self._spans = [s for s in spans if s.thread not in training and s.name in RESOURCE_OF]
        self._starts = [span.start_ns for span in self._spans]
        self._longest_ns = max((s.end_ns - s.start_ns for s in self._spans), default=0)

    def charge(self, span: Span, own_ns: int) -> Mapping[_Account, int]:
        """Return whom a span of the training thread costs its time."""
        shared = self._beside(span) if span.name in WAITS else {}
        total_ns = sum(shared.values())
        if total_ns == 0:
            return {_account_of(span): own_ns}
        return {account: own_ns * part // total_ns for account, part in shared.items()}

    def _beside(self, span: Span) -> Mapping[_Account, int]:
        """Return the nanoseconds of each resource on other threads during a span."""
        first = bisect_left(self._starts, span.start_ns - self._longest_ns)
        last = bisect_left(self._starts, span.end_ns)
        shared: Counter[_Account] = Counter()
        for other in self._spans[first:last]:
            common_ns = min(other.end_ns, span.end_ns) - max(other.start_ns, span.start_ns)
            shared[_account_of(other)] += max(0, common_ns)
        return shared


def _advice(resource: Resource, facts: RunFacts, late: LateRank | None) -> tuple[str, str]:
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
        case Resource.TRANSFERS if facts.reduce_dtype is not None and facts.dtype != "fp32":
            return "optimizer.reduce_dtype", (
                "Gradients are averaged in fp32: optimizer.reduce_dtype: null halves the bytes."
            )
        case Resource.TRANSFERS:
            return "train.gradient_accumulation_steps", (
                "Raise train.gradient_accumulation_steps: gradients are averaged and parameters "
                "gathered once a step; offload-adam doctor under torchrun measures the network."
            )
        case Resource.LATENESS if late is not None:
            return "", ""
        case Resource.LATENESS:
            return "train.gradient_accumulation_steps", (
                "They take turns in it: raise train.gradient_accumulation_steps, for they wait for "
                "each other once a step, and start no more ranks than there are cores."
            )
        case Resource.CHECKPOINTS:
            return "checkpoint.every", (
                "Updates wait until their bucket is on the disk: raise checkpoint.every, or let "
                "run.dir be on a faster disk."
            )
        case Resource.DATA:
            return "data", "Reading the data takes longest: a faster disk or smaller batches help."
