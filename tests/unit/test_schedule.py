"""The learning rate at every update against its closed formula."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from offload_adam.config import RunConfig
from offload_adam.config.sections import ScheduleSection, TrainSection
from offload_adam.train.optimizer import build_schedule


def rates(schedule: ScheduleSection, lr: float, num_steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    config = RunConfig(schedule=schedule, train=TrainSection(num_steps=num_steps))
    scheduler = build_schedule(optimizer, config)
    assert scheduler is not None
    used = []
    for _ in range(num_steps):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return used


@pytest.mark.parametrize("warmup_steps", [0, 1, 2, 10, 29])
@pytest.mark.parametrize("min_lr_ratio", [0.0, 0.1, 1.0])
def test_warmup_and_cosine(warmup_steps: int, min_lr_ratio: float) -> None:
    lr, num_steps = 3e-3, 30
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        section = ScheduleSection(warmup_steps=warmup_steps, min_lr_ratio=min_lr_ratio)
        used = rates(section, lr, num_steps)
    floor = min_lr_ratio * lr
    for update, rate in enumerate(used):
        if update < warmup_steps:
            expected = lr * (update + 1) / (warmup_steps + 1)
        else:
            turn = math.pi * (update - warmup_steps) / (num_steps - warmup_steps)
            expected = floor + (lr - floor) * (1 + math.cos(turn)) / 2
        assert rate == pytest.approx(expected, rel=1e-9), update


def test_a_run_shorter_than_its_warmup_ends_within_it() -> None:
    used = rates(ScheduleSection(warmup_steps=9), lr=1.0, num_steps=3)
    assert used == pytest.approx([0.1, 0.2, 0.3])
