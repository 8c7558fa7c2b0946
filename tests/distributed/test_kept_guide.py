"""The loop in docs/internals/kept-state.md runs as it is printed, and goes on after a kill."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.support.torchrun import ROOT


@pytest.mark.slow
def test_the_loop_of_the_guide_survives_a_kill(tmp_path: Path) -> None:
    memory = Path(tempfile.mkdtemp(prefix="offload_adam-test-", dir="/dev/shm"))
    text = (ROOT / "docs/internals/kept-state.md").read_text("utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
    assert "/dev/shm/my-run" in block
    (tmp_path / "loop.py").write_text(block.replace("/dev/shm/my-run", str(memory)))
    command = [sys.executable, str(tmp_path / "loop.py")]

    def finish() -> list[str]:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
        )
        return done.stdout.splitlines()

    try:
        (whole,) = finish()
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as killed:
            deadline_s = time.monotonic() + 60
            while not (memory / "rank-00000").exists() and time.monotonic() < deadline_s:
                time.sleep(0.05)
            time.sleep(1.0)
            killed.kill()
        resumed, again = finish()
        assert resumed.startswith("resumed after step ")
        assert again == whole
    finally:
        shutil.rmtree(memory)
