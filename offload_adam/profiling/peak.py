"""What used the memory of a rank's process, and of its device, at the peak."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from offload_adam.profiling.phases import STEP
from offload_adam.profiling.profile import RankProfile, steps_of
from offload_adam.units import format_nbytes

REST = "the rest of the process"
"""Memory that is not in the ledger: activations, data, libraries and so on."""


@dataclass(frozen=True, slots=True)
class Peak:
    """The sample with the most memory.

    where: "host", or the device, such as "cuda:0".
    nbytes: resident memory of the process, or what torch has allocated on the device.
    parts: bytes by category of the ledger, and `REST`; largest first. Their sum is `nbytes`.
    seconds: since the first sample.
    phase, step: what the training thread was doing; "" and None between steps.
    """

    rank: int
    where: str
    nbytes: int
    parts: Mapping[str, int]
    seconds: float
    phase: str
    step: int | None

    @property
    def sentence(self) -> str:
        """Return when the peak was, and its largest parts."""
        held = "resident" if self.where == "host" else f"allocated on {self.where}"
        during = f"in {self.phase}" if self.phase else "between two steps"
        if self.step is not None:
            during += f" of step {self.step}"
        named = [
            f"{name} ({format_nbytes(nbytes)}, {nbytes / self.nbytes:.0%})"
            for name, nbytes in list(self.parts.items())[:3]
        ]
        return (
            f"Memory peaked {during}, {self.seconds:.1f} s after the first sample, with "
            f"{format_nbytes(self.nbytes)} {held} on rank {self.rank}. "
            f"Its largest parts: {', '.join(named)}."
        )


def peaks_of(profiles: Sequence[RankProfile]) -> list[Peak]:
    """Return the largest peak of any rank in host memory, and the largest on any device."""
    found = [peak for profile in profiles for peak in _peaks(profile)]
    hosts = [peak for peak in found if peak.where == "host"]
    devices = [peak for peak in found if peak.where != "host"]
    return [max(kind, key=lambda peak: peak.nbytes) for kind in (hosts, devices) if kind]


def place_of(category: str) -> str:
    """Return where the bytes of a ledger's category are: "host", or the device."""
    return category.partition(" on ")[2] or "host"


def total_of(sample: Mapping[str, Any], where: str) -> int:
    """Return all bytes in use in a place: resident in the process, or allocated by torch."""
    return int(sample["rss"] if where == "host" else sample.get("device_allocated", 0))


def parts_of(sample: Mapping[str, Any], where: str) -> dict[str, int]:
    """Return the bytes in one place by category of the ledger, and `REST`."""
    parts = {name: n for name, n in sample["ledger"].items() if place_of(name) == where and n}
    return {**parts, REST: max(0, total_of(sample, where) - sum(parts.values()))}


def _peaks(profile: RankProfile) -> Iterator[Peak]:
    """Yield the peak of a rank in host memory, and on each of its devices."""
    samples, spans = profile.samples, profile.spans
    places = dict.fromkeys(place_of(name) for sample in samples for name in sample["ledger"])
    for where in dict.fromkeys(["host", *places]) if samples else ():
        sample = max(samples, key=lambda sample: total_of(sample, where))
        nbytes, time_ns = total_of(sample, where), sample["time_ns"]
        parts = sorted(parts_of(sample, where).items(), key=lambda part: -part[1])
        seconds = (time_ns - samples[0]["time_ns"]) / 1e9
        training = {step.thread for step in steps_of(spans)}
        around = [s for s in spans if s.thread in training and s.start_ns <= time_ns < s.end_ns]
        step = next((span.bucket for span in around if span.name == STEP), None)
        phase = max(around, key=lambda span: span.start_ns).name if around else ""
        if nbytes > 0:
            yield Peak(profile.rank, where, nbytes, dict(parts), seconds, phase, step)
