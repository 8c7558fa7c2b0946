"""What used the memory of a rank's process, and of its device, at the peak."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from offload_adam.profiling.phases import STEP
from offload_adam.profiling.profile import RankProfile, steps_of
from offload_adam.units import format_nbytes

REST = "the rest of the process"
"""Memory that is not in the ledger: activations, data, libraries and so on."""
NUM_NAMED = 3


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
            for name, nbytes in list(self.parts.items())[:NUM_NAMED]
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


def _peaks(profile: RankProfile) -> Iterator[Peak]:
    if not profile.samples:
        return
    yield _peak(profile, "host", "rss")
    on_device = [sample for sample in profile.samples if "device_allocated" in sample]
    devices = {place_of(name) for sample in on_device for name in sample["ledger"]} - {"host"}
    for device in sorted(devices):
        yield _peak(profile, device, "device_allocated")


def _peak(profile: RankProfile, where: str, total: str) -> Peak:
    """Return the peak in one place.

    Args:
        total: key of a sample with the bytes used there.
    """
    sample = max(profile.samples, key=lambda sample: int(sample.get(total, -1)))
    nbytes, time_ns = int(sample[total]), sample["time_ns"]
    parts = {
        name: held for name, held in sample["ledger"].items() if place_of(name) == where and held
    }
    parts[REST] = max(0, nbytes - sum(parts.values()))
    ordered = dict(sorted(parts.items(), key=lambda part: part[1], reverse=True))
    seconds = (time_ns - profile.samples[0]["time_ns"]) / 1e9
    training = {step.thread for step in steps_of(profile.spans)}
    around = [
        span
        for span in profile.spans
        if span.thread in training and span.start_ns <= time_ns < span.end_ns
    ]
    step = next((span.bucket for span in around if span.name == STEP), None)
    innermost = max(around, key=lambda span: span.start_ns, default=None)
    phase = "" if innermost is None else innermost.name
    return Peak(profile.rank, where, nbytes, ordered, seconds, phase, step)
