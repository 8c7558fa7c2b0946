"""`bench fsdp2`: clipping and the step of a model that FSDP2 shards into host memory.

Every rank has the same model twice, sharded alike, and the same gradients from one backward. The
ranks begin each step together, and its time is that of the slowest rank.
"""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from offload_adam.bench.harness import (
    OURS,
    WARMUP_ROUNDS,
    Contender,
    Timings,
    compare,
    prepare_machine,
)
from offload_adam.bench.peers import MAX_GRAD_NORM, OUR_SETTINGS, SETTINGS
from offload_adam.bench.training.model import Decoder, Sizes, make_model, make_tokens
from offload_adam.fsdp_private import local_of
from offload_adam.optimizer import OffloadAdam

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
TIME_LIMIT_S = 900.0
TORCH = "torch_fused"
_HEAD_WIDTH = 64
_TOLERATED_ERROR = 1e-5
"""Relative error of an update: torch sums the squares of gradients in fp32, not in float64."""


class Fsdp2BenchmarkError(RuntimeError):
    """A rank failed or did not end in time, or the contenders' parameters differ."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What the ranks measure together.

    device: "cpu" or "cuda", where the model computes; the shards are in host memory.
    num_threads: of each rank.
    machine: see `describe_machine`.
    """

    sizes: Sizes
    device: str
    num_threads: int
    num_pairs: int
    machine: Mapping[str, Any]


def sizes_of(numel: int, num_layers: int, dtype: str) -> Sizes:
    """Return the sizes of a decoder with about `numel` parameters; `dtype` is a key of DTYPES."""
    num_heads = max(1, round(math.sqrt(numel / (12 * num_layers)) / _HEAD_WIDTH))
    return Sizes(
        num_layers=num_layers,
        width=num_heads * _HEAD_WIDTH,
        num_heads=num_heads,
        vocabulary=256,
        sequence_length=32,
        dtype=DTYPES[dtype],
    )


def measure_fsdp2(sizes: Sizes, num_ranks: int, num_threads: int, num_pairs: int) -> dict[str, Any]:
    """Return the report of `bench fsdp2`, a JSON object, from ranks in spawned processes.

    Raises:
        HostMemoryError: the node does not have enough memory available.
        Fsdp2BenchmarkError: a rank failed or did not end in time, or the parameters differ.
    """
    numel, itemsize = _numel(sizes), sizes.torch_dtype.itemsize
    # Each rank makes a whole model before it is sharded. Both models keep parameters, gradients and
    # copies of these; torch two moments; this package its fp32 state.
    machine = prepare_machine(numel * (itemsize * (num_ranks + 8) + 12), num_threads)
    task = Task(
        sizes=sizes,
        device="cuda" if torch.cuda.is_available() else "cpu",
        num_threads=num_threads,
        num_pairs=num_pairs,
        machine=machine,
    )
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    reports: Any = multiprocessing.get_context("spawn").Queue()
    ranks: Any = torch.multiprocessing.spawn(
        _run_rank, (num_ranks, store.port, task, reports), num_ranks, join=False, daemon=True
    )
    deadline_s = time.monotonic() + TIME_LIMIT_S
    try:
        while not ranks.join(max(0.0, deadline_s - time.monotonic()), grace_period=1.0):
            if time.monotonic() > deadline_s:
                raise Fsdp2BenchmarkError(
                    f"The ranks did not end within {TIME_LIMIT_S:.0f} s. Measure fewer parameters."
                )
    except (
        torch.multiprocessing.ProcessExitedException,
        torch.multiprocessing.ProcessRaisedException,
    ) as error:
        raise Fsdp2BenchmarkError(str(error).strip()) from error
    finally:
        for process in ranks.processes:
            process.kill()
    report: dict[str, Any] = reports.get(timeout=10.0)
    return report


def _run_rank(rank: int, num_ranks: int, port: int, task: Task, reports: Any) -> None:
    """Measure on one rank; rank 0 puts the report into the queue."""
    torch.set_num_threads(task.num_threads)
    if task.device == "cuda":
        torch.cuda.set_device(rank)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if task.device == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=num_ranks,
        timeout=timedelta(seconds=TIME_LIMIT_S),
    )
    try:
        report = measure(task)
    finally:
        dist.destroy_process_group()
    if rank == 0:
        reports.put(report)


def measure(task: Task) -> dict[str, Any]:
    """Compare both optimizers on this rank, and return the same report on every rank. Collective.

    Raises:
        Fsdp2BenchmarkError: the fp32 parameters of both differ. Raised on every rank.
    """
    our_model, torch_model = (_with_gradients(task) for _ in range(2))
    ours = OffloadAdam(our_model.parameters(), **OUR_SETTINGS, num_threads=task.num_threads)
    fused = torch.optim.AdamW(torch_model.parameters(), **SETTINGS, fused=True)

    def clip_and_step() -> None:
        torch.nn.utils.clip_grad_norm_(torch_model.parameters(), MAX_GRAD_NORM)
        fused.step()

    dtype = task.sizes.torch_dtype
    is_fp32, size = dtype == torch.float32, dtype.itemsize
    # The gradient is read for the norm and for the update. Moments and master weights are read and
    # written, and parameters written that are not their own master weights.
    our_nbytes = 2 * size + 24 + (0 if is_fp32 else size)
    # The gradient is read for the norm, scaled, and read for the update. Weights and moments are
    # read and written.
    torch_nbytes = (1 + 2 + 1 + 6) * size
    state = "fp32 state" if is_fp32 else "bf16 moments and no fp32 master weights"
    report = compare(
        "fsdp2",
        [
            Contender(OURS, ours.step, our_nbytes, _restoring(our_model)),
            Contender(TORCH, clip_and_step, torch_nbytes, _restoring(torch_model)),
        ],
        numel=_numel(task.sizes),
        num_pairs=task.num_pairs,
        machine=task.machine,
        left_out={},
        definitions={
            "ms": "of the slowest rank",
            "num_threads": "of each rank",
            OURS: "OffloadAdam(max_grad_norm=1.0) without overlap, with fp32 state",
            TORCH: f"clip_grad_norm_() and AdamW(fused=True), with {state}",
        },
        combine=_slowest,
    )
    if is_fp32:
        _reject_differences(our_model, torch_model, WARMUP_ROUNDS + task.num_pairs)
    ours.close()
    return {**report, "num_ranks": dist.get_world_size(), "dtype": task.sizes.dtype}


def _numel(sizes: Sizes) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Decoder(sizes).parameters())


def _with_gradients(task: Task) -> Decoder:
    """Return the model after a backward, with an FSDP2 group for each block and for the rest."""
    # Not at the top: the other benchmarks do not need these modules, whose import takes a second.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    model = make_model(task.sizes, torch.device("cpu"))
    options: dict[str, Any] = {
        "mesh": init_device_mesh(task.device, (dist.get_world_size(),)),
        "offload_policy": CPUOffloadPolicy(pin_memory=task.device == "cuda"),
    }
    for block in model.blocks:
        fully_shard(block, **options)
    fully_shard(model, **options)
    model(make_tokens(task.sizes, 1, torch.device(task.device))).backward()
    return model


def _restoring(model: Decoder) -> Callable[[], None]:
    """Return a function that restores the gradients, as `clip_grad_norm_` scales them in place.

    All ranks leave it together.
    """
    pairs = [(p.grad, p.grad.clone()) for p in model.parameters() if p.grad is not None]

    def restore() -> None:
        for gradient, original in pairs:
            gradient.copy_(original)
        dist.all_reduce(torch.zeros(1))  # on gloo, also where `barrier` is NCCL's

    return restore


def _slowest(timings: Timings) -> Timings:
    """Return the time of the slowest rank in each round. Collective."""
    times = torch.tensor(list(timings.values()), dtype=torch.float64)
    dist.all_reduce(times, dist.ReduceOp.MAX)
    return dict(zip(timings, times.tolist(), strict=True))


def _reject_differences(ours: Decoder, theirs: Decoder, num_steps: int) -> None:
    """Raise an error on every rank if parameters differ by more than rounding on one."""
    found: str | None = None
    pairs = zip(ours.named_parameters(), theirs.parameters(), strict=True)
    for (name, parameter), other in pairs:
        try:
            torch.testing.assert_close(
                local_of(parameter),
                local_of(other),
                rtol=num_steps * torch.finfo(torch.float32).eps,
                atol=num_steps * SETTINGS["lr"] * _TOLERATED_ERROR,
            )
        except AssertionError as error:
            found = f"{name}: {error}"
            break
    on_ranks: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(on_ranks, found)
    for rank, text in enumerate(on_ranks):
        if text is not None:
            raise Fsdp2BenchmarkError(
                f"The parameters of {OURS} and {TORCH} differ on rank {rank}. {text}"
            )
