"""What one step is told by its caller, besides the gradients."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field

from offload_adam.coordinator.admission import Field
from offload_adam.coordinator.agreement import Notice
from offload_adam.kernels.scalars import Hyperparameters


@dataclass(frozen=True, slots=True)
class StepInputs:
    """What one step is told by its caller, besides the gradients.

    hyperparameters: what the groups of `NewParameter` count over.
    num_per_group: how many of these there are for each parameter group.
    grad_scale: what the loss was multiplied by; gradients are divided by it.
    found_inf: not 0 where the caller has seen a gradient that is not finite.
    max_norm: global 2-norm to clip to, None for no clipping.
    step: step count of all parameters, this step included; None where each counts its own updates.
    lazy: sparse gradients update the rows they touch and no others.
    failure: why they could not be read on this rank; the other ranks must hear of it.
    notice: what rides along for the training loop.
    factor: what the caller has multiplied all gradients by in `.grad`, after they had left.
    multiplied: the indices of the parameters for which it has.
    call: what the caller is doing, which must be the same on all ranks.
    """

    hyperparameters: Sequence[Hyperparameters]
    grad_scale: float = 1.0
    found_inf: float = 0.0
    max_norm: float | None = None
    step: int | None = None
    lazy: bool = False
    failure: Exception | None = None
    notice: Notice = field(default_factory=Notice)
    num_per_group: int = 1
    factor: float = 1.0
    multiplied: Collection[int] = ()
    call: str = "step()"

    def checksum(self) -> int:
        """Return a checksum of what must be the same on all ranks."""
        return zlib.crc32(
            repr((self.hyperparameters, self.max_norm, self.step, self.factor, self.call)).encode()
        )

    def fields(self) -> list[Field]:
        """Return what `checksum` is taken over, field by field."""
        fields = [
            (f"{name} of group {number // self.num_per_group}", repr(value))
            for number, hyper in enumerate(self.hyperparameters)
            for name, value in asdict(hyper).items()
        ]
        return [
            *fields,
            ("the norm to clip to", str(self.max_norm)),
            ("the step", str(self.step)),
            ("the factor of the gradients in .grad", str(self.factor)),
            ("the call", self.call),
        ]
