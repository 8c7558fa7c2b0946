"""What used the most memory at the peak, of a rank's process and of its device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from offload_adam.profiling.profile import STEP, RankProfile, steps_of
from offload_adam.units import format_nbytes

REST = "the rest of the process"
"""What the ledger does not know: activations, data, libraries, and whatever else a rank holds."""
NUM_NAMED = 3


@dataclass(frozen=True, slots=True)
class Peak:
    """The sample in which a rank held the most.

    where: "host", or the device, such as "cuda:0".
    nbytes: resident bytes of the process, or what torch has allocated on the device.
    parts: bytes by category of the ledger, the largest first, and `REST`; they add up to `nbytes`.
    seconds: since the first sample. phase, step: what the training thread did; "" where nothing
        was recorded, and None outside of a step.
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
        """Say when it was, and what took most."""
        held = "resident" if self.where == "host" else f"allocated on {self.where}"
        during = f"in {self.phase}" if self.phase else "between two steps"
        if self.step is not None:
            during += f" of step {self.step}"
        named = [
            f"{name} ({format_nbytes(nbytes)}, {nbytes / self.nbytes:.0%})"
            for name, nbytes in list(self.parts.items())[:NUM_NAMED]
        ]
        return (
            f"Memory peaked {during}, {self.seconds:.1f} s after the first sample, with "
            f"{format_nbytes(self.nbytes)} {held} on rank {self.rank}. "
            f"The most of it: {', '.join(named)}."
        )


def peaks_of(profiles: Sequence[RankProfile]) -> list[Peak]:
    """Return the peak of the host and of each device, each of the rank that held the most there."""
    found = [peak for profile in profiles for peak in _peaks(profile)]
    places = dict.fromkeys("host" if peak.where == "host" else "device" for peak in found)
    return [
        max((p for p in found if (p.where == "host") == (place == "host")), key=_nbytes)
        for place in places
    ]


def place_of(category: str) -> str:
    """Return where the bytes of a category of the ledger lie."""
    _, _, device = category.partition(" on ")
    return device or "host"


def _nbytes(peak: Peak) -> int:
    return peak.nbytes


def _peaks(profile: RankProfile) -> Iterable[Peak]:
    samples = profile.samples
    if not samples:
        return
    yield _peak(profile, max(samples, key=lambda sample: int(sample["rss"])), "host", "rss")
    on_device = [sample for sample in samples if "device_allocated" in sample]
    devices = {place_of(name) for sample in on_device for name in sample["ledger"]} - {"host"}
    for device in sorted(devices):
        fullest = max(on_device, key=lambda sample: int(sample["device_allocated"]))
        yield _peak(profile, fullest, device, "device_allocated")


def _peak(profile: RankProfile, sample: Mapping[str, Any], where: str, total: str) -> Peak:
    nbytes = int(sample[total])
    parts = {
        name: held for name, held in sample["ledger"].items() if place_of(name) == where and held
    }
    parts[REST] = max(0, nbytes - sum(parts.values()))
    ordered = dict(sorted(parts.items(), key=lambda part: part[1], reverse=True))
    seconds = (sample["time_ns"] - profile.samples[0]["time_ns"]) / 1e9
    return Peak(profile.rank, where, nbytes, ordered, seconds, *_doing(profile, sample["time_ns"]))


def _doing(profile: RankProfile, time_ns: int) -> tuple[str, int | None]:
    """Return the innermost phase of the training thread, and the step, at a time."""
    training = {step.thread for step in steps_of(profile.spans)}
    around = [
        span
        for span in profile.spans
        if span.thread in training and span.start_ns <= time_ns < span.end_ns
    ]
    if not around:
        return "", None
    step = next((span.bucket for span in around if span.name == STEP), None)
    return max(around, key=lambda span: span.start_ns).name, step
