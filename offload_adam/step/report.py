"""What a step reports about itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from offload_adam.coordinator.agreement import Notice


@dataclass(frozen=True, slots=True)
class StepReport:
    """The outcome of one `step()`.

    total_norm: 2-norm of the mean gradient of all parameters, unscaled and before clipping; NaN
        where it is not finite.
    clip_factor: what every gradient was multiplied by, 1.0 where nothing was clipped.
    skipped: a gradient was not finite or `found_inf` was set: nothing was changed.
    num_updated: parameters that were updated: those with a gradient on any rank.
    non_finite: names of the parameters whose gradient was not finite, on any rank.
    timings: seconds by phase: reduce, norm, agree, update, copy up, gather; `device update`, to
        launch those of state on a device; `checkpoint wait`, what updates have waited for one that
        is being written; and `update wait`, what the model's forward has waited for updates. Where
        updates run beside the next forward, those of a step are in the report of the next one, also
        where that one is skipped.
    notice: what all ranks have agreed on beside the step, from their `notice`.
    """

    total_norm: float
    clip_factor: float
    skipped: bool
    num_updated: int
    non_finite: tuple[str, ...] = ()
    timings: Mapping[str, float] = field(default_factory=dict)
    notice: Notice = field(default_factory=Notice)

    @property
    def reason(self) -> str:
        """Why a step was skipped, with at most five names."""
        if not self.non_finite:
            return "found_inf was set"
        more = len(self.non_finite) - 5
        named = ", ".join(self.non_finite[:5]) + (f" and {more} more" if more > 0 else "")
        return f"the gradient of {named} is not finite"
