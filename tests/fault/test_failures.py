"""Ranks that fail in the training command: the messages, and that no process is left."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.fault.runs import run

pytestmark = [pytest.mark.fault, pytest.mark.timeout(200)]

BOUND_S = 30.0
STOPPED_S = 25.0
"""Bound for a stopped rank. If it were not continued, torchrun would wait 30 s for it to end."""
VANISHED_S = BOUND_S + 35.0
"""Bound for a rank that nobody continues."""


@pytest.mark.parametrize("place", ["forward", "backward", "reduce", "agree", "update", "gather"])
def test_a_killed_rank_is_named_and_ends_the_run(tmp_path: Path, place: str) -> None:
    ended = run(tmp_path, f"kill@{place}")
    assert ended.code == 1
    assert ended.took_s < BOUND_S
    assert "offload-adam: Rank 1 is dead: process " in ended.printed
    assert "(This is rank 0, in " in ended.printed
    assert "offload_adam/" not in ended.printed  # no traceback of ours
    assert [record["step"] for record in ended.records] in ([1, 2], [1, 2, 3])


@pytest.mark.parametrize("override", ["optimizer.gradient_reduction=external", "parallel={}"])
def test_a_killed_rank_is_named_where_torchs_own_collective_fails(
    tmp_path: Path, override: str
) -> None:
    ended = run(tmp_path, "kill@forward", f"--{override}")
    assert ended.code == 1
    assert ended.took_s < BOUND_S
    assert "offload-adam: Rank 1 is dead: process " in ended.printed
    assert "offload_adam/" not in ended.printed  # no traceback of ours


@pytest.mark.parametrize("gradient_reduction", ["optimizer", "external"])
def test_a_stopped_rank_is_dead_to_the_others(tmp_path: Path, gradient_reduction: str) -> None:
    override = f"--optimizer.gradient_reduction={gradient_reduction}"
    ended = run(tmp_path, "stop@forward", override)
    assert ended.code == 1
    assert ended.took_s < STOPPED_S
    assert "Rank 1 is dead: process " in ended.printed
    assert "has sent no heartbeat for " in ended.printed
    assert ", last seen in " in ended.printed


def test_a_rank_that_hangs_is_named_with_its_phase(tmp_path: Path) -> None:
    ended = run(tmp_path, "hang@update")
    assert ended.code == 1
    assert ended.took_s < BOUND_S
    assert "Hung while other ranks waited for more than 3 s: rank 1 (process " in ended.printed
    assert "in update of bucket 0, step 3" in ended.printed


@pytest.mark.parametrize("place", ["forward", "update"])
def test_an_error_on_one_rank_is_reported_on_the_others(tmp_path: Path, place: str) -> None:
    ended = run(tmp_path, f"raise@{place}")
    assert ended.code == 1
    assert ended.took_s < BOUND_S
    assert "RuntimeError: a fault of the test's" in ended.printed  # its own traceback
    assert "Rank 1 exited with RuntimeError: a fault of the test's" in ended.printed


def test_a_hang_in_a_collective_that_is_not_ours_ends_the_run(tmp_path: Path) -> None:
    """DistributedDataParallel waits in its own collective, where we cannot raise an error."""
    ended = run(tmp_path, "vanish@forward", "--optimizer.gradient_reduction=external")
    assert ended.code == 1
    assert ended.took_s < VANISHED_S
    assert "offload-adam: rank 0: Rank 1 is dead: process " in ended.printed


def test_a_rank_that_never_starts_is_named(tmp_path: Path) -> None:
    ended = run(tmp_path, "hang@start")
    assert ended.code == 1
    assert ended.took_s < BOUND_S
    assert "Timed out after 3 s waiting for rank(s) [1] to join the run." in ended.printed


@pytest.mark.parametrize(
    ("kind", "difference"),
    [
        ("configuration", "train.batch_size is 3, but 8 on rank 0"),
        ("dtype", "is torch.bfloat16, but torch.float32 on rank 0"),
        ("shape", "is (33,), but (32,) on rank 0"),
    ],
)
def test_an_error_names_the_difference_between_ranks(
    tmp_path: Path, kind: str, difference: str
) -> None:
    ended = run(tmp_path, f"differ@{kind}")
    assert ended.code == 1
    assert ended.records == []
    assert "Rank(s) [1] have a different " in ended.printed
    assert difference in ended.printed


def test_state_that_does_not_fit_is_rejected_with_its_table(tmp_path: Path) -> None:
    """Both ranks measure the machine's memory; only one of them measures too little."""
    ended = run(tmp_path, "lack@memory")
    assert ended.code == 1  # torchrun's own
    assert "exitcode  : 3 " in ended.printed
    assert "The optimizer state of rank(s) [0, 1] does not fit into the memory of " in ended.printed
    assert ended.records == []
    assert ended.printed.count("  total ") == 1  # said once
    allowed = tmp_path / "allowed"
    allowed.mkdir()
    ended = run(allowed, "lack@memory", "--memory.allow_overcommit=true", "--train.num_steps=2")
    assert ended.code == 0, ended.printed


def test_a_failed_allocation_is_reported_on_all_ranks(tmp_path: Path) -> None:
    """The memory check passes, but the kernel then rejects one rank's allocation."""
    ended = run(tmp_path, "take@memory", "--coordinator.stuck_after=30")
    assert ended.code == 1
    assert "exitcode  : 3 " in ended.printed
    assert "of host memory cannot be mapped: Cannot allocate memory" in ended.printed
    assert "Rank(s) [1] failed in allocating its state" in ended.printed
    assert "offload_adam/" not in ended.printed  # no traceback of ours
    assert ended.records == []


def test_an_error_in_the_update_thread_is_reported_on_the_others(tmp_path: Path) -> None:
    ended = run(tmp_path, "raise@update", "--optimizer.overlap=true")
    assert ended.code == 1
    assert ended.took_s < BOUND_S
    assert "RuntimeError: a fault of the test's" in ended.printed
    assert "Rank 1 exited with RuntimeError: a fault of the test's" in ended.printed


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_non_finite_value_on_one_rank_skips_the_step_on_all(tmp_path: Path, value: str) -> None:
    ended = run(tmp_path, f"{value}@loss", "--train.num_steps=6")
    assert ended.code == 0, ended.printed
    assert [record["skipped"] for record in ended.records] == [False, False, True] + [False] * 3
    assert ended.records[2]["non_finite"]


def test_a_clock_that_is_set_ends_no_run(tmp_path: Path) -> None:
    """Back by hours on one rank, forwards on the other, and between two runs."""
    options = ("--checkpoint.every=100", "--checkpoint.mode=async", "--train.eval_every=0")
    ended = run(tmp_path, "clock@forward", "--train.num_steps=200", *options)
    assert ended.code == 0, ended.printed
    assert ended.printed.count("fault on rank") == 2
    for number, path in enumerate((tmp_path / "tiny").rglob("*")):
        time_s = time.time() + 10_000 * (number % 3 - 1)
        os.utime(path, (time_s, time_s))
    checkpoints = tmp_path / "tiny" / "checkpoints"
    os.utime(checkpoints / "step-200", (0, 0))
    ended = run(tmp_path, "", "--train.num_steps=210", *options)
    assert ended.code == 0, ended.printed
    assert "step-200 at step 200" in ended.printed
    assert [record["step"] for record in ended.records] == list(range(1, 211))
