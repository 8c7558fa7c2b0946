"""The learning rate's course: up in a line, then down a cosine, by torch's own schedulers."""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from offload_adam.config.sections import ScheduleSection


def build_schedule(
    optimizer: Optimizer, schedule: ScheduleSection, *, lr: float, num_steps: int
) -> LRScheduler:
    """Return the scheduler to step once after every update that was applied.

    Update u of N, counted from 0, W of them warmup, is made with
    `lr * (u + 1) / (W + 1)` while u < W, and then with
    `floor + (lr - floor) * (1 + cos(pi * (u - W) / (N - W))) / 2`, `floor = min_lr_ratio * lr`.
    """
    warmup_steps = schedule.warmup_steps
    decay_steps = max(1, num_steps - warmup_steps)  # a run that ends in its warmup has none
    decay = CosineAnnealingLR(optimizer, decay_steps, eta_min=schedule.min_lr_ratio * lr)
    if warmup_steps == 0:
        return decay
    # One more than warmup_steps, so that the first update has a rate above zero.
    warmup = LinearLR(optimizer, start_factor=1 / (warmup_steps + 1), total_iters=warmup_steps)
    return SequentialLR(optimizer, [warmup, decay], milestones=[warmup_steps])
