"""The trace of a real run of two ranks, read by the format's rules and event by event."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.torchrun import run_two_ranks
from tests.unit.profiling.chrome_trace import read_trace

ROOT = Path(__file__).parents[2]
NUM_STEPS = 4


@pytest.mark.slow
@pytest.mark.distributed
def test_the_trace_of_a_profiled_quickstart_is_whole(tmp_path: Path) -> None:
    settings = [str(ROOT / "configs" / "quickstart.yaml"), f"--run.dir={tmp_path}"]
    settings += [f"--train.num_steps={NUM_STEPS}", "--train.eval_sequences=8"]
    settings += ["--schedule.warmup_steps=0", "--optimizer.bucket_nbytes=1000000"]
    settings += ["--profile.interval_ms=20"]
    arguments = ["-m", "offload_adam", "profile", *settings]
    run_two_ranks(arguments, tmp_path, timeout_s=110)
    folder = tmp_path / "quickstart"
    trace = read_trace(folder / "trace.json")
    assert sorted(trace.processes) == [0, 1]
    main = {pid: tid for (pid, tid), name in trace.threads.items() if name == "MainThread"}
    num_buckets = set()
    for rank in (0, 1):
        spans = trace.spans[rank, main[rank]]
        steps = [span for span in spans if span[2] == "train step"]
        assert len(steps) == NUM_STEPS
        for begin, end, _ in steps:
            inside = [name for at, _, name in spans if begin <= at < end]
            assert inside.count("data") == inside.count("forward") == inside.count("backward") == 1
            assert inside.count("agree") == inside.count("all-reduce") == 1
            # Two spans of each bucket's gather, its begin and the wait for it.
            assert inside.count("pack") == inside.count("gather") / 2 == inside.count("update")
            num_buckets.add(inside.count("pack"))
        ((_, name),) = [key for key in trace.counters if key[0] == rank]
        samples = trace.counters[rank, name]
        assert samples[-1][1]["exp_avg"] > 0
        assert all(values["rss"] >= values["exp_avg"] for _, values in samples)
    assert len(num_buckets) == 1
    assert num_buckets.pop() > 1
    lines = (folder / "memory.jsonl").read_text(encoding="utf-8").splitlines()
    drawn = trace.counters[0, "memory, bytes"]
    assert [values["rss"] for _, values in drawn] == [json.loads(line)["rss"] for line in lines]
    # On one clock: neither rank has left a step before the other has begun it.
    ranks = [
        [span for span in trace.spans[rank, main[rank]] if span[2] == "train step"]
        for rank in (0, 1)
    ]
    for first, second in zip(*ranks, strict=True):
        assert max(first[0], second[0]) < min(first[1], second[1])
