"""docs/guides/fsdp2.md and docs/guides/larger-than-the-gpu.md run as they are printed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

GUIDES = Path(__file__).parents[2] / "docs/guides"


def blocks_of(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (GUIDES / page).read_text("utf-8"), re.M | re.S)


def test_the_guide_runs_on_two_ranks(tmp_path: Path) -> None:
    first, last = blocks_of("fsdp2.md")
    (middle,) = blocks_of("larger-than-the-gpu.md")
    (tmp_path / "guide.py").write_text("\n".join([first, middle, last]), encoding="utf-8")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "guide.py"]
    done = subprocess.run(
        [sys.executable, *command],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    losses = [float(text) for text in done.stdout.split()]
    assert len(losses) == 3
    assert losses[2] < losses[1] < 1.0  # the last run goes on from the second one
