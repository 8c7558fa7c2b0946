"""The documentation's site shows options and quotes as they are typed."""

from __future__ import annotations

import ast
from html import unescape
from pathlib import Path

import pytest

CONFIGURATION = Path(__file__).parents[2] / "docs" / "conf.py"
TEXT = """Pass --fit to plan, or state_format="bf16"."""


def test_options_and_quotes_are_not_typeset(tmp_path: Path) -> None:
    application = pytest.importorskip("sphinx.application")
    pytest.importorskip("myst_parser")
    # The file itself would make the whole reference.
    settings = {
        target.id: ast.literal_eval(node.value)
        for node in ast.parse(CONFIGURATION.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    (tmp_path / "index.md").write_text(f"# Page\n\n{TEXT}\n", encoding="utf-8")
    application.Sphinx(
        *(tmp_path, None, tmp_path / "out", tmp_path / "trees", "xml"),
        confoverrides={
            "extensions": ["myst_parser"],
            "smartquotes": settings.get("smartquotes", True),
        },
        status=None,
        warning=None,
    ).build()
    assert TEXT in unescape((tmp_path / "out" / "index.xml").read_text(encoding="utf-8"))
