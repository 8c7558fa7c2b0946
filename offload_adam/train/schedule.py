"""The learning rate's course: up in a line, then down a cosine, by torch's own schedulers."""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from offload_adam.config import RunConfig
from offload_adam.config.optimizer_sections import AdamSection


def build_schedule(optimizer: Optimizer, config: RunConfig) -> LRScheduler | None:
    """Return what is stepped after every update, None where the optimizer's rate moves by itself.

    Update u of N, counted from 0, W of them warmup, is made with
    `lr * (u + 1) / (W + 1)` while u < W, and then with
    `floor + (lr - floor) * (1 + cos(pi * (u - W) / (N - W))) / 2`, `floor = min_lr_ratio * lr`.
    """
    section = config.optimizer
    if isinstance(section, AdamSection) and section.schedules_itself:
        return None
    warmup_steps = config.schedule.warmup_steps
    # A run that ends in its warmup has none of these.
    decay_steps = max(1, config.train.num_steps - warmup_steps)
    floor = config.schedule.min_lr_ratio * optimizer.param_groups[0]["lr"]
    decay = CosineAnnealingLR(optimizer, decay_steps, eta_min=floor)
    if warmup_steps == 0:
        return decay
    # One more than warmup_steps, so that the first update has a rate above zero.
    warmup = LinearLR(optimizer, start_factor=1 / (warmup_steps + 1), total_iters=warmup_steps)
    return SequentialLR(optimizer, [warmup, decay], milestones=[warmup_steps])
