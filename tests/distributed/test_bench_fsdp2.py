"""`bench fsdp2`: the command's report, and the comparison of the contenders' parameters."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

from typer.testing import CliRunner

from offload_adam.bench.fsdp2 import Fsdp2BenchmarkError, Task, measure, sizes_of
from offload_adam.bench.peers import SETTINGS
from offload_adam.cli.app import app
from tests.support.ranks import RankPool


def measure_small(rank: int, world_size: int, lr: float) -> None:
    """Measure a small model; torch's AdamW has this learning rate."""
    sizes = sizes_of(100_000, 2, "fp32")
    with mock.patch.dict(SETTINGS, lr=lr):
        measure(Task(sizes=sizes, device="cpu", num_threads=1, num_pairs=7, machine={}))


def test_contenders_that_differ_are_reported(ranks: RankPool) -> None:
    ranks.run(measure_small, 2, SETTINGS["lr"])
    for error in ranks.run(measure_small, 2, 1.01 * SETTINGS["lr"], expect_errors=True):
        assert error is not None
        assert error.type is Fsdp2BenchmarkError
        assert "offload_adam and torch_fused differ on rank 0. embedding.weight" in error.message


def test_the_command_compares_with_torch(tmp_path: Path) -> None:
    path = tmp_path / "fsdp2.json"
    options = ["--dtype", "bf16", "--numel", "100000", "--num-layers", "2", "--threads", "1"]
    result = CliRunner().invoke(app, ["bench", "fsdp2", *options, "--json", str(path)])
    assert result.exit_code == 0, result.output
    assert "on 2 rank(s)" in result.output
    assert "bf16 moments and no fp32 master weights" in result.output
    report = json.loads(path.read_text())
    assert [found["name"] for found in report["results"]] == ["offload_adam", "torch_fused"]
    for found in report["results"]:
        assert 0 < found["ms_min"] <= found["ms_median"]
        assert len(found["pairs"]) == 7
