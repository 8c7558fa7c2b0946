"""Measurement and check of the network: how fast ranks average and gather buckets, as in a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist

from offload_adam.coordinator.ranks import RankGroup
from offload_adam.coordinator.startup import World, joined_world
from offload_adam.doctor.bandwidth_cache import Bandwidth, Ranks, ranks_like
from offload_adam.doctor.finding import Finding, failed, ok, warning
from offload_adam.layout.ring import ALL_REDUCE_PASSES, RingSpeed, pass_nbytes
from offload_adam.layout.schedule import Lane
from offload_adam.options import FailurePolicy
from offload_adam.transfer.collectives import Collectives, PendingCollective
from offload_adam.transfer.streams import Streams, streams_for

BUCKET_NBYTES = 32 * 1024 * 1024
# A step starts a collective while another is running, which hides some of its latency.
NUM_IN_FLIGHT = 2
NUM_ROUNDS = 7
_TIMEOUT = timedelta(seconds=60)
_POLL_S = 5e-5

_Start = Callable[[], PendingCollective]


@dataclass(frozen=True, slots=True)
class Network:
    """The measured speed of these ranks' network; if it failed, None and the error's text."""

    ranks: Ranks
    speed: RingSpeed | None
    trouble: str = ""


def look_at_network() -> Network | None:
    """Join the ranks that torchrun started, measure, and leave them. Collective.

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
        nbytes: of a bucket.
    """
    ranks.open_data_groups([device.type])
    streams = streams_for(device)
    collectives = Collectives(ranks)
    rank, world_size = ranks.rank, ranks.world_size
    # On gloo the mean of a bucket is an all-reduce, elsewhere a reduce-scatter.
    is_gloo = dist.get_backend(ranks.data_group(device)) == "gloo"
    passes = ALL_REDUCE_PASSES if is_gloo else 1

    def buffers(dtype: torch.dtype) -> list[torch.Tensor]:
        numel = nbytes // dtype.itemsize // world_size * world_size
        return [torch.zeros(numel, dtype=dtype, device=device) for _ in range(NUM_IN_FLIGHT)]

    def speed(lane: Lane, starts: Sequence[_Start], sent_nbytes: float) -> float:
        return NUM_IN_FLIGHT * sent_nbytes / _median_s(ranks, streams, lane, starts) / 1e9

    def mean(dtype: torch.dtype) -> float:
        buckets = buffers(dtype)
        shard_numel = buckets[0].numel() // world_size
        part = (rank * shard_numel, (rank + 1) * shard_numel)
        starts = [partial(collectives.mean, streams, bucket, part) for bucket in buckets]
        return speed(Lane.REDUCE, starts, passes * pass_nbytes(buckets[0].nbytes, world_size))

    def gather() -> float:
        buckets = buffers(torch.bfloat16)
        starts = [partial(collectives.gather, streams, bucket) for bucket in buckets]
        return speed(Lane.GATHER, starts, pass_nbytes(buckets[0].nbytes, world_size))

    return RingSpeed(mean(torch.bfloat16), mean(torch.float32), gather())


def _median_s(ranks: RankGroup, streams: Streams, lane: Lane, starts: Sequence[_Start]) -> float:
    """Return the median seconds of a round, without the first, which connects the ranks."""
    rounds = [_round_s(ranks, streams, lane, starts) for _ in range(1 + NUM_ROUNDS)]
    slowest = torch.tensor(rounds[1:], dtype=torch.float64, device="cpu")
    ranks.all_reduce(slowest, dist.ReduceOp.MAX)
    return float(slowest.median())


def _round_s(ranks: RankGroup, streams: Streams, lane: Lane, starts: Sequence[_Start]) -> float:
    # A barrier: the time of a rank must not contain the delay of another rank's start.
    ranks.all_reduce(torch.zeros(1, dtype=torch.float32, device="cpu"))
    start_s = time.perf_counter()
    for pending in [start() for start in starts]:
        pending.wait(ranks)
    # On a device, the host has not waited yet: the collective is over when its stream is.
    ranks.wait_until(streams.record(lane).query, pause_s=_POLL_S)
    return time.perf_counter() - start_s


def network_findings(
    network: Network | None, known: Bandwidth, num_ranks: int
) -> Iterator[Finding]:
    """Yield the finding on the network, or how to measure it.

    Args:
        network: None for a process without peers.
        known: bandwidths that were measured earlier.
        num_ranks: number of ranks on this node.
    """
    if network is None:
        found = [f"{ranks}: {_speeds(speed)}" for ranks, speed in known.network.items()]
        command = f"torchrun --nproc-per-node={max(2, num_ranks)} -m offload_adam doctor"
        found += [f"to measure it, start doctor as the run is started; on one node: {command}"]
        yield ok("network", "; ".join(found))
    elif network.speed is None:
        yield failed(
            "network",
            f"{network.ranks}: {network.trouble}",
            "check that every rank reaches MASTER_ADDR and all other ranks: firewalls, and the "
            "interfaces in GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME; NCCL_DEBUG=INFO logs more",
        )
    else:
        yield judged(network.ranks, network.speed)


def judged(ranks: Ranks, speed: RingSpeed) -> Finding:
    """Compare a measured speed with that of the slowest usual hardware of its kind."""
    found = f"{ranks}: {_speeds(speed)}"
    least, advice = _least(ranks)
    if speed.least < least:
        return warning("network", f"{found}; expected {least} GB/s or more", advice)
    return ok("network", found)


def _least(ranks: Ranks) -> tuple[float, str]:
    """Return the GB/s below which something is wrong, and what to check then."""
    if ranks.backend == "nccl" and ranks.num_nodes == 1:
        # GPUs of one node that copy through host memory over PCIe 3 reach this.
        return 5.0, (
            "check whether the GPUs reach each other directly (nvidia-smi topo -m, "
            "NCCL_DEBUG=INFO), and that NCCL_P2P_DISABLE is not set"
        )
    if ranks.backend == "nccl":
        # Ethernet of 10 Gbit/s gives 1.2.
        return 1.0, (
            "see with NCCL_DEBUG=INFO which interface NCCL uses, name the fastest in "
            "NCCL_SOCKET_IFNAME or NCCL_IB_HCA, and raise train.gradient_accumulation_steps"
        )
    if ranks.num_nodes == 1:
        return 0.1, "measure on an idle machine, and start no more ranks than there are cores"
    # gloo copies much, and gets half of Ethernet's 1.2.
    return 0.5, (
        "name the fastest interface in GLOO_SOCKET_IFNAME, and raise "
        "train.gradient_accumulation_steps"
    )


def _speeds(speed: RingSpeed) -> str:
    return (
        f"each rank sends {speed.mean_16bit:.2f} GB/s averaging bf16, {speed.mean_32bit:.2f} "
        f"averaging fp32, {speed.gather:.2f} gathering bf16"
    )
