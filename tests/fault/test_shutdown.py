"""How the training command ends on request, and when restarts resume or stop."""

from __future__ import annotations

import os
import re
import signal
import socket
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from offload_adam.checkpoint.load import verify_checkpoint
from tests.fault.runs import finish, processes_of, run, start, wait_for, wait_for_steps

pytestmark = [pytest.mark.fault, pytest.mark.timeout(200)]

LONG = "--train.num_steps=100000"


def worker(folder: Path, rank: int) -> psutil.Process:
    """Return the process of a rank."""
    return next(
        process for process in processes_of(folder) if process.environ().get("RANK") == str(rank)
    )


@pytest.mark.parametrize(
    ("number", "mode"),
    [(signal.SIGTERM, "sync"), (signal.SIGUSR1, "sync"), (signal.SIGTERM, "async")],
)
def test_a_signal_to_one_rank_ends_all_after_one_step(
    tmp_path: Path, number: signal.Signals, mode: str
) -> None:
    """With `async` a checkpoint is under way at every moment: it and the last one are committed."""
    saving = (f"--checkpoint.mode={mode}", "--checkpoint.every=2") if mode == "async" else ()
    process = start(tmp_path, "", LONG, *saving, ranks=3)
    wait_for_steps(tmp_path, process)
    worker(tmp_path, 1).send_signal(number)
    ended = finish(tmp_path, process)
    assert ended.code == 0, ended.printed
    assert ended.took_s < 20
    last = ended.records[-1]["step"]
    assert f"preempted: ended after step {last}, with a checkpoint" in ended.printed
    assert f"tiny: {last} steps" in ended.printed
    (path,) = tmp_path.rglob(f"step-{last}")
    assert verify_checkpoint(path).step == last
    assert not list(tmp_path.rglob("*.partial"))
    resumed = run(tmp_path, "", f"--train.num_steps={last + 2}", ranks=2)
    assert resumed.code == 0, resumed.printed
    assert [record["step"] for record in resumed.records] == list(range(1, last + 3))


def test_slow_clients_of_the_status_server_do_not_delay_the_end(tmp_path: Path) -> None:
    """Idle ones, half a request, many requests whose answers nobody reads, and too many of each."""
    process = start(tmp_path, "", LONG, "--observe.http_port=0")
    wait_for_steps(tmp_path, process)
    found = re.search(r"http://127\.0\.0\.1:(\d+)", (tmp_path / "printed").read_text())
    assert found is not None
    request = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n"
    with ExitStack() as opened:
        for sent in (b"", request, (request + b"\r\n") * 200) * 16:
            client = opened.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.settimeout(5)
            client.connect(("127.0.0.1", int(found[1])))
            client.sendall(sent)
        worker(tmp_path, 0).send_signal(signal.SIGTERM)
        ended = finish(tmp_path, process)
    assert ended.code == 0, ended.printed
    assert ended.took_s < 15
    assert "preempted: ended after step " in ended.printed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_the_agent_ends_all_after_one_step(
    tmp_path: Path, number: signal.Signals
) -> None:
    """By default torchrun would end at SIGUSR1 without a signal to its ranks."""
    options = ("--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",)
    process = start(tmp_path, "", LONG, options=options if number == signal.SIGUSR1 else ())
    wait_for_steps(tmp_path, process)
    process.send_signal(number)
    ended = finish(tmp_path, process)
    assert ended.code == 1  # torchrun's own, whatever its workers say
    assert ended.took_s < 20
    assert "preempted: ended after step " in ended.printed


def test_a_signal_to_the_survivors_of_a_failure_is_no_preemption(tmp_path: Path) -> None:
    """Rank 1 is stopped and cannot answer, so the signal must not count as a request to end."""
    process = start(tmp_path, "", LONG, "--coordinator.dead_after=60", ranks=3)
    wait_for_steps(tmp_path, process)
    os.kill(worker(tmp_path, 1).pid, signal.SIGSTOP)
    os.kill(worker(tmp_path, 0).pid, signal.SIGTERM)
    ended = finish(tmp_path, process)
    assert ended.code == 1
    assert ended.took_s < 25  # torchrun alone would give the stopped one 30
    # Rank 0 or rank 2, which received "a signal to another rank", may write the verdict.
    assert ", and rank(s) [1] did not answer within 5 s" in ended.printed
    assert "preempted" not in ended.printed


def test_ctrl_c_ends_without_a_traceback_of_ours(tmp_path: Path) -> None:
    process = start(tmp_path, "", LONG)
    wait_for_steps(tmp_path, process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    ended = finish(tmp_path, process)
    assert ended.code != 0
    assert ended.took_s < 20
    assert "interrupted; the metrics written so far are kept" in ended.printed
    assert "offload_adam/" not in ended.printed


def test_workers_end_with_a_killed_agent(tmp_path: Path) -> None:
    process = start(tmp_path, "", LONG)
    wait_for_steps(tmp_path, process)
    workers = processes_of(tmp_path)
    process.kill()
    _, alive = psutil.wait_procs([w for w in workers if w.pid != process.pid], timeout=30)
    for survivor in alive:
        survivor.kill()
    assert not alive


def test_a_restart_resumes_after_a_failure(tmp_path: Path) -> None:
    ended = run(tmp_path, "kill@update", options=("--max-restarts=1",))
    assert ended.code == 0, ended.printed
    assert "Rank 1 is dead" in ended.printed
    assert [record["step"] for record in ended.records] == list(range(1, 41))


def test_an_error_that_a_restart_cannot_fix_is_not_retried(tmp_path: Path) -> None:
    """The fault is absent from the second attempt, which must not train all the same."""
    ended = run(tmp_path, "differ@shape", options=("--max-restarts=2",))
    assert ended.code == 1
    assert ended.records == []
    assert (
        "Not retrying, because a restart cannot fix this error: RankDisagreementError: "
        in ended.printed
    )


def test_a_foreign_checkpoint_is_not_tried_again(tmp_path: Path) -> None:
    assert run(tmp_path, "", "--train.num_steps=2", "--checkpoint.every=2").code == 0
    larger = "--model.sizes.width=64"
    ended = run(tmp_path, "", larger, "--checkpoint.every=2", options=("--max-restarts=2",))
    assert ended.code == 1
    assert "model.sizes: was " in ended.printed
    assert "Not retrying, because a restart cannot fix this error: ConfigError: " in ended.printed
    assert [record["step"] for record in ended.records] == [1, 2]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_runs_of_eight_ranks_end_with_0(tmp_path: Path) -> None:
    for number in range(20):
        folder = tmp_path / str(number)
        folder.mkdir()
        options = ("--train.num_steps=2", "--train.eval_every=0", "--train.eval_sequences=8")
        patient = ("--coordinator.dead_after=60", "--coordinator.stuck_after=60")
        ended = run(folder, "", *options, *patient, ranks=8)
        assert ended.code == 0, ended.printed


def test_a_signal_during_the_start_ends_the_run(tmp_path: Path) -> None:
    process = start(tmp_path, "", LONG)
    wait_for(tmp_path, "Running kernels with", process)
    process.send_signal(signal.SIGTERM)
    assert finish(tmp_path, process).took_s < 30
