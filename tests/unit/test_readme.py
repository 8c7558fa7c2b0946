"""What the README names is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_test_that_the_readme_names_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert len(named) > 20
    sources = "\n".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/**/*.py"))
    assert named <= set(re.findall(r"^def (test_\w+)\(", sources, flags=re.MULTILINE))


def test_every_kind_of_failure_names_a_test() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text[text.index("## Failures") :].partition("\n## ")[0]
    rows = re.findall(r"^\| (.*) \|$", section, flags=re.MULTILINE)[1:]
    assert len(rows) > 20
    assert [row for row in rows if "`test_" not in row] == []
