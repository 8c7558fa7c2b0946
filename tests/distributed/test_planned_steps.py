"""Predicted times beside those of real steps of two ranks on this machine."""

from __future__ import annotations

import time
from dataclasses import replace
from statistics import median

import pytest
import torch
from torch import nn

from offload_adam import OffloadAdam
from offload_adam.coordinator.ranks import open_rank_group
from offload_adam.doctor.bandwidth import measure_step
from offload_adam.doctor.network import measure_network
from offload_adam.kernels.threads import allowed_cores
from offload_adam.layout.flat import ParameterSpec
from offload_adam.layout.ring import RingSpeed
from offload_adam.plan.inputs import Machine, Source, Training
from offload_adam.plan.timing import COMPARED_NUMEL, predict_time
from tests.support.ranks import RankPool

NUM_PARAMETERS = 10
NUM_ROUNDS = 4
TOLERANCE = 0.25
NUM_ATTEMPTS = 3
LEAST, MOST = COMPARED_NUMEL
SOURCES = {"update": Source.MEASURED, "network": Source.MEASURED}


def measure(
    rank: int, world_size: int, numel: int, dtype: torch.dtype
) -> list[tuple[RingSpeed, float]]:
    """Return the network's speed and a step's seconds, measured in turn, once a round."""
    each = numel // NUM_PARAMETERS
    parameters = [nn.Parameter(torch.zeros(each, dtype=dtype)) for _ in range(NUM_PARAMETERS)]
    optimizer = OffloadAdam(
        parameters, max_grad_norm=1.0, gradient_reduction="optimizer", num_threads=1
    )
    ranks = open_rank_group(None)
    rounds = []
    for _ in range(NUM_ROUNDS):
        speed = measure_network(ranks, torch.device("cpu"))
        seconds = []
        for _ in range(4):
            for parameter in parameters:
                parameter.grad = torch.full_like(parameter, 0.01)
            ranks.all_reduce(torch.zeros(1))
            start_s = time.perf_counter()
            optimizer.step()
            seconds.append(time.perf_counter() - start_s)
        rounds.append((speed, sorted(seconds)[1]))
    optimizer.close()
    ranks.release()
    return rounds


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("numel", [LEAST, 32_000_000])
def test_a_step_of_two_ranks_takes_as_long_as_was_predicted(
    ranks: RankPool, numel: int, dtype: torch.dtype
) -> None:
    """Something else runs here, too: a step is compared with the network of the same moment."""
    each = numel // NUM_PARAMETERS
    specs = [ParameterSpec(i, each, dtype.itemsize, "one") for i in range(NUM_PARAMETERS)]
    training = Training(world_size=2, local_world_size=2, on_device=False)
    machine = Machine(host_gb_per_s=measure_step(allowed_cores()), sources=SOURCES)
    ratios: list[float] = []
    for _ in range(NUM_ATTEMPTS):
        rounds = []
        for speed, measured_s in ranks.run(measure, 2, numel, dtype, timeout=90.0)[0]:
            timing = predict_time(specs, training, replace(machine, network=speed))
            assert timing is not None
            assert not timing.doubts
            rounds.append(measured_s / timing.total_s)
        ratios.append(median(rounds))
        if abs(ratios[-1] - 1.0) <= TOLERANCE:
            return
    pytest.fail(f"measured over predicted time: {ratios}")
