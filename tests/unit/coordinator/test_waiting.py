"""The loop of every wait: when it ends, what it checks, and how long it pauses."""

from __future__ import annotations

import time

import pytest

from offload_adam.coordinator.waiting import wait_until


def test_it_checks_and_pauses_after_each_poll_but_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    polls, checks = iter([False] * 5 + [True]), [0]

    def check() -> None:
        checks[0] += 1

    assert wait_until(lambda: next(polls), check=check, pause_s=1.0, longest_pause_s=5.0)
    assert checks == [5]
    assert pauses == [1.0, 2.0, 4.0, 5.0, 5.0]
    polls = iter([False, False, True])
    pauses.clear()
    assert wait_until(lambda: next(polls), pause_s=0.5)
    assert pauses == [0.5, 0.5]


def test_a_condition_that_holds_costs_one_poll(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(time, "sleep", fail)
    assert wait_until(lambda: True, check=lambda: fail(), pause_s=1.0, timeout_s=0.0)


def test_it_ends_by_its_timeout_or_by_an_error_of_the_check() -> None:
    began_s = time.monotonic()
    assert not wait_until(lambda: False, pause_s=0.001, timeout_s=0.05)
    assert 0.05 <= time.monotonic() - began_s < 5.0

    def check() -> None:
        raise RuntimeError("rank 1 is dead")

    with pytest.raises(RuntimeError, match="rank 1 is dead"):
        wait_until(lambda: False, check=check)
