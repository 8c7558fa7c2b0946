"""Measurement and check of the network: how fast ranks average and gather buckets, as in a step."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from offload_adam.coordinator.ranks import RankGroup
from offload_adam.coordinator.startup import World, joined_world
from offload_adam.doctor.bandwidth_cache import Bandwidth, Ranks, ranks_like
from offload_adam.doctor.finding import Finding
from offload_adam.layout.ring import ALL_REDUCE_PASSES, RingSpeed, pass_nbytes
from offload_adam.layout.schedule import Lane
from offload_adam.options import FailurePolicy
from offload_adam.transfer.collectives import Collectives
from offload_adam.transfer.streams import streams_for

BUCKET_NBYTES = 32 * 1024 * 1024
# A step starts a collective while another is running, which hides some of its latency.
NUM_IN_FLIGHT = 2
NUM_ROUNDS = 7
_TIMEOUT = timedelta(seconds=60)
_POLL_S = 5e-5

_LEAST = {
    # GPUs of one node that copy through host memory over PCIe 3 reach this.
    ("nccl", True): (
        5.0,
        "check whether the GPUs reach each other directly (nvidia-smi topo -m, NCCL_DEBUG=INFO), "
        "and that NCCL_P2P_DISABLE is not set",
    ),
    # Ethernet of 10 Gbit/s gives 1.2.
    ("nccl", False): (
        1.0,
        "see with NCCL_DEBUG=INFO which interface NCCL uses, name the fastest in "
        "NCCL_SOCKET_IFNAME or NCCL_IB_HCA, and raise train.gradient_accumulation_steps",
    ),
    ("gloo", True): (
        0.1,
        "measure on an idle machine, and start no more ranks than there are cores",
    ),
    # gloo copies much, and gets half of Ethernet's 1.2.
    ("gloo", False): (
        0.5,
        "name the fastest interface in GLOO_SOCKET_IFNAME, and raise "
        "train.gradient_accumulation_steps",
    ),
}
"""(backend, whether all ranks are on one node) -> (GB/s that a sound network reaches, what to check
if this one does not)."""


@dataclass(frozen=True, slots=True)
class Network:
    """The measured speed of the ranks' network.

    speed: None if the measurement failed.
    trouble: text of the error; "" if the measurement succeeded.
    """

    ranks: Ranks
    speed: RingSpeed | None
    trouble: str = ""


def look_at_network() -> Network | None:
    """Join the ranks that torchrun started, measure their network, and leave them. Collective.

    Returns:
        The speed, or the error's text; None for a process without peers.
    """
    world = World.from_environment()
    if world.world_size == 1:
        return None
    ranks = ranks_like(world.world_size, world.local_world_size, world.device.type)
    try:
        with joined_world(_TIMEOUT, FailurePolicy(stuck_after=_TIMEOUT.total_seconds())) as joined:
            speed = measure_network(joined.ranks, joined.device)
    except (RuntimeError, OSError) as error:
        return Network(ranks, None, " ".join(str(error).split()))
    return Network(ranks, speed)


def measure_network(
    ranks: RankGroup, device: torch.device, *, nbytes: int = BUCKET_NBYTES
) -> RingSpeed:
    """Return the speed at which buckets are averaged and gathered, equal on all ranks. Collective.

    The collectives and their process groups are those of a step. A round takes as long as its
    slowest rank, and the median round counts.

    Args:
        nbytes: bytes of a bucket.
    """
    ranks.open_data_groups([device.type])
    streams = streams_for(device)
    collectives = Collectives(ranks)
    rank, world_size = ranks.rank, ranks.world_size
    # On gloo the mean of a bucket is an all-reduce, elsewhere a reduce-scatter.
    is_gloo = dist.get_backend(ranks.data_group(device)) == "gloo"
    passes = ALL_REDUCE_PASSES if is_gloo else 1

    def round_s(lane: Lane, buckets: list[torch.Tensor]) -> float:
        # A barrier: the time of a rank must not contain the delay of another rank's start.
        ranks.all_reduce(torch.zeros(1, dtype=torch.float32, device="cpu"))
        shard_numel = buckets[0].numel() // world_size
        part = (rank * shard_numel, (rank + 1) * shard_numel)
        start_s = time.perf_counter()
        pending = [
            collectives.mean(streams, bucket, part)
            if lane is Lane.REDUCE
            else collectives.gather(streams, bucket)
            for bucket in buckets
        ]
        for one in pending:
            one.wait(ranks)
        # On a GPU, `one.wait` returns at once: only the lane's stream waits for the collectives. An
        # event on that stream completes after them. On a CPU, the collectives are over here.
        ranks.wait_until(streams.record(lane).query, pause_s=_POLL_S)
        return time.perf_counter() - start_s

    def speed(lane: Lane, dtype: torch.dtype, passes: int) -> float:
        numel = nbytes // dtype.itemsize // world_size * world_size
        buckets = [torch.zeros(numel, dtype=dtype, device=device) for _ in range(NUM_IN_FLIGHT)]
        rounds = [round_s(lane, buckets) for _ in range(1 + NUM_ROUNDS)]
        # The first round does not count: in it the backend connects the ranks.
        slowest = torch.tensor(rounds[1:], dtype=torch.float64, device="cpu")
        ranks.all_reduce(slowest, dist.ReduceOp.MAX)
        sent_nbytes = NUM_IN_FLIGHT * passes * pass_nbytes(buckets[0].nbytes, world_size)
        return sent_nbytes / float(slowest.median()) / 1e9

    return RingSpeed(
        speed(Lane.REDUCE, torch.bfloat16, passes),
        speed(Lane.REDUCE, torch.float32, passes),
        speed(Lane.GATHER, torch.bfloat16, 1),
    )


def network_finding(network: Network | None, known: Bandwidth, num_ranks: int) -> Finding:
    """Return the finding on the network, or how to measure it.

    Args:
        network: None for a process without peers.
        known: bandwidths that were measured earlier.
        num_ranks: number of ranks on this node.
    """
    if network is None:
        earlier = [f"{ranks}: {_speeds(speed)}" for ranks, speed in known.network.items()]
        what = f"measured earlier: {'; '.join(earlier)}" if earlier else "not measured"
        command = f"torchrun --nproc-per-node={max(2, num_ranks)} -m offload_adam doctor"
        found = (
            f"{what}. To measure it{' again' if earlier else ''}, start doctor as you start the "
            f"run; on one node: {command}"
        )
        return Finding("network", found)
    if network.speed is None:
        advice = (
            "check that every rank reaches MASTER_ADDR and all other ranks: firewalls, and the "
            "interfaces in GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME; NCCL_DEBUG=INFO logs more"
        )
        return Finding("network", f"{network.ranks}: {network.trouble}", advice, is_fatal=True)
    least, advice = _LEAST[network.ranks.backend, network.ranks.num_nodes == 1]
    found = f"{network.ranks}: {_speeds(network.speed)}"
    if network.speed.least < least:
        return Finding("network", f"{found}; expected {least} GB/s or more", advice)
    return Finding("network", found)


def _speeds(speed: RingSpeed) -> str:
    return (
        f"each rank sends {speed.mean_16bit:.2f} GB/s averaging bf16, {speed.mean_32bit:.2f} "
        f"averaging fp32, {speed.gather:.2f} gathering bf16"
    )
