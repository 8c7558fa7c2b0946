"""The plan equals real optimizers to the byte, and is quick for worlds too large to run here."""

from __future__ import annotations

import time
import tracemalloc
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from offload_adam import Adam, OffloadAdam, OffloadPolicy
from offload_adam.layout import state_plan
from offload_adam.layout.flat import ParameterSpec
from offload_adam.layout.ring import RingSpeed
from offload_adam.params.selection import bucket_key_of
from offload_adam.plan.inputs import Machine, Source, Training, synthetic_specs
from offload_adam.plan.prediction import predict
from offload_adam.plan.timing import predict_time
from tests.support.policies import in_policies
from tests.support.ranks import RankPool
from tests.support.scenario import Offloading

STATE = ("master_weight", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "gradient shards")
BUCKET_NBYTES = 4096


def make_model(dtypes: tuple[torch.dtype, ...]) -> nn.ModuleList:
    shapes = [(300, 7), (11,), (64, 64), (1,), (129, 3)]
    return nn.ModuleList(
        nn.ParameterList([nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes])
        for dtype in dtypes
    )


def specs_of(model: nn.Module) -> list[ParameterSpec]:
    return [
        ParameterSpec(i, p.numel(), p.element_size(), bucket_key_of(p))
        for i, p in enumerate(model.parameters())
    ]


FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
CASES: dict[str, tuple[type[OffloadAdam], tuple[torch.dtype, ...], dict[str, Any], Training]] = {
    "fp32": (OffloadAdam, (FP32,), {}, Training(on_device=False)),
    "bf16": (OffloadAdam, (BF16,), {}, Training(on_device=False)),
    "mixed": (OffloadAdam, (FP32, BF16, FP16), {}, Training(on_device=False)),
    "amsgrad": (OffloadAdam, (BF16,), {"amsgrad": True}, Training(on_device=False, amsgrad=True)),
    "offloaded": (Offloading, (FP32, BF16), {}, Training()),
    "partly": (
        Offloading,
        (FP32, BF16),
        {"offload_fraction": 0.5},
        Training(offload=OffloadPolicy(offload_fraction=0.5)),
    ),
    "kept": (
        Offloading,
        (FP32, BF16),
        {"offload_fraction": 0.0},
        Training(offload=OffloadPolicy(offload_fraction=0.0)),
    ),
    "pinned buffers": (
        Offloading,
        (FP32, BF16),
        {"pin": "staging"},
        Training(offload=OffloadPolicy(pin="staging")),
    ),
    "nothing pinned": (
        Offloading,
        (FP32, BF16),
        {"pin": "none"},
        Training(offload=OffloadPolicy(pin="none")),
    ),
}


def with_buckets(training: Training, world_size: int = 1) -> Training:
    return replace(training, world_size=world_size).with_offload(bucket_nbytes=BUCKET_NBYTES)


@pytest.mark.parametrize("name", sorted(CASES))
def test_the_host_bytes_are_those_of_the_optimizer(name: str) -> None:
    kind, dtypes, options, training = CASES[name]
    model = make_model(dtypes)
    specs = specs_of(model)
    options = {"bucket_nbytes": BUCKET_NBYTES, "snapshot_buffer_nbytes": 2**30, **options}
    optimizer = kind(model.parameters(), **in_policies(**options))
    plan = predict(specs, with_buckets(training).with_offload(snapshot_buffer_nbytes=2**30))
    held = optimizer.host_nbytes
    assert sum(plan.host.get(key, 0) for key in STATE) == held["state"]
    assert plan.host.get("block_sums", 0) == held["block_sums"]
    assert plan.host.get("staging", 0) == held["staging"]
    assert plan.host["snapshot buffer"] == held["snapshot buffer"] > 0
    everywhere = sum(e.nbytes for e in optimizer.memory_ledger() if e.category in STATE)
    on_device = sum(plan.device.get(key, 0) for key in STATE)
    assert everywhere == held["state"] + on_device
    assert (on_device > 0) == (training.offload.offload_fraction < 1.0)
    parameters = plan.device if training.on_device else plan.host
    ledger = [e.nbytes for e in optimizer.memory_ledger() if e.category == "parameters"]
    assert parameters["parameters"] == sum(ledger)
    assert plan.num_buckets == len(ledger)


def held_by_rank(rank: int, world_size: int, options: dict[str, Any], adam: bool) -> dict[str, int]:
    model = make_model((FP32, BF16))
    kind: Any = Adam if adam else OffloadAdam
    optimizer = kind(
        model.parameters(),
        gradient_reduction="optimizer",
        offload=OffloadPolicy(bucket_nbytes=BUCKET_NBYTES),
        **options,
    )
    held = dict(optimizer.host_nbytes)
    optimizer.close()
    return held


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("options", [{}, {"reduce_dtype": torch.float32}], ids=["own", "fp32"])
def test_every_rank_holds_what_was_planned(
    ranks: RankPool, world_size: int, options: dict[str, Any]
) -> None:
    training = with_buckets(Training(on_device=False, reduce_fp32=bool(options)), world_size)
    plan = predict(specs_of(make_model((FP32, BF16))), training)
    for held in ranks.run(held_by_rank, world_size, options, False, timeout=60.0):
        assert sum(plan.host.get(key, 0) for key in STATE) == held["state"]
        assert plan.host["block_sums"] == held["block_sums"]


SHARD_NBYTES = 1024
"""In place of 32 MiB. Two ranks then have 2 KiB buckets, less than a 16th of the model."""


def bucket_numels_of_rank(rank: int, world_size: int) -> list[int]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state_plan, "AUTO_SHARD_NBYTES", SHARD_NBYTES)
        parameters = make_model((FP32, BF16)).parameters()
        optimizer = OffloadAdam(parameters, gradient_reduction="optimizer")
    numels = [state.layout.numel for state in optimizer._alive().states]
    optimizer.close()
    return numels


@pytest.mark.distributed
def test_every_rank_has_the_buckets_that_were_planned_for_its_world(
    ranks: RankPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state_plan, "AUTO_SHARD_NBYTES", SHARD_NBYTES)
    specs = specs_of(make_model((FP32, BF16)))
    training = Training(on_device=False, world_size=2)
    assert state_plan.resolve_bucket_nbytes(specs, training.policy) == 2 * SHARD_NBYTES
    planned = [plan.bucket.numel for plan in training.plan(specs)]
    for numels in ranks.run(bucket_numels_of_rank, 2, timeout=60.0):
        assert numels == planned


@pytest.mark.distributed
def test_replicated_state_is_whole_on_every_rank(ranks: RankPool) -> None:
    training = with_buckets(Training(on_device=False, replicated=True), 2)
    plan = predict(specs_of(make_model((FP32, BF16))), training)
    for held in ranks.run(held_by_rank, 2, {}, True, timeout=60.0):
        assert sum(plan.host.get(key, 0) for key in STATE) == held["state"]


def test_a_world_too_large_to_run_here_is_planned_quickly() -> None:
    training = Training(world_size=4096, local_world_size=8)
    machine = Machine(host_gb_per_s=400.0, bus_gb_per_s=50.0, network=RingSpeed.uniform(40.0))
    start_s = time.process_time()
    plan = predict(synthetic_specs(10**12, 2), training)
    timing = predict_time(synthetic_specs(10**12, 2), training, machine)
    spent_s = time.process_time() - start_s
    tracemalloc.start()
    assert predict(synthetic_specs(10**12, 2), training) == plan
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert spent_s < 2.0
    assert peak < 500 * 2**20
    # 12 bytes of state and 2 of gradient shard an element, over 4,096 ranks.
    state = sum(plan.host[key] for key in STATE if key in plan.host)
    assert state == pytest.approx(14 * 10**12 / 4096, rel=0.01)
    assert plan.device["parameters"] == pytest.approx(2 * 10**12, rel=0.01)
    assert timing is not None
    assert timing.bound == "network"
    assert timing.doubts


def test_times_are_bytes_over_bandwidths() -> None:
    training = Training(world_size=2, local_world_size=2)
    machine = Machine(host_gb_per_s=10.0, bus_gb_per_s=4.0, network=RingSpeed.uniform(2.0))
    timing = predict_time(synthetic_specs(10**9, 2), training, machine)
    assert timing is not None
    # Both ranks of the node: 24 of state, 4 of gradient, 2 of rounded parameter, an element.
    assert timing.seconds["update"] == pytest.approx(30 / 10, rel=1e-4)
    assert timing.seconds["bus"] == pytest.approx(2 * 0.5 * 2 / 4, rel=1e-4)
    assert timing.seconds["network"] == pytest.approx(0.5 * (2 + 2) / 2, rel=1e-4)
    assert timing.bound == "update"
    assert predict_time(synthetic_specs(5, 2), training, Machine()) is None


def test_every_way_of_training_takes_the_time_of_its_bytes() -> None:
    numel = 16_000_000
    specs = synthetic_specs(numel, 2) + synthetic_specs(numel, 4)
    machine = Machine(host_gb_per_s=1.0, bus_gb_per_s=1.0, network=RingSpeed.uniform(1.0))

    def nbytes(**ways: Any) -> dict[str, float]:
        timing = predict_time(specs, Training(**ways), machine)
        assert timing is not None
        return {name: round(seconds * 1e9 / numel, 2) for name, seconds in timing.seconds.items()}

    # bf16: 24 of state, the gradient of 2 twice, 2 rounded; fp32: 24, and the gradient of 4 twice.
    assert nbytes(on_device=False) == {"update": 30 + 32}
    assert nbytes(on_device=False, amsgrad=True) == {"update": 38 + 40}
    # Accumulated in fp32, every gradient has 4 bytes.
    assert nbytes(on_device=False, accumulates=True) == {"update": 34 + 32}
    assert nbytes() == {"update": 62, "bus": 2 * (2 + 4)}
    # Two ranks of one node send half of the model: the average (twice on CPUs) and the gather.
    two = {"world_size": 2, "local_world_size": 2}
    assert nbytes(**two) == {"update": 62, "bus": 6, "network": 0.5 * (2 * 2 + 2 * 4)}
    assert nbytes(**two, on_device=False)["network"] == 0.5 * (3 * 2 + 3 * 4)
    assert nbytes(**two, reduces=False)["network"] == 0.5 * (2 + 4)
    assert nbytes(**two, reduce_fp32=True)["network"] == 0.5 * (4 + 4 + 2 + 4)
    # On a CPU each of two ranks packs all gradients and copies half to its shard: reads and writes.
    assert nbytes(**two, on_device=False)["update"] == 62 + 2 * (2 * 2 + 2 + 2 * 4 + 4)
    assert nbytes(**two, on_device=False, reduces=False)["update"] == 62
    assert nbytes(**two, replicated=True) == {"network": 0.5 * 2 * (2 + 4)}
    assert nbytes(**two, replicated=True, on_device=False)["update"] == 2 * 62


def test_doubts_say_why_a_time_is_rough() -> None:
    measured = Machine(host_gb_per_s=10.0, sources={"update": Source.MEASURED})
    specs = synthetic_specs(16_000_000, 2)
    timing = predict_time(specs, Training(on_device=False), measured)
    assert timing is not None
    assert timing.doubts == ()
    for numel, training, words in (
        (1_000_000, Training(on_device=False), "a node updates 1 M parameters"),
        (10**9, Training(on_device=False), "a node updates 1 B parameters"),
        (16_000_000, Training(), "no bandwidth is known for the bus"),
        (16_000_000, Training(on_device=False, world_size=2), "for the network"),
    ):
        timing = predict_time(synthetic_specs(numel, 2), training, measured)
        assert timing is not None
        assert words in "\n".join(timing.doubts)


def test_gradients_that_are_read_in_place_are_not_freed() -> None:
    specs = synthetic_specs(200_000_000, 2)  # of four buckets
    for training, numel in (
        (Training(on_device=False), 200_000_000),
        (Training(), 50_000_000),
        (Training(streams=False), 200_000_000),
        (Training(on_device=False, world_size=2), 50_000_000),
        (Training(on_device=False, world_size=2, reduces=False), 200_000_000),
    ):
        plan = predict(specs, training)
        side = plan.device if training.on_device else plan.host
        assert side["gradients"] == pytest.approx(2 * numel, rel=1e-4), training


def test_a_world_must_divide_into_nodes() -> None:
    with pytest.raises(ValueError, match="multiple of local_world_size"):
        Training(world_size=6, local_world_size=4)
    with pytest.raises(ValueError, match="world_size must be at least 1"):
        Training(world_size=0)
    with pytest.raises(ValueError, match="at least 1 and at most 1e\\+15, not 0"):
        synthetic_specs(0, 2)
