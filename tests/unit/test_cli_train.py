"""The command `train`: its exit codes, its messages, and that a mistake starts nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from offload_adam.cli.app import app
from offload_adam.errors import KeptInUseError

TINY = str(Path(__file__).parents[2] / "configs" / "tiny.yaml")


def train(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["train", *arguments])
    return result.exit_code, result.output


def test_mistakes_end_with_2_and_start_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, output = train(TINY, "--train.num_stepz=3", "--optimizer.lr=-1", "--schedule=x")
    assert code == 2
    assert "3 mistakes" in output
    assert "did you mean train.num_steps?" in output
    assert "optimizer.lr: must be above 0, got -1" in output
    assert 'schedule: must be a mapping of keys to values, got "x"' in output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["missing.yaml"],
        [TINY, TINY],
        [TINY, "--train.num_steps", "3"],
        ["--train.num_steps=3"],
        [TINY, "--data.path=no/such/*.txt"],
        [TINY, "--model.factory=no_such_module:make"],
        [TINY, "--train.sequence_length=100000000"],
    ],
)
def test_what_cannot_be_started_ends_with_2(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _ = train(*arguments)
    assert code == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (
            ["train", "--lr=1", "--optimizer.lr=abc"],
            [
                "command line: 3 mistakes",
                "name one configuration file, such as configs/tiny.yaml",
                "lr: unknown key; an override has the form --section.key=value: did you mean "
                "--optimizer.lr=1?",
                'optimizer.lr: must be a number, got "abc"',
            ],
        ),
        (
            ["train", "a.yaml", "--lr", "1"],
            [
                "command line: 3 mistakes",
                "name one configuration file, not a.yaml and 1",
                "an override has the form --section.key=value, without spaces",
                "cannot parse '--lr': write --section.key=value without spaces",
            ],
        ),
        (
            ["config", "--lr=1"],
            [
                "command line: 1 mistake",
                "lr: unknown key; an override has the form --section.key=value: did you mean "
                "--optimizer.lr=1?",
            ],
        ),
    ],
)
def test_a_command_line_without_a_file_gets_an_answer_on_every_override(
    arguments: list[str], lines: list[str]
) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    found = [line.strip().removeprefix("offload-adam: ") for line in result.output.splitlines()]
    assert found == lines


def test_the_defaults_are_shown_with_overrides() -> None:
    result = CliRunner().invoke(app, ["config", "--optimizer.lr=0.25", "--train.num_steps=7"])
    assert result.exit_code == 0
    lines = [line.strip() for line in result.output.splitlines()]
    assert {"lr: 0.25", "num_steps: 7", "name: run", "batch_size: 8"} <= set(lines)


def test_what_needs_one_rank_is_rejected_before_the_ranks_join(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in (ALONE | {"WORLD_SIZE": "2"}).items():
        monkeypatch.setenv(name, value)
    code, output = train(TINY, "--optimizer.amsgrad=true")
    assert code == 2
    assert "optimizer.amsgrad: works on one rank only" in output


def test_ranks_that_are_not_those_of_the_mesh_are_rejected_before_they_join(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in (ALONE | {"WORLD_SIZE": "2"}).items():
        monkeypatch.setenv(name, value)
    code, output = train(TINY, "--parallel.shard=3")
    assert code == 2
    assert "parallel: replicate 1 * shard 3 * tensor 1 is 3, but this run has 2" in output


ALONE = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"WORLD_SIZE": "1", "RANK": "0"}, "but MASTER_ADDR, MASTER_PORT is not set"),
        ({"WORLD_SIZE": "2"}, "but RANK, MASTER_ADDR, MASTER_PORT is not set"),
        (ALONE | {"WORLD_SIZE": "abc"}, "WORLD_SIZE='abc' is not a whole number"),
        (ALONE | {"WORLD_SIZE": ""}, "but WORLD_SIZE is not set"),
        (ALONE | {"RANK": "-1", "MASTER_PORT": "x"}, "RANK='-1', MASTER_PORT='x' is not a"),
        (ALONE | {"RANK": "1"}, "RANK=1 must be below WORLD_SIZE=1"),
    ],
)
def test_an_environment_that_no_launcher_makes_ends_with_2(
    given: dict[str, str], problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    code, output = train(TINY, f"--run.dir={tmp_path}", "--train.num_steps=1")
    assert code == 2, output
    assert problem in output
    assert "Start the ranks with torchrun" in output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["a-file", "a-file/below", "new/" + 300 * "x"])
def test_a_folder_that_cannot_be_made_ends_with_2_before_the_model_is_built(
    place: str, tmp_path: Path
) -> None:
    (tmp_path / "a-file").touch()
    code, output = train(TINY, f"--run.dir={tmp_path}/{place}", "--model.factory=no_such:make")
    assert code == 2, output
    assert "run.dir: " in output
    assert "cannot be written to" in output
    assert [path.name for path in tmp_path.iterdir()] == ["a-file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_ends_with_2(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    code, output = train(TINY, f"--run.dir={closed}/runs")
    assert code == 2, output
    assert "Permission denied" in output


def test_what_can_be_found_without_a_start_is_found_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offload_adam.sinks.sink.find_spec", lambda _: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    (tmp_path / "taken").touch()
    code, output = train(
        TINY,
        f"--run.dir={tmp_path}/taken",
        "--optimizer.amsgrad=true",
        "--observe.http_port=0",
        "--observe.tensorboard=true",
        "--data.path=no/such/*.txt",
        "--model.factory=no_such_module:make",
    )
    assert code == 2
    assert "7 mistakes" in output
    lines = [line.split(": ")[0] for line in output.splitlines()[1:]]
    assert lines == [
        "  environment",
        "  optimizer.amsgrad",
        "  observe.http_port",
        "  observe.tensorboard",
        "  run.dir",
        "  data.path",
        "  model.factory",
    ]


def test_a_factory_is_not_called_for_a_run_that_cannot_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow_factory.py").write_text("def make():\n    raise SystemError('called')\n")
    monkeypatch.syspath_prepend(tmp_path)
    factory = "--model.factory=slow_factory:make"
    assert "called" in train(TINY, f"--run.dir={tmp_path}", factory)[1]
    code, output = train(TINY, f"--run.dir={tmp_path}", factory, "--data.path=no/such/*.txt")
    assert code == 2
    assert "called" not in output
    assert "data.path" in output


def test_the_first_rank_of_a_node_speaks_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    for local_rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        assert train("missing.yaml")[0] == 2
    assert slept == [5.0]


@pytest.mark.parametrize(
    ("variable", "problem"),
    [
        ("NUMBA_NUM_THREADS=-1", "NUMBA_NUM_THREADS='-1' must be a whole number of at least 1"),
        ("NUMBA_NUM_THREADS=0", "NUMBA_NUM_THREADS='0' must be a whole number of at least 1"),
        ("NUMBA_NUM_THREADS=x", "NUMBA_NUM_THREADS='x' must be a whole number of at least 1"),
        ("NUMBA_THREADING_LAYER=x", "threads with NUMBA_THREADING_LAYER='x': The threading layer"),
        ("NUMBA_THREADING_LAYER_PRIORITY=x", "threads with NUMBA_THREADING_LAYER_PRIORITY='x'"),
    ],
)
def test_threads_that_numba_cannot_start_end_with_2(
    variable: str, problem: str, tmp_path: Path
) -> None:
    """In a process of its own: Numba reads its variables once."""
    name, _, value = variable.partition("=")
    done = subprocess.run(
        [sys.executable, "-m", "offload_adam", "train", TINY, f"--run.dir={tmp_path}"],
        env=os.environ | {name: value},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert problem in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("local_rank", ["1", "x"])
def test_a_local_rank_without_a_launcher_delays_no_error(
    local_rank: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sleep(_: float) -> None:
        raise AssertionError("waits for another rank")

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert train("missing.yaml")[0] == 2


def test_an_outcome_that_cannot_be_written_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OFFLOAD_ADAM_OUTCOME_FILE", str(tmp_path / "missing" / "file"))
    code, output = train(TINY, f"--run.dir={tmp_path}", "--train.num_steps=1")
    assert code == 0, output
    assert "Cannot write OFFLOAD_ADAM_OUTCOME_FILE" in caplog.text


@pytest.mark.parametrize("code", [0, 7])
def test_an_exit_within_the_run_is_an_error_with_a_traceback(
    code: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def leave(*_: object) -> None:
        sys.exit(code)

    monkeypatch.setattr("offload_adam.train.job.run_job", leave)
    assert train(TINY)[0] == 1
    (record,) = caplog.records
    assert record.getMessage() == f"SystemExit: {code}"
    assert record.exc_info is not None


def test_kept_state_in_use_is_reported_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise KeptInUseError("in use by process 7")

    monkeypatch.setattr("offload_adam.train.job.run_job", fail)
    assert train(TINY) == (2, "offload-adam: in use by process 7\n")
    assert caplog.records == []


def test_the_file_may_stand_behind_the_overrides(tmp_path: Path) -> None:
    code, output = train(f"--run.dir={tmp_path}", "--train.num_steps=2", TINY)
    assert code == 0, output
    assert (tmp_path / "tiny" / "metrics.jsonl").read_text().count("\n") == 2


def test_version_and_help_need_no_torch() -> None:
    script = (
        "import sys; sys.modules['torch'] = None\n"  # an import of it would raise
        "from typer.testing import CliRunner\n"
        "from offload_adam.cli.app import app\n"
        "for arguments in (['--version'], ['--help'], ['train', '--help'], ['train', 'x.yaml']):\n"
        "    print(CliRunner().invoke(app, arguments).exit_code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == ["0", "0", "0", "2"]
