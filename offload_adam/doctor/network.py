"""How fast the ranks that torchrun has started exchange buckets, as a step does it."""

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
NUM_IN_FLIGHT = 2
"""Buckets at once: a step begins one while another is under way, which hides some of its work."""
NUM_ROUNDS = 7
_TIMEOUT = timedelta(seconds=60)
_PAUSE_S = 5e-5

_Start = Callable[[], PendingCollective]


@dataclass(frozen=True, slots=True)
class Network:
    """What was found of these ranks' network: its speed, or what has gone wrong."""

    ranks: Ranks
    speed: RingSpeed | None
    trouble: str = ""


def launched_world() -> World | None:
    """Return the world that torchrun has started this process in, None where it is alone."""
    world = World.from_environment()
    return world if world.world_size > 1 else None


def look_at_network(world: World) -> Network:
    """Join the ranks, measure and leave them again; trouble is told, not raised. Collective."""
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
    """Return how fast buckets of `nbytes` are averaged and gathered, the same on all ranks.

    By the very calls and on a group like that of a step. A round lasts as long as the slowest rank
    takes; of each kind the median round counts. Collective.
    """
    ranks.open_data_groups([device.type])
    streams = streams_for(device)
    collectives = Collectives(ranks)
    rank, world_size = ranks.rank, ranks.world_size
    passes = _passes_of_mean(ranks, device)

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


def _passes_of_mean(ranks: RankGroup, device: torch.device) -> int:
    """Return the passes of a bucket's mean: on gloo it is all-reduced, elsewhere scattered."""
    backend = dist.get_backend(ranks.data_group(device))
    return ALL_REDUCE_PASSES if backend == "gloo" else 1


def _median_s(ranks: RankGroup, streams: Streams, lane: Lane, starts: Sequence[_Start]) -> float:
    """Return the median seconds of a round; the first, which connects the ranks, is left out."""
    rounds = [_round_s(ranks, streams, lane, starts) for _ in range(1 + NUM_ROUNDS)]
    slowest = torch.tensor(rounds[1:], dtype=torch.float64, device="cpu")
    ranks.all_reduce(slowest, dist.ReduceOp.MAX)
    return float(slowest.median())


def _round_s(ranks: RankGroup, streams: Streams, lane: Lane, starts: Sequence[_Start]) -> float:
    ranks.all_reduce(torch.zeros(1, dtype=torch.float32, device="cpu"))  # they begin together
    start_s = time.perf_counter()
    for pending in [start() for start in starts]:
        pending.wait(ranks)
    over = streams.record(lane)
    ranks.wait_until(over.query, pause_s=_PAUSE_S)  # on a device; a host's collective is over
    return time.perf_counter() - start_s


def network_findings(
    network: Network | None, known: Bandwidth, num_ranks: int
) -> Iterator[Finding]:
    """Yield what is found of the network, or how to find it.

    Args:
        network: None for a process that is alone.
        known: what was kept before.
        num_ranks: of this node.
    """
    if network is None:
        found = [f"{ranks}: {_said(speed)}" for ranks, speed in known.network.items()]
        found += [f"ranks that are started like a run measure it, {_how_to_measure(num_ranks)}"]
        yield ok("network", "; ".join(found))
    elif network.speed is None:
        yield failed(
            "network",
            f"{network.ranks}: {network.trouble}",
            "see that all ranks reach MASTER_ADDR and each other: firewalls, the interfaces in "
            "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME; NCCL_DEBUG=INFO says more",
        )
    else:
        yield judged(network.ranks, network.speed)


def judged(ranks: Ranks, speed: RingSpeed) -> Finding:
    """Judge a measured speed by what the slowest hardware of its kind has."""
    found = f"{ranks}: {_said(speed)}"
    least, advice = _least(ranks)
    if speed.least < least:
        return warning("network", found, f"less than {least} GB/s a rank: {advice}")
    return ok("network", found)


def _least(ranks: Ranks) -> tuple[float, str]:
    """Return the GB/s below which something is wrong, and what to look at then.

    GPUs of one node have 5 by way of the host's memory over PCIe 3. Between nodes, Ethernet of 10
    Gbit/s has 1.2, and gloo, which copies much, gets half of it.
    """
    if ranks.backend == "nccl" and ranks.num_nodes == 1:
        return 5.0, (
            "see whether the GPUs reach each other (nvidia-smi topo -m, NCCL_DEBUG=INFO), and that "
            "NCCL_P2P_DISABLE is not set"
        )
    if ranks.backend == "nccl":
        return 1.0, (
            "let NCCL_DEBUG=INFO say which interface is taken, name the fastest in "
            "NCCL_SOCKET_IFNAME or NCCL_IB_HCA, and raise train.gradient_accumulation_steps"
        )
    if ranks.num_nodes == 1:
        return 0.1, "measure again when the machine is idle; no more ranks than there are cores"
    return 0.5, (
        "name the fastest interface in GLOO_SOCKET_IFNAME, and raise "
        "train.gradient_accumulation_steps"
    )


def _said(speed: RingSpeed) -> str:
    """Say what a rank sends, and what it comes to."""
    return (
        f"a rank sends {speed.mean_16bit:.2f} GB/s averaging bf16, {speed.mean_32bit:.2f} "
        f"averaging fp32, {speed.gather:.2f} gathering"
    )


def _how_to_measure(num_ranks: int) -> str:
    count = max(2, num_ranks)
    return f"on one node by torchrun --nproc-per-node={count} -m offload_adam doctor"
