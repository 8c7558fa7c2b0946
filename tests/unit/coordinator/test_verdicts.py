"""Who counts as stuck, from records alone."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import psutil

from offload_adam.coordinator.progress import PeerRecord, Process, ProgressRecord
from offload_adam.coordinator.verdicts import Verdict, hung_verdict, late_verdict

HERE = Process("a", "one", 1, 0)


def record(
    rank: int, still_s: float, *, waiting: bool = False, long_running: bool = False
) -> PeerRecord:
    place = ProgressRecord(
        step=3, phase="forward", bucket=rank, waiting=waiting, long_running=long_running
    )
    return PeerRecord(rank, HERE, 7, place, still_s, None)


def test_a_rank_that_does_not_move_while_another_waits_is_stuck() -> None:
    verdict = hung_verdict(
        [record(0, 11, waiting=True), record(1, 12), record(2, 9)], stuck_after=10
    )
    assert verdict is not None
    assert verdict.ranks == (1,)
    assert "rank 1 (process 1 on a) in forward of bucket 1, step 3" in verdict.text
    assert "10 s" in verdict.text


def test_nobody_is_stuck_while_work_goes_on() -> None:
    waits = record(0, 11, waiting=True)
    assert hung_verdict([waits, record(1, 2)], stuck_after=10) is None  # it moves: evaluation
    assert (
        hung_verdict([waits, record(1, 99, long_running=True)], stuck_after=10) is None
    )  # it compiles
    assert (
        hung_verdict([record(0, 11), record(1, 99)], stuck_after=10) is None
    )  # nobody waits for it
    assert hung_verdict([record(0, 9, waiting=True), record(1, 99)], stuck_after=10) is None
    assert hung_verdict([waits, record(1, 2, waiting=True)], stuck_after=10) is None


def test_ranks_that_all_wait_are_all_hung() -> None:
    verdict = hung_verdict(
        [record(0, 11, waiting=True), record(1, 12, waiting=True)], stuck_after=10
    )
    assert verdict is not None
    assert verdict.ranks == (0, 1)
    assert "All ranks have waited for each other for more than 10 s" in verdict.text


def test_ranks_that_have_left_are_not_stuck() -> None:
    gone = replace(record(1, 99), left="")
    assert hung_verdict([record(0, 11, waiting=True), gone, record(2, 1)], stuck_after=10) is None


def test_a_failed_collective_names_who_was_not_in_it() -> None:
    verdict = late_verdict([record(0, 1, waiting=True), record(1, 1)], "Timed out")
    assert verdict.ranks == (1,)
    assert "Timed out" in verdict.text


def test_records_and_verdicts_survive_the_store() -> None:
    found = record(2, 0.25, waiting=True)
    assert PeerRecord.from_json(found.to_json().encode()) == found
    assert Verdict.from_json(Verdict((1, 2), "stuck").to_json()) == Verdict((1, 2), "stuck")


def test_a_process_is_gone_when_it_has_ended_or_its_pid_is_anothers() -> None:
    own = Process.own()
    assert not own.is_gone(own)
    assert replace(own, born=own.born - 1).is_gone(own)
    child = subprocess.Popen([sys.executable, "-c", ""])
    theirs = Process.of(child.pid)
    assert child.stdout is None
    while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
        pass
    assert theirs.is_gone(own)  # a zombie
    child.wait(60)
    assert theirs.is_gone(own)
    assert not replace(theirs, machine="two").is_gone(own)
