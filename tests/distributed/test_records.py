"""The progress of every rank, as one rank reads it from the store, and over HTTP in a run."""

from __future__ import annotations

import json
import re
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from offload_adam.coordinator.progress import PROGRESS
from offload_adam.coordinator.ranks import open_rank_group
from tests.distributed.test_train_job import TINY, command, environment
from tests.support.ranks import RankPool

Seen = list[tuple[int, int, str, int | None]]


def look(rank: int, world_size: int) -> Seen:
    """Enter a phase, and return what all ranks have published, once all have entered theirs."""
    import torch

    ranks = open_rank_group(None)
    assert ranks.watch is not None
    with PROGRESS.at(f"phase of {rank}", rank):
        PROGRESS.begin_step(10 + rank)
        deadline_s = time.monotonic() + 50
        seen: Seen = []
        while not all(phase.startswith("phase of") for _, _, phase, _ in seen) or not seen:
            assert time.monotonic() < deadline_s, seen
            seen = [
                (peer.rank, peer.progress.step, peer.progress.phase, peer.progress.bucket)
                for peer in ranks.watch.read_records()
            ]
        ranks.all_reduce(torch.zeros(1))
    ranks.release()
    return seen


def test_every_rank_reads_the_progress_of_all_ranks(ranks: RankPool) -> None:
    expected = [(rank, 10 + rank, f"phase of {rank}", rank) for rank in range(3)]
    assert ranks.run(look, 3) == [expected] * 3


def read(port: int, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as answer:
        text: str = answer.read().decode()
        return text


def status(port: int) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(read(port, "/status"))
        return found
    except (urllib.error.URLError, ConnectionError):
        return None


def have_begun(places: list[dict[str, Any]]) -> bool:
    """Return whether both ranks have published that they are past the first step."""
    return len(places) == 2 and all(place["step"] > 1 for place in places)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_run_on_two_ranks_shows_both(tmp_path: Path) -> None:
    pytest.importorskip("prometheus_client")
    pytest.importorskip("waitress")
    settings = [f"--run.dir={tmp_path}", "--train.num_steps=100000", "--checkpoint.every=5"]
    port = 18_000 + hash(str(tmp_path)) % 10_000
    process = subprocess.Popen(
        [*command(2), "train", str(TINY), *settings, f"--observe.http_port={port}"],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        found: dict[str, Any] | None = None
        deadline_s = time.monotonic() + 90
        while found is None or not found["last_checkpoint"] or not have_begun(found["ranks"]):
            assert time.monotonic() < deadline_s, found
            assert process.poll() is None
            time.sleep(0.2)
            found = status(port)
        health, metrics = read(port, "/healthz"), read(port, "/metrics")
    finally:
        process.terminate()
        process.wait(60)
    assert [rank["rank"] for rank in found["ranks"]] == [0, 1]
    assert all(rank["phase"] for rank in found["ranks"])
    assert found["last_checkpoint"] % 5 == 0
    assert found["last"]["loss"] > 0
    assert health == '{"healthy":true}'
    for name in ("step", "heartbeat_age_seconds", "progress_age_seconds"):
        samples = re.findall(rf'offload_adam_rank_{name}{{.*rank="(\d)".*}} (.*)', metrics)
        assert [rank for rank, _ in samples] == ["0", "1"]
        assert all(0 <= float(value) < 1e5 for _, value in samples)
