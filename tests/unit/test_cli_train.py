"""The command `train`: its exit codes, its messages, and that a mistake starts nothing."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from offload_adam.cli.app import app

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
    assert "optimizer.lr: must be greater than 0, got -1" in output
    assert "cannot read '--schedule=x'" in output
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


def test_what_needs_one_rank_is_refused_before_the_ranks_join(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, output = train(TINY, "--optimizer.amsgrad=true")
    assert code == 2
    assert "optimizer.amsgrad: works on one rank only" in output


def test_the_first_rank_of_a_node_speaks_first(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    for local_rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        assert train("missing.yaml")[0] == 2
    assert slept == [5.0]


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
