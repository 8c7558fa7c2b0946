"""docs/coming-from/adamw.md: each rejection in it is raised, and each test that it names exists."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import Parameter

import offload_adam
from offload_adam import OffloadAdam

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/coming-from/adamw.md").read_text(encoding="utf-8")


def rows_of(section: str) -> list[list[str]]:
    """Return the cells of each row of the table under a heading."""
    table = TEXT[TEXT.index(f"## {section}\n") :].partition("\n## ")[0]
    rows = re.findall(r"^\| (.*) \|$", table, flags=re.MULTILINE)[1:]
    return [row.split(" | ") for row in rows]


REJECTIONS = rows_of("Rejected by design")


def test_every_row_names_a_test_that_exists() -> None:
    sources = "\n".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/**/*.py"))
    tests = set(re.findall(r"^def (test_\w+)\(", sources, flags=re.MULTILINE))
    for section, least in (("Equal to torch", 25), ("Different from torch", 10)):
        rows = rows_of(section)
        assert len(rows) >= least
        assert [row for row in rows if "`test_" not in row[-1]] == []
    assert set(re.findall(r"`(test_\w+)`", TEXT)) <= tests


def test_the_cases_of_torch_are_all_named() -> None:
    """Each test of the generic cases is in the document."""
    written = "\n".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "tests/unit").glob("test_torch_*.py")
    )
    tests = set(re.findall(r"^def (test_\w+)\(name: str|^def (test_\w+)\(\n    name: str", written))
    assert {one or other for one, other in tests} <= set(re.findall(r"`(test_\w+)`", TEXT))


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
@pytest.mark.parametrize("cells", REJECTIONS, ids=[cells[0] for cells in REJECTIONS])
def test_each_rejection_is_raised(cells: list[str]) -> None:
    _, example, error, *why = cells
    assert len(why) == 2
    assert all(why)
    kind, _, words = error.partition(": ")
    w, v = Parameter(torch.zeros(2)), Parameter(torch.zeros(2))
    optimizer = OffloadAdam([w])
    names: dict[str, Any] = {
        "w": w,
        "v": v,
        "optimizer": optimizer,
        "torch": torch,
        "Parameter": Parameter,
        "OffloadAdam": OffloadAdam,
        "copy": copy,
        "pickle": pickle,
        "offload_adam": offload_adam,
    }
    with pytest.raises(Exception, match=re.escape(words)) as raised:
        exec(example.strip("`"), names)
    assert type(raised.value).__name__ == kind
    assert torch.equal(w, torch.zeros(2))


def test_there_are_rejections() -> None:
    assert len(REJECTIONS) >= 20
