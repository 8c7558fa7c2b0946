"""The error of a stored second moment when the scale of the gradients falls or rises.

The gradients of each element are normal noise with a scale of its own, rounded to bfloat16. The
exact second moment is computed from the same gradients in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from offload_adam import OffloadAdam
from offload_adam.options import StateFormat

NUM_ELEMENTS = 8192
PHASES = {"steady": 1.0, "after a tenfold fall": 0.1, "after a tenfold rise": 1.0}
"""Factor of the gradients in each phase. Each phase starts with the moments of the one before."""


class Sample(NamedTuple):
    """The second moments after a step, (NUM_ELEMENTS,) float64.

    phase: one of `PHASES`.
    step: counted from 1 in this phase.
    deviation: upper bound of the standard deviation that stochastic rounding causes.
    """

    phase: str
    step: int
    stored: torch.Tensor
    exact: torch.Tensor
    deviation: torch.Tensor

    @property
    def ratio(self) -> torch.Tensor:
        """The root of the stored moment divided by the root of the exact one."""
        return (self.stored / self.exact).sqrt()


Store = Callable[[torch.Tensor], torch.Tensor]
"""Function of a step's gradient that returns the second moment stored after the step."""


def optimizer_store(beta2: float, **options: Any) -> Store:
    """Return a store in an `OffloadAdam` with one bf16 matrix.

    Args:
        options: further arguments of the optimizer.
    """
    parameter = torch.nn.Parameter(torch.ones(64, NUM_ELEMENTS // 64, dtype=torch.bfloat16))
    optimizer = OffloadAdam([parameter], lr=1e-9, betas=(0.9, beta2), num_threads=1, **options)

    def store(gradient: torch.Tensor) -> torch.Tensor:
        parameter.grad = gradient.view(parameter.shape)
        optimizer.step()
        entry = optimizer.state[parameter]
        if "scaled_exp_avg_sq" in entry:
            scaled: torch.Tensor = entry["scaled_exp_avg_sq"].double().view(-1)
            return scaled * float(entry["exp_avg_sq_scale"])
        moment: torch.Tensor = entry["exp_avg_sq"]
        return moment.view(-1)

    return store


def nearest_store(beta2: float) -> Store:
    """Return a store in bfloat16, rounded to nearest by torch after each step."""
    moment = torch.zeros(NUM_ELEMENTS, dtype=torch.bfloat16)

    def store(gradient: torch.Tensor) -> torch.Tensor:
        updated = moment.float() * beta2 + gradient.float().square() * (1.0 - beta2)
        return moment.copy_(updated.bfloat16())

    return store


def path_error(
    state_format: StateFormat, lr: float, beta2: float, *, num_steps: int = 1000
) -> float:
    """Return how far weights move away from those of fp32 state, relative to their displacement.

    16,384 bf16 weights near 0.05 get noisy gradients with a tenth of signal. Both are root mean
    squares over the weights.
    """
    generator = torch.Generator().manual_seed(0)
    start = (torch.randn(128, 128, generator=generator) * 0.05).bfloat16()
    signal = torch.randn(128, 128, generator=generator) * 0.1
    gradients = [
        (torch.randn(128, 128, generator=generator) + signal).bfloat16() for _ in range(num_steps)
    ]
    masters = []
    formats: tuple[StateFormat, ...] = ("fp32", state_format)
    for each in formats:
        parameter = torch.nn.Parameter(start.clone())
        optimizer = OffloadAdam(
            [parameter], lr=lr, betas=(0.9, beta2), num_threads=1, state_format=each
        )
        for gradient in gradients:
            parameter.grad = gradient
            optimizer.step()
        masters.append(optimizer.full_state_dict()["offload_adam"]["master_weight"][0].clone())
        optimizer.close()
    exact, low = (master.double() - start.double() for master in masters)
    return float((low - exact).norm() / exact.norm())


def track(
    store: Store, beta2: float, *, num_steps: int, every: int, coded: bool = False
) -> Iterator[Sample]:
    """Yield the second moments every `every` steps of each phase, and after its last step.

    Args:
        store: the second moments to compare with the exact ones.
        num_steps: steps of each phase.
        coded: they are stored in 8-bit codes instead of bfloat16; see `Sample.deviation`.
    """
    generator = torch.Generator().manual_seed(0)
    scales = torch.randn(NUM_ELEMENTS, generator=generator).exp()  # log-normal
    exact, variance = torch.zeros(2, NUM_ELEMENTS, dtype=torch.float64)
    for phase, factor in PHASES.items():
        for step in range(1, num_steps + 1):
            noise = torch.randn(NUM_ELEMENTS, generator=generator)
            gradient = (noise * scales * factor).bfloat16()
            added = gradient.double().square() * (1.0 - beta2)
            exact.mul_(beta2).add_(added)
            # Later steps multiply a deviation by beta2.
            variance.mul_(beta2**2)
            if coded:
                # Only what a gradient adds is rounded: up with the probability p = added / spacing,
                # with the variance p * (1 - p) * spacing**2. The spacing is at most 1/8.
                variance.add_(added * exact / 8)
            else:
                # Two adjacent bfloat16 differ by at most 2**-7 of their value. The standard
                # deviation of a random choice between them is at most half of that.
                variance.add_(exact.square(), alpha=2.0**-16)
            stored = store(gradient)
            if step % every == 0 or step == num_steps:
                yield Sample(phase, step, stored.double(), exact.clone(), variance.sqrt())
