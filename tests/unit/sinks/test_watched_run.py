"""The HTTP server in a real run, and the Grafana dashboard of its metrics."""

from __future__ import annotations

import json
import math
import re
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from offload_adam.config import ConfigError
from offload_adam.coordinator.progress import PROGRESS, PeerRecord, Process, ProgressRecord
from offload_adam.coordinator.verdicts import Verdict
from offload_adam.integrations.missing import how_to_install
from offload_adam.sinks import sink
from offload_adam.sinks.server import StatusServer
from offload_adam.step.ledger import LedgerEntry
from offload_adam.train import loop, observation
from offload_adam.train.model import next_token_loss
from offload_adam.train.observation import Observation
from offload_adam.train.records import CheckpointTotals, RunTotals
from tests.unit.test_train_alone import SMALL, run

pytest.importorskip("waitress")
prometheus = pytest.importorskip("prometheus_client.parser")

DASHBOARD = Path(__file__).parents[3] / "launch" / "grafana.json"
STEPS = SMALL["train"] | {"num_steps": 8}
BREAKS_ONCE = {"sizes": None, "factory": "tests.unit.test_train_alone:BreaksOnce"}


class Seen(NamedTuple):
    """The answers of the server after one step."""

    status: dict[str, Any]
    metrics: dict[str, float]
    names: set[str]


def read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=60) as answer:
        text: str = answer.read().decode()
        return text


def look(server: StatusServer) -> Seen:
    base = f"http://127.0.0.1:{server.port}"
    assert read(f"{base}/healthz") == '{"healthy":true}'
    metrics, names = {}, set()
    for family in prometheus.text_string_to_metric_families(read(f"{base}/metrics")):
        names.add(family.name + "_total" * (family.type == "counter"))
        for sample in family.samples:
            labels = {name: value for name, value in sample.labels.items() if name != "host"}
            assert labels.pop("run") == "case"
            metrics[" ".join([sample.name.removeprefix("offload_adam_"), *labels.values()])] = (
                sample.value
            )
    return Seen(json.loads(read(f"{base}/status")), metrics, names)


def watch(
    folder: Path, patch: pytest.MonkeyPatch, **sections: dict[str, Any]
) -> tuple[list[Seen], list[dict[str, Any]]]:
    """Train with a server, and return its answers after each step and the run's records."""
    seen: list[Seen] = []

    class Asking(StatusServer):
        def write(self, record: sink.Record) -> None:
            super().write(record)
            seen.append(look(self))

    patch.setattr(observation, "StatusServer", Asking)
    patch.setattr(PROGRESS, "phase", "start")  # a test that raised has left its phase
    records, _ = run(folder, observe={"http_port": 0}, **sections)
    return seen, records


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Seen], list[dict[str, Any]]]:
    """A run of 8 steps, in which step 5 is skipped."""
    with pytest.MonkeyPatch.context() as patch:
        return watch(
            tmp_path_factory.mktemp("watched"),
            patch,
            model=BREAKS_ONCE,
            train=STEPS | {"eval_every": 4},
            checkpoint={"every": 3},
        )


def test_the_status_follows_the_run(watched: tuple[list[Seen], list[dict[str, Any]]]) -> None:
    answers = [seen.status for seen in watched[0]]
    assert [answer["last"]["step"] for answer in answers] == list(range(1, 9))
    assert [answer["last"]["loss"] for answer in answers] == [r["loss"] for r in watched[1]]
    assert (answers[0]["run"], answers[0]["of_steps"], answers[0]["world_size"]) == ("case", 8, 1)
    memory = answers[0]["memory_bytes"]
    assert memory["resident"] > memory["exp_avg"] > 0
    assert [answer["last_checkpoint"] for answer in answers] == [None] * 3 + [3] * 3 + [6] * 2
    for answer in answers:
        (rank,) = answer["ranks"]
        assert (rank["rank"], rank["phase"], rank["bucket"]) == (0, "start", None)
        assert (rank["waiting"], rank["still_s"] < 60) == (False, True)
    assert [answer["ranks"][0]["step"] for answer in answers] == list(range(1, 9))


def test_the_metrics_are_those_of_the_records(
    watched: tuple[list[Seen], list[dict[str, Any]]],
) -> None:
    seconds = 0.0
    for number, (seen, record) in enumerate(zip(*watched, strict=True), 1):
        metrics = seen.metrics
        seconds += record["step_ms"] / 1e3
        assert metrics["steps_total"] == metrics["step"] == record["step"] == number
        assert metrics["final_step"] == 8
        assert metrics["skipped_steps_total"] == (number >= 5)
        assert metrics["tokens_total"] == number * 4 * 16
        assert metrics["learning_rate"] == record["lr"]
        assert metrics["tokens_per_second"] == record["tokens_per_s"]
        assert metrics["step_seconds_total"] == pytest.approx(seconds)
        if record["skipped"]:
            assert math.isnan(metrics["loss"])
            assert math.isnan(metrics["gradient_norm"])
        else:
            assert metrics["loss"] == record["loss"]
            assert metrics["gradient_norm"] == record["grad_norm"]
        phases = [metrics[f"phase_seconds_total {name} 0"] for name in ("forward", "backward")]
        assert 0 < sum(phases) < seconds
    evaluated = [seen.metrics.get("validation_loss") for seen in watched[0]]
    first, last = watched[1][3]["val_loss"], watched[1][7]["val_loss"]
    assert evaluated == [None] * 3 + [first] * 4 + [last]


def test_the_metrics_are_read_when_scraped(
    watched: tuple[list[Seen], list[dict[str, Any]]], tmp_path: Path
) -> None:
    before, _, after, *_, last = [seen.metrics for seen in watched[0][2:]]
    assert "checkpoint_age_seconds" not in before
    assert before["checkpoints_written_total"] == before["checkpoint_written_bytes_total"] == 0
    assert after["checkpoints_written_total"] == 1
    assert 0 <= after["checkpoint_age_seconds"] < 60
    assert 0 < after["checkpoint_duration_seconds"] < 60
    # One fp32 embedding of 256 x 256, its two moments, and little else.
    assert 3 * 4 * 256 * 256 < after["checkpoint_written_bytes_total"] < 4 * 4 * 256 * 256
    assert last["checkpoints_written_total"] == 2
    assert last["checkpoints_failed_total"] == 0
    assert last["memory_bytes exp_avg cpu 0"] == 4 * 256 * 256
    assert last["process_resident_bytes 0"] > 50e6
    assert last["node_available_bytes 0"] > 0
    assert last["rank_heartbeat_age_seconds 0"] == 0
    assert last["rank_step 0"] == 8
    assert 0 <= last["rank_progress_age_seconds 0"] < 60


def test_counters_of_a_resumed_run_count_its_own_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, train=STEPS | {"num_steps": 3}, checkpoint={"every": 3})
    seen, _ = watch(tmp_path, monkeypatch, train=STEPS | {"num_steps": 5}, checkpoint={"every": 9})
    assert [s.metrics["step"] for s in seen] == [4, 5]
    assert [s.metrics["steps_total"] for s in seen] == [1, 2]
    assert [s.status["last_checkpoint"] for s in seen] == [3, 3]
    assert all(0 < s.metrics["checkpoint_age_seconds"] < 60 for s in seen)
    assert seen[0].metrics["checkpoints_written_total"] == 0


def test_the_dashboard_draws_exactly_the_exported_metrics(
    watched: tuple[list[Seen], list[dict[str, Any]]],
) -> None:
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    panels = dashboard["panels"]
    expressions = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    drawn = set(re.findall(r"offload_adam_\w+", " ".join(expressions)))
    assert drawn == watched[0][-1].names
    variables = dashboard["templating"]["list"]
    asked = [variable["query"] for variable in variables]
    asked_names = set(re.findall(r"offload_adam_\w+", json.dumps(asked)))
    assert asked_names <= drawn
    assert {variable["name"] for variable in variables} == {"datasource", "run", "rank"}
    shown = {v["definition"]: v["query"]["query"] for v in variables if v["type"] == "query"}
    assert all(definition == query for definition, query in shown.items())


def test_the_dashboards_panels_are_complete_and_do_not_overlap() -> None:
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in taken, panel["title"]
                taken.add((x, y))
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${datasource}"
            assert panel["fieldConfig"]["defaults"]["unit"]
            # Without the variable, a panel would mix the runs of one Prometheus.
            assert all('run=~"$run"' in target["expr"] for target in panel["targets"])
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))


def test_an_error_of_the_training_is_reported_while_sinks_are_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: list[tuple[int, dict[str, Any]]] = []

    class Asking(StatusServer):
        def close(self) -> None:
            with pytest.raises(urllib.error.HTTPError) as failed:
                read(f"http://127.0.0.1:{self.port}/healthz")
            answers.append((failed.value.code, json.loads(failed.value.read())))
            super().close()

    def fail(*_: object) -> None:
        raise RuntimeError("out of tokens")

    monkeypatch.setattr(observation, "StatusServer", Asking)
    monkeypatch.setattr(loop, "_run_step", fail)
    with pytest.raises(RuntimeError, match="out of tokens"):
        run(tmp_path, train=STEPS, observe={"http_port": 0})
    reason = "Training ended with RuntimeError: out of tokens"
    assert answers == [(503, {"healthy": False, "reason": reason})]


def test_a_run_that_hangs_in_its_forward_is_not_healthy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ports: list[int] = []
    reasons: list[str] = []

    class Opened(StatusServer):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            ports.append(self.port)

    def hang(*arguments: Any) -> torch.Tensor:
        """Return the loss, but in the first step wait until the server has noticed the hang."""
        deadline_s = time.monotonic() + 20
        while not reasons:
            assert time.monotonic() < deadline_s
            try:
                read(f"http://127.0.0.1:{ports[0]}/healthz")
            except urllib.error.HTTPError as error:
                reasons.append(json.loads(error.read())["reason"])
        return next_token_loss(*arguments)

    monkeypatch.setattr(observation, "StatusServer", Opened)
    monkeypatch.setattr(loop, "next_token_loss", hang)
    run(tmp_path, train=STEPS, observe={"http_port": 0}, coordinator={"stuck_after": 0.3})
    (reason,) = reasons
    assert re.fullmatch(
        r"No rank has made progress for 0\.3 s: rank 0 \(.*\) in forward, step 1\.", reason
    )


class Ranks:
    """A fake rank group with a watch that knows these records."""

    def __init__(self, *records: PeerRecord, failure: Verdict | None = None) -> None:
        self.watch, self.failure = self, failure
        self.records = records

    def read_records(self) -> tuple[PeerRecord, ...]:
        return self.records


class Stub:
    """An object with these attributes."""

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)


def record(rank: int, still_s: float, *, left: str | None = None, **place: Any) -> PeerRecord:
    progress = ProgressRecord(step=3, **{"phase": "forward", **place})
    return PeerRecord(rank, Process("node", "one", 7, 0), 5, progress, still_s, left)


def observe(
    ranks: Ranks | None,
    checkpoints: CheckpointTotals | None = None,
    ledger: Sequence[LedgerEntry] = (),
) -> Observation:
    """Return the observation of a job with these ranks, whose `stuck_after` is 10 s."""
    config = Stub(
        run=Stub(name="case"), train=Stub(num_steps=1), coordinator=Stub(stuck_after=10.0)
    )
    world = Stub(ranks=Stub(watch=None, failure=None) if ranks is None else ranks)
    optimizer = Stub(memory_ledger=lambda: iter(ledger))
    job: Any = Stub(config=config, world=world, optimizer=optimizer)
    return Observation(job, RunTotals(1), checkpoints or CheckpointTotals())


@pytest.mark.parametrize(
    "records",
    [
        [record(0, 99), record(1, 9)],
        [record(0, 99, waiting=True), record(1, 99, phase="evaluation", long_running=True)],
        [record(0, 1), record(1, 99, left="")],
        [record(0, 99, left=""), record(1, 99, left="")],
        [],
    ],
    ids=["one moves", "one is busy for long", "one has left", "all left", "nothing is known yet"],
)
def test_a_run_is_healthy_while_a_rank_makes_progress(records: list[PeerRecord]) -> None:
    assert observe(Ranks(*records)).problem() is None


def test_a_run_without_progress_names_the_ranks_that_the_others_wait_for() -> None:
    waits, hangs = record(0, 11, waiting=True), record(1, 12, phase="backward")
    problem = observe(Ranks(waits, hangs)).problem()
    assert problem == (
        "No rank has made progress for 10 s: rank 1 (process 7 on node) in backward, step 3."
    )
    both = observe(Ranks(waits, replace(waits, rank=1))).problem()
    assert both is not None
    assert "rank 0 " in both
    assert "rank 1 " in both


def test_a_rank_that_has_left_does_not_make_the_others_healthy() -> None:
    problem = observe(Ranks(record(0, 11), record(1, 1, left="out of memory"))).problem()
    assert problem is not None
    assert "rank 0 " in problem
    assert "rank 1 " not in problem


def test_a_verdict_of_the_ranks_is_the_problem() -> None:
    ranks = Ranks(record(0, 0), failure=Verdict((1,), "rank 1 is dead: no heartbeat."))
    assert observe(ranks).problem() == "rank 1 is dead: no heartbeat."


def test_a_single_rank_is_judged_by_its_own_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = observe(None)
    now_s = [100.0]
    monkeypatch.setattr("offload_adam.train.observation.time.monotonic", lambda: now_s[0])
    PROGRESS.move()
    assert alone.problem() is None
    now_s[0] += 9.0
    assert alone.problem() is None
    now_s[0] += 2.0
    assert "No rank has made progress for 10 s: rank 0" in str(alone.problem())
    with PROGRESS.at("evaluation", long_running=True):
        now_s[0] += 99.0
        assert alone.problem() is None
    PROGRESS.move()
    assert alone.problem() is None


def samples_of(watched: Observation, metric: str) -> list[float]:
    families = {family.name: family for family in watched.collect()}
    return [sample.value for sample in families[f"offload_adam_{metric}"].samples]


def heartbeat_ages(watched: Observation) -> list[float]:
    return samples_of(watched, "rank_heartbeat_age_seconds")


def test_checkpoints_are_exported_in_seconds_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload_adam.train.observation.time.monotonic", lambda: 1040.0)
    saved = CheckpointTotals(3, 1, 5000, last_step=9, last_commit_s=1000.0, last_duration_s=2.5)
    seen = observe(Ranks(), saved)
    assert samples_of(seen, "checkpoints_failed") == [1]
    assert samples_of(seen, "checkpoint_written_bytes") == [5000]
    assert samples_of(seen, "checkpoint_age_seconds") == [40]
    assert samples_of(seen, "checkpoint_duration_seconds") == [2.5]


def test_the_memory_of_a_category_is_that_of_all_its_buckets() -> None:
    ledger = [
        LedgerEntry("exp_avg", 0, "cpu", 100),
        LedgerEntry("exp_avg", 1, "cpu", 20),
        LedgerEntry("exp_avg", 1, "cuda:0", 3),
    ]
    assert sorted(samples_of(observe(Ranks(), None, ledger), "memory_bytes")) == [3, 120]


def test_a_heartbeat_ages_until_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(record(0, 0), record(1, 0))
    pair = observe(ranks)
    now_s = [100.0]
    monkeypatch.setattr("offload_adam.train.observation.time.monotonic", lambda: now_s[0])
    assert heartbeat_ages(pair) == [0, 0]
    now_s[0] += 15
    ranks.records = (replace(record(0, 0), beat=6), record(1, 0))
    assert heartbeat_ages(pair) == [0, 15]
    now_s[0] += 15
    ranks.records = (replace(record(0, 0), beat=7), record(1, 0))
    assert heartbeat_ages(pair) == [0, 30]


@pytest.mark.parametrize(
    ("key", "value", "package", "extra"),
    [
        ("http_port", 0, "prometheus_client", "watch"),
        ("http_port", 0, "waitress", "watch"),
        ("tensorboard", True, "tensorboard", "tensorboard"),
        ("wandb_project", "p", "wandb", "wandb"),
    ],
)
def test_a_missing_package_of_a_sink_is_a_mistake_that_names_the_extra(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    key: str,
    value: object,
    package: str,
    extra: str,
) -> None:
    monkeypatch.setattr(sink, "find_spec", lambda name: None if name == package else True)
    message = f"observe.{key}: needs {package}: {how_to_install(extra)}"
    with pytest.raises(ConfigError, match=re.escape(message)):
        run(tmp_path, observe={key: value})
    assert not (tmp_path / "case").exists()


def test_a_server_that_cannot_listen_is_a_mistake(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        message = rf"observe\.http_port: cannot listen on 127\.0\.0\.1, port {port}: .* in use"
        with pytest.raises(ConfigError, match=message):
            run(tmp_path, train=STEPS, observe={"http_port": port})
    unknown = {"http_port": 0, "http_host": "no-such-host.invalid"}
    with pytest.raises(ConfigError, match=r"cannot listen on no-such-host\.invalid"):
        run(tmp_path, train=STEPS, observe=unknown)


@pytest.mark.parametrize("host", [".", "é..x", "..", 300 * "x"])
def test_a_host_that_cannot_be_a_name_is_a_mistake(tmp_path: Path, host: str) -> None:
    with pytest.raises(ConfigError, match=r"observe\.http_host: '.*' is not the name or the addr"):
        run(tmp_path, train=STEPS, observe={"http_port": 0, "http_host": host})


def test_a_run_without_sinks_needs_no_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sink, "find_spec", lambda name: None)
    run(tmp_path, train=STEPS)
