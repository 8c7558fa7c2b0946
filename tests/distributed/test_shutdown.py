"""How ranks end: after a killed rank, or by a plain exit; and the memory they hold until then."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from offload_adam import OffloadAdam, OffloadPolicy, PeerFailedError
from tests.support.ranks import RankDied, RankError, RankPool
from tests.support.reference import Weights, exact_gradients, outcome_of

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).resolve().parents[2]


def die_in_a_step(rank: int, world_size: int, streams: bool) -> None:
    model = Weights([(300,), (2000,)])
    optimizer = OffloadAdam(
        model.parameters(),
        module=model if streams else None,
        gradient_reduction="optimizer",
        offload=OffloadPolicy(bucket_nbytes=1024),
        num_threads=1,
    )
    for step in range(3):
        model(exact_gradients(model.all, 10 * step + rank, world_size)).backward()
        if step == 2 and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.fault
def test_a_killed_rank_ends_the_step_of_the_others(own_ranks: RankPool) -> None:
    for streams in (False, True):
        outcomes = own_ranks.run(die_in_a_step, 3, streams, timeout=20.0, expect_errors=True)
        for rank, outcome in enumerate(outcomes):
            assert isinstance(outcome, RankError)
            if rank == 1:
                assert outcome.type is RankDied
            else:
                assert outcome.type is PeerFailedError
                assert "Rank 1 is dead: process " in outcome.message
                assert f"(This is rank {rank}, in " in outcome.message


def drop_and_start_again(rank: int, world_size: int, store: str) -> list[torch.Tensor]:
    """Drop an optimizer without close(), and keep another after its process group's end."""
    model = Weights([(300,), (4,)])
    dropped = OffloadAdam(model.parameters(), module=model, num_threads=1)
    kept = OffloadAdam(Weights([(5,)]).parameters(), gradient_reduction="optimizer", num_threads=1)
    del dropped
    gc.collect()
    gradients = exact_gradients(model.all, rank, world_size)
    model(gradients).backward()
    for parameter, gradient in zip(model.all, gradients, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, gradient)
    dist.destroy_process_group()
    outcome = outcome_of(kept.step)
    assert "The process groups of this optimizer are closed. Construct a new" in outcome.message
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    kept.close()
    assert outcome_of(kept.step).error == "RuntimeError"
    again = OffloadAdam(model.parameters(), gradient_reduction="optimizer", num_threads=1)
    again.step()
    again.close()
    return [parameter.detach().clone() for parameter in model.all]


def test_a_dropped_optimizer_takes_no_gradients(ranks: RankPool, tmp_path: Path) -> None:
    first, second = ranks.run(drop_and_start_again, 2, str(tmp_path / "store"))
    for weight, other, before in zip(first, second, Weights([(300,), (4,)]).all, strict=True):
        assert torch.equal(weight, other)
        assert not torch.equal(weight, before)


def wait_for_a_late_rank(rank: int, world_size: int) -> None:
    """Take a step that the peer joins too late: the group's timeout is 2 s."""
    over = dist.PrefixStore("over", _get_default_store())
    group = dist.new_group(list(range(world_size)), timeout=timedelta(seconds=2))
    model = Weights([(300,)])
    optimizer = OffloadAdam(
        model.parameters(), gradient_reduction="optimizer", process_group=group, num_threads=1
    )
    if rank == 0:
        start_s = time.monotonic()
        outcome = outcome_of(optimizer.step)
        assert time.monotonic() - start_s > 1.8
        over.set("step", "")
        assert outcome.error == "PeerFailedError"
        assert "Timed out" in outcome.message
        assert "Not in the collective: rank 1 (process " in outcome.message
    else:
        over.wait(["step"], timedelta(seconds=60))
    optimizer.close()


def test_waits_end_with_the_timeout_of_the_given_group(ranks: RankPool) -> None:
    ranks.run(wait_for_a_late_rank, 2)


LEAVE = """
import sys
import torch
import torch.distributed as dist
from offload_adam import OffloadAdam, OffloadPolicy
from tests.support.reference import Weights, exact_gradients

rank, store = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
model = Weights([(300,), (2000,)])
optimizer = OffloadAdam(
    model.parameters(), module=model, num_threads=1, offload=OffloadPolicy(bucket_nbytes=1024)
)
model(exact_gradients(model.all, rank, 2)).backward()
optimizer.step()
# In flight at the end.
model(exact_gradients(model.all, rank, 2)).backward()
if rank == 0:
    dist.destroy_process_group()
print("left")
"""


def test_exiting_without_close_does_not_abort(tmp_path: Path) -> None:
    """Rank 0 destroys the process groups under a live optimizer, rank 1 just ends."""
    environment = {**os.environ, "NUMBA_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    environment.pop("WORLD_SIZE", None)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", LEAVE, str(rank), str(tmp_path / "store")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            output, errors = process.communicate(timeout=60.0)
            assert (process.returncode, output) == (0, "left\n"), errors
    finally:
        for process in processes:
            process.kill()


NUM_BUCKETS = 4
BUCKET_NUMEL = 512 * 1024
NUM_WARM, NUM_STEPS = 5, 60


def hold_memory(rank: int, world_size: int, streams: bool, overlap: bool) -> tuple[int, list[int]]:
    """Return the bytes by which this process grew over the steps, and the slots after each."""
    model = Weights([(BUCKET_NUMEL,)] * NUM_BUCKETS, torch.bfloat16)
    optimizer = OffloadAdam(
        model.parameters(),
        module=model if streams else None,
        gradient_reduction="optimizer",
        offload=OffloadPolicy(bucket_nbytes=2 * BUCKET_NUMEL),
        num_threads=1,
        overlap=overlap,
    )
    core = optimizer._core
    assert core is not None
    gradients = exact_gradients(model.all, rank, world_size)
    process = psutil.Process()
    slots, resident = [], 0
    for step in range(NUM_WARM + NUM_STEPS):
        model(gradients).backward()
        optimizer.step()
        optimizer.zero_grad()
        slots.append(sum(map(len, core.transfer.slots._free.values())))
        if step == NUM_WARM - 1:
            resident = process.memory_info().rss
    grown = process.memory_info().rss - resident
    optimizer.close()
    return grown, slots


@pytest.mark.parametrize(("streams", "overlap"), [(False, False), (True, False), (True, True)])
def test_steps_after_the_first_hold_no_more_memory(
    ranks: RankPool, streams: bool, overlap: bool
) -> None:
    for grown, slots in ranks.run(hold_memory, 2, streams, overlap):
        # Less than half a bucket (2 bytes an element) a step: none of our buffers is made anew. The
        # allocator and gloo's records of the last collectives take ten buckets or so, whatever the
        # number of steps.
        assert grown < NUM_STEPS * BUCKET_NUMEL
        if streams:
            assert max(slots) <= NUM_BUCKETS
        else:
            assert set(slots) == {1}
