"""Update of state on a GPU in float32, by torch's fused Adam kernel.

The kernel reads and writes each plane once. It takes float32 gradients as they are, and others from
a scratch buffer:

    segments   | g0 | g1 |   g2   |      g3      |      16-bit, or to be scaled
                 |    |    |    |   cast and scale a run of at most RUN_NUMEL elements
    scratch    | g0 . | g1 . | part of g2 |             float32, each slice at a multiple of PITCH
                 |    |    |    |   fused Adam
    planes     | w0 | w1 |   w2   |      w3      |      float32, then copied to the parameters

It never waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from offload_adam.kernels.scalars import Hyperparameters, update_scalars
from offload_adam.step.foreach_update import DeviceSegments, Slice, padded, pick, runs_of
from offload_adam.torch_private import foreach_add, foreach_copy, fused_adamw

RUN_NUMEL = 1 << 23
"""Elements of a run. The scratch buffer takes 32 MiB, independent of the size of the model. A GPU
needs about 0.1 ms for a run, several times as long as the host needs to launch its kernels."""

PITCH = 4
"""The kernel loads 4 elements at once if all slices start at a multiple of 4."""

GRADIENT_LIMIT = 2.0**63
"""The kernel would return NaN for a gradient whose square overflows float32."""

# The smallest eps for which an error of 2**-75 in the root, where the second moment is denormal,
# changes the quotient by less than 2**-24.
_MIN_EPS = 2.0**-50
# The largest relative error of 1 - beta. It is 2**-16.2 for beta2 = 0.999.
_BETA_ERROR = 2.0**-16
# The bias corrections are 1 - beta**step, which is 1 for every beta below 1. An int64 can hold it.
_LARGE_STEP = 2.0**62


@dataclass(frozen=True, slots=True)
class FusedScalars:
    """The scalars of one update by the fused kernel; an element is updated by

    g = gradient_scale * g + l2 * w
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    w = w - lr * weight_decay * w - lr * m / (sqrt(v) + eps)

    The bias corrections are in `lr`, `weight_decay` and `eps`.
    """

    gradient_scale: float
    l2: float
    beta1: float
    beta2: float
    lr: float
    weight_decay: float
    eps: float


def fused_scalars(
    hyper: Hyperparameters, step: int, gradient_scale: float, largest_gradient: float
) -> FusedScalars | None:
    """Return the scalars of a fused update, or None if only `foreach_update` is exact.

    It is None with Nesterov momentum, an `eps` close to 0, a `lr` above 1, a beta that float32
    rounds too far, a scalar beyond the range of float32, or gradients whose squares may overflow.

    Args:
        hyper, step, gradient_scale: see `foreach_update`.
        largest_gradient: no scaled gradient element is larger.
    """
    # The kernel reads the betas as float32, in older versions of torch as float64. Corrections of
    # these same betas keep the bias-corrected mean of both moments exact.
    beta1, beta2 = float(np.float32(hyper.beta1)), float(np.float32(hyper.beta2))
    for beta, rounded in ((hyper.beta1, beta1), (hyper.beta2, beta2)):
        if abs(beta - rounded) > _BETA_ERROR * (1.0 - beta):
            return None
    exact = update_scalars(replace(hyper, beta1=beta1, beta2=beta2), step, gradient_scale)
    # MindSpore's formula as it is; torch's with numerator and denominator divided by the scale.
    lr, eps = exact.step_size / exact.denominator_scale, exact.eps / exact.denominator_scale
    weight_decay = exact.decay / lr if lr > 0.0 else 0.0
    is_ours = (
        not exact.nesterov
        and largest_gradient <= GRADIENT_LIMIT / 2
        and eps >= _MIN_EPS
        and beta2 > 0.0  # 0 times an infinite second moment is NaN
        and (lr > 0.0 or exact.decay == 0.0)
        and lr <= 1.0  # so that lr * m does not overflow
        and all(map(_is_normal, (gradient_scale, exact.l2, beta1, beta2, lr, weight_decay, eps)))
    )
    if not is_ours:
        return None
    return FusedScalars(exact.gradient_scale, exact.l2, beta1, beta2, lr, weight_decay, eps)


def _is_normal(scalar: float) -> bool:
    """Return whether float32 holds a scalar with full precision."""
    return scalar == 0.0 or 2.0**-126 <= abs(scalar) <= 2.0**126


@torch.no_grad()
def fused_update(
    segments: DeviceSegments, scalars: FusedScalars, *, run_numel: int = RUN_NUMEL
) -> None:
    """Apply one Adam update to all segments, in place. Gradients are only read.

    Every operation rounds to float32. Let u = 2**-24, so that u |x| is at most 1 ULP of x. Let
    G = |gradient_scale * g| + |l2 * w|, M = beta1 |m| + (1 - beta1) G, and C = lr M / (sqrt(v) +
    eps): sums of magnitudes, so that terms that cancel count in full. If lr * weight_decay is at
    most 1/4 and no value is denormal, the error of one update is at most

        7 u M               of exp_avg
        11 ULP              of exp_avg_sq and max_exp_avg_sq, without L2
        3 u |w| + 20 u C    of the master weight, without L2

    With L2, the gradient itself has an error of 3 u G, on which exp_avg_sq and the weight depend,
    and is limited to 2**63.

    The betas count as the nearest float32: 0.999 as 0.99900001. Compared to the exact betas, a
    moment weighs the newest gradient by up to 2**-16 more or less. With bias correction, that of
    constant gradients is the same.

    The last bit may depend on where tensors are cut: torch's kernel has one loop for vectors of 4
    elements and one for single elements, and the compiler may fuse multiply-adds differently in
    both. On a CPU it does.

    Args:
        segments: the tensors to update, with gradients of at most 32 bits, and finite first
            moments.
        scalars: from `fused_scalars`.
        run_numel: elements of a run, if the gradients need the scratch buffer.

    Cost: 4 bytes of scratch for each of `run_numel` elements. float32 gradients with scale 1 and
        without L2 need none, and are one run. Launches: up to 3 per run, 5 with L2, and 1 for
        16-bit parameters; torch makes more of one for hundreds of tensors.
    Source: as `foreach_update`.
    """
    numel = sum(gradient.numel() for gradient in segments.gradients)
    if numel == 0:
        return
    device = segments.gradients[0].device
    # By a kernel, not by an H2D copy. Cached, it might be read on a stream that did not write it.
    step = torch.full((), _LARGE_STEP, dtype=torch.float32, device=device)
    is_direct = (
        scalars.gradient_scale == 1.0
        and scalars.l2 == 0.0
        and all(one.dtype == torch.float32 and one.is_contiguous() for one in segments.gradients)
    )
    if is_direct:
        runs, scratch_numel = list(runs_of(segments.gradients, numel)), 0
    else:
        runs = list(runs_of(segments.gradients, run_numel, PITCH))
        scratch_numel = max(map(_padded_numel, runs))
    scratch = torch.empty(scratch_numel, dtype=torch.float32, device=device)
    largest = segments.max_exp_avg_sqs
    for run in runs:
        masters, gradients = pick(segments.master_weights, run), pick(segments.gradients, run)
        if not is_direct:
            gradients = _scaled(gradients, masters, scratch[: _padded_numel(run)], scalars)
        fused_adamw(
            masters,
            gradients,
            pick(segments.exp_avgs, run),
            pick(segments.exp_avg_sqs, run),
            [] if largest is None else pick(largest, run),
            [step] * len(run),
            lr=scalars.lr,
            beta1=scalars.beta1,
            beta2=scalars.beta2,
            weight_decay=scalars.weight_decay,
            eps=scalars.eps,
            amsgrad=largest is not None,
            maximize=False,
        )
        if segments.param_out is not None:
            foreach_copy(pick(segments.param_out, run), masters)


def _scaled(
    gradients: list[torch.Tensor],
    masters: list[torch.Tensor],
    scratch: torch.Tensor,
    scalars: FusedScalars,
) -> list[torch.Tensor]:
    """Return the gradients in float32, scaled and with the L2 term, as slices of the scratch."""
    slots = scratch.split([padded(gradient.numel(), PITCH) for gradient in gradients])
    found = [slot[: one.numel()] for slot, one in zip(slots, gradients, strict=True)]
    foreach_copy(found, gradients)
    if scalars.gradient_scale != 1.0:
        scratch.mul_(scalars.gradient_scale)
    if scalars.l2 != 0.0:
        foreach_add(found, masters, alpha=scalars.l2)
        # The host knows no bound of the weights, so the L2 term may exceed the limit.
        scratch.clamp_(-GRADIENT_LIMIT, GRADIENT_LIMIT)
    return found


def _padded_numel(run: list[Slice]) -> int:
    return sum(padded(part.end - part.start, PITCH) for part in run)
