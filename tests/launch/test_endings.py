"""How the launch scripts end under the real torchrun: exit code, last line, and no traceback."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import psutil
import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from offload_adam.checkpoint.load import verify_checkpoint

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(200)]

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "single_node.sh"
TINY = str(ROOT / "configs" / "tiny.yaml")


def start(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    """Start the tiny job on two ranks through the script."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {"RANKS_PER_NODE": "2", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [str(SCRIPT), TINY, f"--run.dir={folder}", *overrides],
        cwd=folder,
        env=os.environ | environment | {"PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def end_of(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Wait for the script; return its exit code, its output and the last line of the output."""
    try:
        printed, _ = process.communicate(timeout=90)
    finally:
        process.terminate()
    return process.returncode, printed, printed.splitlines()[-1]


def test_a_rejected_configuration_ends_with_2(tmp_path: Path) -> None:
    code, printed, last = end_of(start(tmp_path, "--train.num_stepz=3"))
    assert code == 2
    assert last == (
        f"{SCRIPT}: the configuration was rejected: correct it and run the same command again "
        "(exit code 2)"
    )
    assert "traceback : " in printed  # torchrun's own report, which quotes our error
    assert printed.count("did you mean train.num_steps?") == 2
    assert "Traceback" not in printed


def _torchrun() -> ModuleType:
    """Return launch/torchrun.py as a module."""
    spec = importlib.util.spec_from_file_location("launch_torchrun", ROOT / "launch/torchrun.py")
    assert spec is not None
    assert spec.loader is not None
    launched = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(launched)
    return launched


@pytest.mark.parametrize(
    ("codes", "times_s", "code", "sentence"),
    [
        ((-15, 3), (7, 7), 3, "the job does not fit into memory"),
        ((1, -9), (7, 37), 1, "rank 0 failed"),  # torchrun has killed a rank that hung
        ((1, -9), (12, 7), 137, "rank 1 failed"),  # rank 0 says that its peer is dead
        ((1, -9), (7, 7), 137, "rank 1 failed"),
        ((-9, -15), (7, 7), 137, "rank 0 failed"),
    ],
)
def test_the_exit_code_is_that_of_the_rank_that_failed_first(
    codes: tuple[int, ...], times_s: tuple[int, ...], code: int, sentence: str
) -> None:
    """The other ranks are ended by torchrun with SIGTERM (-15), at times within the same second."""
    launched = _torchrun()
    failures = {rank: ProcessFailure(rank, 1, one, "") for rank, one in enumerate(codes)}
    for failure, time_s in zip(failures.values(), times_s, strict=True):
        failure.timestamp = time_s
    found = launched.describe_failure(ChildFailedError("offload_adam", failures))
    assert found[0] == code
    assert sentence in found[1]


def outcome_of(
    launched: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch, **outcome: bool
) -> tuple[int, str]:
    """Return what launch/torchrun.py makes of a run with this outcome."""

    def end(arguments: list[str]) -> None:
        text = json.dumps({"step": 5} | outcome)
        Path(os.environ["OFFLOAD_ADAM_OUTCOME_FILE"]).write_text(text)

    monkeypatch.setattr(launched, "torchrun", end)
    monkeypatch.setenv("OFFLOAD_ADAM_OUTCOME_FILE", "")  # restored after the test
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "")
    code, text = launched.run([], folder)
    return code, text


@pytest.mark.parametrize(
    ("preempted", "saved", "codes", "is_marked"),
    [
        # Codes with both variables, only the code's, only the file's, and none.
        (True, True, (75, 75, 0, 0), True),
        (True, False, (1, 1, 1, 0), False),
        (False, True, (0, 0, 0, 0), False),
    ],
)
def test_a_scheduler_can_tell_a_preempted_run_from_a_finished_one(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    preempted: bool,
    saved: bool,
    codes: tuple[int, int, int, int],
    is_marked: bool,
) -> None:
    launched, marker = _torchrun(), tmp_path / "preempted"
    for number, code in enumerate(codes):
        # An empty value is as good as none.
        monkeypatch.setenv("PREEMPTED_EXIT_CODE", "75" if number in (0, 1) else "")
        monkeypatch.setenv("PREEMPTED_FILE", str(marker) if number in (0, 2) else "")
        found = outcome_of(launched, tmp_path, monkeypatch, preempted=preempted, saved=saved)
        assert found[0] == code
        assert marker.exists() == (is_marked and number in (0, 2))
        marker.unlink(missing_ok=True)


@pytest.mark.parametrize("value", ["0", "2", "3", "256", "-1", "7.5", "soon", "²", "9" * 5000])
def test_an_exit_code_that_a_scheduler_cannot_use_is_rejected_at_the_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], value: str
) -> None:
    launched = _torchrun()
    monkeypatch.setattr(launched, "torchrun", lambda _: pytest.fail("torchrun was started"))
    monkeypatch.setenv("LAUNCHED_AS", "run.sh")
    monkeypatch.setenv("PREEMPTED_EXIT_CODE", value)
    with pytest.raises(SystemExit) as ended:
        launched.main()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"run.sh: PREEMPTED_EXIT_CODE is {value!r}")


def test_the_file_of_a_preempted_run_is_tried_and_removed_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched, marker = _torchrun(), tmp_path / "preempted"
    marker.touch()  # of an earlier start
    monkeypatch.setenv("PREEMPTED_EXIT_CODE", "")
    monkeypatch.setenv("PREEMPTED_FILE", str(marker))
    assert launched.mistake_in_variables() == ""
    assert not marker.exists()
    monkeypatch.setenv("PREEMPTED_FILE", str(tmp_path / "none" / "preempted"))
    assert launched.mistake_in_variables() == (
        f"PREEMPTED_FILE ({tmp_path}/none/preempted) cannot be created: No such file or directory. "
        "Name one in a writable folder"
    )


def test_a_file_that_cannot_be_created_at_the_end_keeps_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PREEMPTED_EXIT_CODE", "75")
    monkeypatch.setenv("PREEMPTED_FILE", str(tmp_path / "none" / "preempted"))
    found = outcome_of(_torchrun(), tmp_path, monkeypatch, preempted=True, saved=True)
    assert found == (
        75,
        "the run was preempted after step 5 and can be resumed: run the same command again",
    )
    assert "Cannot create PREEMPTED_FILE: [Errno 2]" in capsys.readouterr().err


def run_ranks(folder: Path, script: str, *options: str) -> tuple[int, str, list[str]]:
    """Run a script on two ranks through torchrun.py, as a preempted run with exit code 75.

    Returns:
        The exit code, the last line, and all lines that the ranks appended to `folder`/ended.
    """
    (folder / "rank.py").write_text(
        "import json, os, subprocess, sys, time\n"
        "from pathlib import Path\n"
        "rank, attempt = os.environ['RANK'], os.environ['TORCHELASTIC_RESTART_COUNT']\n"
        "def write(outcome):\n"
        "    Path(os.environ['OFFLOAD_ADAM_OUTCOME_FILE']).write_text(json.dumps(outcome))\n"
        "def end(text):\n"
        "    with open(Path(__file__).with_name('ended'), 'a') as file:\n"
        "        print(text, file=file)\n"
        "preempted = {'step': 5, 'preempted': True, 'saved': True}\n" + script
    )
    done = subprocess.run(
        [
            *(sys.executable, str(ROOT / "launch" / "torchrun.py"), "--standalone"),
            *("--nproc-per-node=2", *options, str(folder / "rank.py")),
        ],
        env=os.environ | {"PREEMPTED_EXIT_CODE": "75", "LAUNCHED_AS": "run.sh"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=90,
        check=False,
    )
    ended = folder / "ended"
    lines = ended.read_text().splitlines() if ended.exists() else []
    return done.returncode, done.stdout.splitlines()[-1], lines


def _runs(pid: int) -> bool:
    """Return whether this process exists and is no zombie, which its new parent has yet to reap."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.fault
def test_a_preempted_run_waits_for_all_ranks_of_its_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "60")
    script = (
        "parent = os.getppid()\n"
        "if rank == '0':\n    write(preempted)\nelse:\n    time.sleep(20)\n"
        "end(f'{rank} {os.getppid() == parent}')\n"
    )
    code, last, ended = run_ranks(tmp_path, script)
    assert ended == ["0 True", "1 True"]
    assert (code, last) == (
        75,
        "run.sh: the run was preempted after step 5 and can be resumed: run the same command again "
        "(exit code 75)",
    )


def test_a_rank_that_does_not_end_is_killed_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "2")
    script = (
        "if rank == '0':\n    write(preempted)\n    sys.exit()\n"
        "child = subprocess.Popen(['sleep', '80'])\nend(os.getpid())\nend(child.pid)\n"
        "time.sleep(80)\n"
    )
    start_s = time.monotonic()
    code, last, pids = run_ranks(tmp_path, script)
    rank, child = map(int, pids)
    assert code == 75
    assert f"ranks with process IDs [{rank}] did not end and were killed; the run was" in last
    assert time.monotonic() - start_s < 60
    deadline_s = time.monotonic() + 5
    while any(_runs(pid) for pid in (rank, child)):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def test_the_outcome_of_a_failed_attempt_does_not_end_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "2")
    script = (
        "if attempt == '0':\n"
        "    if rank == '0':\n        write(preempted)\n        sys.exit()\n"
        "    time.sleep(2)\n    sys.exit(1)\n"
        "time.sleep(5)\nend(rank)\n"
    )
    code, last, ended = run_ranks(tmp_path, script, "--max-restarts=1")
    assert sorted(ended) == ["0", "1"]
    assert (code, last) == (0, "run.sh: the run is done (exit code 0)")


@pytest.mark.fault
def test_two_jobs_at_once_do_not_disturb_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They compile the same kernels into one cache, which is empty, and share /tmp."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "kernels"))
    names = ("one", "two")
    processes = [
        start(tmp_path, f"--run.name={name}", "--train.num_steps=4", "--checkpoint.every=2")
        for name in names
    ]
    try:
        ends = [end_of(process) for process in processes]
    finally:
        for process in processes:
            process.terminate()
    assert [code for code, _, _ in ends] == [0, 0], ends
    losses = []
    for name in names:
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
        assert verify_checkpoint(tmp_path / name / "checkpoints" / "step-4").step == 4
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4


@pytest.mark.fault
@pytest.mark.parametrize(("number", "ends_with"), [(signal.SIGTERM, 0), (signal.SIGUSR1, 75)])
def test_a_preempted_run_ends_with_0_and_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, ends_with: int
) -> None:
    monkeypatch.setenv("PREEMPTED_EXIT_CODE", str(ends_with or ""))
    process = start(tmp_path, "--train.num_steps=100000")
    metrics = tmp_path / "tiny" / "metrics.jsonl"
    deadline_s = time.monotonic() + 60
    try:
        while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
            assert process.poll() is None
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
    except AssertionError:
        process.terminate()
        raise
    process.send_signal(number)
    code, printed, last = end_of(process)
    step = metrics.read_text().count("\n")
    assert code == ends_with, printed
    assert last == (
        f"{SCRIPT}: the run was preempted after step {step} and can be resumed: "
        f"run the same command again (exit code {ends_with})"
    )
    assert "Traceback" not in printed
    code, printed, last = end_of(start(tmp_path, f"--train.num_steps={step + 1}"))
    assert (code, last) == (0, f"{SCRIPT}: the run is done after step {step + 1} (exit code 0)")
    assert printed.count(f"Resuming from {tmp_path}/tiny/checkpoints/step-{step} at step") == 1


@pytest.mark.fault
def test_a_signal_to_one_machine_ends_the_others_soon(tmp_path: Path) -> None:
    """The other machine would wait 300 s with torchrun alone."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    environment = {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), "PREEMPTED_EXIT_CODE": "75"}
    machines = [
        subprocess.Popen(
            [
                *(sys.executable, str(ROOT / "launch" / "torchrun.py")),
                *("--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d"),
                *(f"--rdzv-endpoint=127.0.0.1:{port}", f"--rdzv-conf=is_host={is_head}"),
                *(f"--local-addr={address}", "-m", "offload_adam", "train", TINY),
                *(f"--run.dir={tmp_path}", "--train.num_steps=100000"),
            ],
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for is_head, address in ((True, "127.0.0.1"), (False, "127.0.0.2"))
    ]
    metrics = tmp_path / "tiny" / "metrics.jsonl"
    deadline_s = time.monotonic() + 90
    try:
        while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        machines[1].terminate()
        # The machine with the signal first.
        outputs = [machine.communicate(timeout=60)[0] for machine in reversed(machines)]
    finally:
        for machine in machines:
            machine.kill()
    step = metrics.read_text().count("\n")
    for output in outputs:
        assert output.splitlines()[-1] == (
            f"torchrun.py: the run was preempted after step {step} and can be resumed: "
            "run the same command again (exit code 75)"
        )
    assert [machine.returncode for machine in machines] == [75, 75]
    assert verify_checkpoint(tmp_path / "tiny" / "checkpoints" / f"step-{step}").step == step
