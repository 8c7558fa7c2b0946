"""The pictures of docs/guides/profile.md are drawn from a report, with all that it shows."""

from __future__ import annotations

import shlex
import struct
from pathlib import Path

import pytest

from offload_adam.profiling.report import ReportInputs, write_report
from tests.bench import pictures
from tests.unit.profiling.synthetic import profile

ROOT = Path(__file__).parents[2]


def test_the_pictures_of_a_report_are_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("vl_convert")
    report = tmp_path / "report.html"
    write_report(ReportInputs("Profile", [profile(0), profile(1)], None), report)
    pictures.main(["--report", str(report), "--folder", str(tmp_path)])
    assert "Memory peaked" in capsys.readouterr().out
    for name in ("report-time.png", "report-memory.png"):
        content = (tmp_path / name).read_bytes()
        assert content.startswith(b"\x89PNG\r\n\x1a\n")
        width, height = struct.unpack(">II", content[16:24])
        assert width == pictures.WIDTH * pictures.SCALE  # axes and legend included
        assert height > 200 * pictures.SCALE


def test_the_example_is_that_of_the_guide() -> None:
    guide = (ROOT / "docs/guides/profile.md").read_text(encoding="utf-8").replace("\\\n", " ")
    line = next(line for line in guide.splitlines() if "profile configs/tiny.yaml" in line)
    _, _, command = line.partition("--nproc-per-node=2 ")
    example = [part.removeprefix(f"{ROOT}/") for part in pictures.EXAMPLE]
    assert example == shlex.split(command)
