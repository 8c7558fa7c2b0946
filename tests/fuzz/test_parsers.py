"""No bytes make a parser crash, hang, or print what it should not."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn

from offload_adam import OffloadAdam, save_checkpoint

ROOT = Path(__file__).parents[2]
PARSERS = ("yaml", "overrides", "manifest", "pickle")
BUDGET_S = 5
OVERRIDES = b"--optimizer.lr=1e-3\0--model.arguments.a={b: [1, .inf]}\0--run.name=017"

pytest.importorskip("atheris", reason="fuzzing needs the extra `fuzz`")


class Fuzzer(NamedTuple):
    process: subprocess.Popen[bytes]
    log: Path


def write_seeds(folder: Path, parser: str) -> None:
    """Write inputs that are read, as a start for mutations."""
    if parser == "yaml":
        for path in (ROOT / "configs").glob("*.yaml"):
            (folder / path.name).write_bytes(path.read_bytes())
        return
    if parser == "overrides":
        (folder / "seed").write_bytes(OVERRIDES)
        return
    model = nn.Linear(2, 3)
    if parser == "manifest":
        checkpoint = folder.parent / "c"
        extra = {"a": [1, (2.5, None)], "t": torch.ones(2)}
        save_checkpoint(
            checkpoint, model=model, optimizer=OffloadAdam(model.parameters()), extra=extra
        )
        values = json.loads((checkpoint / "manifest.json").read_bytes())
        del values["sha256"]
        (folder / "seed").write_text(json.dumps(values))
        return
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(content, folder / "zip")
    torch.save(content, folder / "old", _use_new_zipfile_serialization=False)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Fuzzer]]:
    """The fuzzers of all parsers, which run at once, since each takes seconds to import torch."""
    fuzzers: dict[str, Fuzzer] = {}
    try:
        for parser in PARSERS:
            folder = tmp_path_factory.mktemp(parser)
            seeds = folder / "seeds"
            seeds.mkdir()
            write_seeds(seeds, parser)
            command = [sys.executable, "-m", "tests.fuzz.parsers", parser, str(seeds)]
            # Always the same mutations, so that the test does not fail by chance.
            limits = ["-seed=1", f"-max_total_time={BUDGET_S}", f"-artifact_prefix={folder}/"]
            with (folder / "log").open("w") as log:
                process = subprocess.Popen([*command, *limits], cwd=ROOT, stdout=log, stderr=log)
            fuzzers[parser] = Fuzzer(process, folder / "log")
        yield fuzzers
    finally:
        for fuzzer in fuzzers.values():
            fuzzer.process.kill()
            fuzzer.process.wait(10)


@pytest.mark.parametrize("parser", PARSERS)
def test_a_parser_survives_mutated_input(parser: str, started: dict[str, Fuzzer]) -> None:
    fuzzer = started[parser]
    code = fuzzer.process.wait(90)
    log = fuzzer.log.read_text(errors="replace")
    assert code == 0, log[-4000:]
    assert "Done " in log
