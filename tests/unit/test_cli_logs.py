"""The log of `train` and `profile`: text and JSON lines, warnings, errors, and torchrun's file."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from typer.testing import CliRunner

from offload_adam.cli.app import app

TINY = str(Path(__file__).parents[2] / "configs" / "tiny.yaml")

LOGGING = """
import logging, sys, warnings
from offload_adam.cli.logs import LogFormat, configure_logging
configure_logging(LogFormat(sys.argv[1]))
logger = logging.getLogger("offload_adam.some.module")
logger.debug("not shown")
logger.info("two\\nlines \\u00e9, %s", '"quoted"')
logger.warning("warned")
warnings.warn("of the configuration", UserWarning)
warnings.warn("a lone surrogate \\udc80", RuntimeWarning)
try:
    1 / 0
except ZeroDivisionError:
    logger.exception("divided")
logger.info("a folder \\x1b[2J\\x9b")
"""


def logged(log_format: str, rank: str) -> list[str]:
    """Return the lines that the script above writes to stderr on this rank."""
    done = subprocess.run(
        [sys.executable, "-c", LOGGING, log_format],
        env=os.environ
        | {"RANK": rank, "WORLD_SIZE": "4", "PYTHONIOENCODING": "ascii:backslashreplace"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == ""
    return done.stderr.splitlines()


def test_each_text_line_has_time_level_rank_and_logger() -> None:
    lines = logged("text", "0")
    time = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
    assert re.fullmatch(rf"{time} INFO    rank 0 offload_adam\.some\.module: two", lines[0])
    assert re.fullmatch(rf"{time} WARNING rank 0 offload_adam\.some\.module: warned", lines[2])
    assert re.match(rf"{time} WARNING rank 0 py\.warnings: UserWarning: of the", lines[3])
    assert re.match(rf"{time} WARNING rank 0 py\.warnings: RuntimeWarning: a lone", lines[4])
    assert re.fullmatch(rf"{time} ERROR   rank 0 offload_adam\.some\.module: divided", lines[5])
    assert lines[-2] == "ZeroDivisionError: division by zero"
    assert lines[-1].endswith(r"a folder \x1b[2J\x9b")


def test_each_json_line_is_one_object() -> None:
    before = datetime.now(UTC)
    records = [json.loads(line) for line in logged("json", "0")]
    for record in records:
        time = datetime.fromisoformat(record.pop("time"))
        assert time.utcoffset() is not None
        assert abs((time - before).total_seconds()) < 60
    common = {"rank": 0, "logger": "offload_adam.some.module"}
    assert records[0] == common | {"level": "INFO", "message": 'two\nlines \u00e9, "quoted"'}
    assert records[1] == common | {"level": "WARNING", "message": "warned"}
    assert records[3]["logger"] == "py.warnings"
    assert "RuntimeWarning: a lone surrogate \udc80 (<string>, line " in records[3]["message"]
    assert records[4]["exception"].startswith("Traceback")
    assert records[4].keys() == {"level", "rank", "logger", "message", "exception"}


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_other_ranks_log_warnings_and_errors_but_no_user_warnings(log_format: str) -> None:
    text = "\n".join(logged(log_format, "3"))
    of_rank = r'rank 3 (\S+): (\w+)|"rank": 3, "logger": "(\S+)", "message": "(\w+)'
    found = [[part for part in groups if part] for groups in re.findall(of_rank, text)]
    package = "offload_adam.some.module"
    assert found == [
        [package, "warned"],
        ["py.warnings", "RuntimeWarning"],
        [package, "divided"],
    ]


def test_an_import_of_the_library_configures_no_logging() -> None:
    script = (
        "import logging, warnings\n"
        "before = warnings.showwarning\n"
        "import offload_adam.optimizer, offload_adam.train.job\n"
        "assert logging.root.handlers == [] == logging.getLogger('offload_adam').handlers\n"
        "assert logging.getLogger('offload_adam').level == logging.NOTSET\n"
        "assert warnings.showwarning is before"
    )
    subprocess.run([sys.executable, "-c", script], timeout=60, check=True)


def test_a_run_writes_json_lines_only(tmp_path: Path) -> None:
    """One line for the resume, and one for each checkpoint; a mistake is a line, too."""
    overrides = [f"--run.dir={tmp_path}", "--train.eval_sequences=2", "--checkpoint.every=1"]
    first = CliRunner().invoke(app, ["train", TINY, "--train.num_steps=1", *overrides])
    assert first.exit_code == 0
    lines = train(tmp_path, 0, "--train.num_steps=2", "--checkpoint.every=1")
    text = "\n".join(line["message"] for line in lines)
    folder = tmp_path / "tiny" / "checkpoints"
    assert text.count(f"Resuming from {folder}/step-1 at step 1") == 1
    assert text.count("Wrote checkpoint") == 1
    assert re.search(rf"Wrote checkpoint {folder}/step-2 \([\d.]+ KiB in [\d.]+ s\)", text)
    (mistake,) = train(tmp_path, 2, "--train.num_stepz=1")
    assert mistake["level"] == "ERROR"
    assert "did you mean train.num_steps?" in mistake["message"]


def train(folder: Path, code: int, *overrides: str) -> list[dict[str, Any]]:
    """Run the tiny job, which must end with this code; return its log."""
    arguments = [TINY, "--log-format", "json", f"--run.dir={folder}", *overrides]
    done = subprocess.run(
        [sys.executable, "-m", "offload_adam", "train", *arguments, "--train.eval_sequences=2"],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == code, done.stderr
    return [json.loads(line) for line in done.stderr.splitlines()]


def test_torchruns_report_quotes_the_error_and_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error_file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(error_file))
    wrong = ["--train.num_stepz=3", "--run.seed=x"]
    assert CliRunner().invoke(app, ["train", TINY, *wrong]).exit_code == 2
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(error_file))
    report = str(ChildFailedError("offload_adam", {0: failure}))
    quoted = report.partition("traceback : ")[2].partition("\n")[0]
    assert quoted == (
        f'{TINY}: 2 mistakes: run.seed: must be a whole number, got "x"; '
        "train.num_stepz: unknown key; did you mean train.num_steps?"
    )
    assert "Traceback" not in report


def test_an_unexpected_error_is_logged_with_its_traceback(tmp_path: Path) -> None:
    (tmp_path / "bad_model.py").write_text(
        "import torch\n"
        "class Bad(torch.nn.Embedding):\n"
        "    def forward(self, tokens):\n"
        "        raise RuntimeError('no such kernel')\n"
        "def make():\n"
        "    return Bad(256, 256)\n"
    )
    overrides = [f"--run.dir={tmp_path}", "--model.factory=bad_model:make"]
    done = subprocess.run(
        [sys.executable, "-m", "offload_adam", "train", TINY, *overrides],
        env=os.environ | {"PYTHONPATH": f"{Path(TINY).parents[1]}{os.pathsep}{tmp_path}"},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 1
    assert "ERROR   rank 0 offload_adam.cli.train: RuntimeError: no such kernel" in done.stderr
    assert done.stderr.count("Traceback (most recent call last)") == 1
