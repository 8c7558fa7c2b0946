"""The quickstart itself: two ranks on the standard library's source, against the bigram's loss."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.distributed, pytest.mark.quickstart]

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


def run_quickstart(folder: Path, timeout_s: float, *overrides: str) -> tuple[float, float]:
    """Run it under torchrun with two ranks; return the final validation loss and the bigram's."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    job = ["--nproc-per-node=2", "-m", "offload_adam", "train", str(CONFIG)]
    finished = subprocess.run(
        [*torchrun, *job, f"--run.dir={folder}", *overrides],
        env={**os.environ, "PYTHONPATH": str(CONFIG.parents[1]), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    found = re.search(r"a bigram model's validation loss: ([\d.]+) nats", finished.stdout)
    assert found is not None, finished.stdout
    records = (folder / "quickstart" / "metrics.jsonl").read_text().splitlines()
    return float(json.loads(records[-1])["val_loss"]), float(found[1])


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_a_short_quickstart_is_past_the_bigram(tmp_path: Path) -> None:
    val_loss, bigram = run_quickstart(
        tmp_path, 140.0, "--train.num_steps=150", "--train.eval_every=0"
    )
    assert 2.3 < bigram < 2.6
    assert val_loss < bigram


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_the_quickstart_ends_under_two_nats(tmp_path: Path) -> None:
    val_loss, bigram = run_quickstart(tmp_path, 400.0)
    assert val_loss < 2.0
    assert val_loss < bigram - 0.4
