"""docs/operate: pages are short, and commands for one CPU host run."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from typer.testing import CliRunner

from offload_adam.checkpoint.format import FORMAT_VERSION, READABLE_VERSIONS
from offload_adam.cli.app import app

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "operate"
PAGES = sorted(FOLDER.glob("*.md"))
_NOT_RUN = re.compile(r"<!-- not run: needs a \w+ -->")


class Block(NamedTuple):
    """A fenced block.

    runs: it has no mark of a block that one CPU host cannot run.
    """

    language: str
    text: str
    runs: bool


def blocks_of(page: Path) -> list[Block]:
    found, lines = [], page.read_text(encoding="utf-8").splitlines()
    fences = [place for place, line in enumerate(lines) if line.startswith("```")]
    for begin, end in zip(fences[::2], fences[1::2], strict=True):
        text = "\n".join(lines[begin + 1 : end]) + "\n"
        runs = _NOT_RUN.fullmatch(lines[begin - 1]) is None
        found.append(Block(lines[begin].removeprefix("```"), text, runs))
    return found


def commands_of(page: Path) -> str:
    """Return the commands of a page that one CPU host can run."""
    return "".join(b.text for b in blocks_of(page) if b.language == "bash" and b.runs)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_is_short_and_names_what_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.count("\n") <= 120
    # Paths of the repository in code, such as `launch/slurm.sbatch`.
    for name in re.findall(r"`((?:launch|configs)/[\w./-]+)`", text):
        assert (ROOT / name).exists(), name
    for block in blocks_of(page):
        if block.language == "yaml":
            assert yaml.safe_load(block.text)


def test_the_versions_of_the_format_are_those_of_the_code() -> None:
    text = (FOLDER / "upgrades.md").read_text(encoding="utf-8")
    readable = " and ".join(map(str, READABLE_VERSIONS))
    assert f"This version writes {FORMAT_VERSION} and reads {readable}." in text


def test_commands_use_no_undefined_variable() -> None:
    for page in PAGES:
        text = "".join(b.text for b in blocks_of(page) if b.language == "bash")
        used = {*re.findall(r"\$\{?([A-Za-z_]\w*)", text)}
        assert used <= {*re.findall(r"(?:^|\s)(\w+)=", text)}, page


def test_the_memory_of_a_pod_is_that_of_the_plan() -> None:
    page = FOLDER / "kubernetes.md"
    (command,) = re.findall("^offload-adam (plan .*?) *#", page.read_text("utf-8"), flags=re.M)
    done = CliRunner().invoke(app, command.split())
    assert done.exit_code == 0, done.output
    # The last number of a row is that of the node.
    node = {
        name: float(gib)
        for name, gib in re.findall(
            r"^ (\w[\w ]*?)(?: \(.*\))?  .* ([\d.]+) GiB *$", done.output, re.M
        )
    }
    planes = [node[name] for name in ("master_weight", "exp_avg", "exp_avg_sq")]
    assert planes == [planes[0]] * 3
    text = " ".join(page.read_text("utf-8").split())
    assert (
        f"the state has {sum(planes):.2f} GiB (three rows of {planes[0]:.2f} GiB), gradient shards "
        f"have {node['gradient shards']:.2f} GiB, and the total is {node['total']:.2f} GiB" in text
    )
    in_volume, num_ranks = 1 + sum(planes) + node["gradient shards"] + 80 / 1024, 8
    assert f"`sizeLimit` is at least {math.ceil(in_volume)}Gi" in text
    memory = 1 + node["total"] + 80 / 1024
    assert f"`memory` at least {math.ceil(memory)}Gi" in text
    assert f"which makes {math.ceil(memory) + 3 * num_ranks}Gi" in text


def test_examples_for_slurm_ask_for_gpus() -> None:
    for page in (FOLDER / "slurm.md", ROOT / "launch" / "slurm.sbatch"):
        for command in re.findall(r"sbatch --nodes.*", page.read_text("utf-8")):
            assert "--gpus-per-node=" in command


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", [*filter(commands_of, PAGES)], ids=lambda page: page.stem)
def test_commands_run(page: Path, tmp_path: Path) -> None:
    for name in ("launch", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    done = subprocess.run(
        ["bash", "-euxo", "pipefail", "-c", commands_of(page)],
        cwd=tmp_path,
        env=os.environ
        | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "CUDA_VISIBLE_DEVICES": "",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout
