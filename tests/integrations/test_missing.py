"""The error without the extra `integrations`, and the command that installs an extra."""

from __future__ import annotations

import importlib
import json
import re
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from offload_adam.integrations import missing
from offload_adam.integrations.missing import explain_missing, how_to_install


def test_a_missing_library_names_the_extra() -> None:
    message = f"no_such_library is not installed: {how_to_install('integrations')}"
    with (
        pytest.raises(ImportError, match=re.escape(message)),
        explain_missing("no_such_library"),
    ):
        importlib.import_module("no_such_library")


def test_a_broken_library_keeps_its_own_error() -> None:
    expected = pytest.raises(ModuleNotFoundError, match=r"^No module named 'no_such_part'$")
    with expected, explain_missing("its_library"):
        importlib.import_module("no_such_part")


@pytest.mark.parametrize(
    ("origin", "command"),
    [
        (
            {"url": "file:///home/me/offload_adam", "dir_info": {"editable": True}},
            "run pip install -e '.[watch]' in /home/me/offload_adam",
        ),
        (
            {"url": "file:///home/my%20own", "dir_info": {}},
            "run pip install '.[watch]' in '/home/my own'",
        ),
        (
            {
                "url": "https://example.com/a.git",
                "vcs_info": {"vcs": "git", "commit_id": "0123abc", "requested_revision": "main"},
            },
            "run pip install 'offload-adam[watch] @ git+https://example.com/a.git@0123abc'",
        ),
        (
            {"url": "file:///tmp/a.whl", "archive_info": {}},
            "run pip install 'offload-adam[watch] @ file:///tmp/a.whl'",
        ),
        (None, "run pip install 'offload-adam[watch]'"),
    ],
    ids=["editable", "folder", "git", "wheel", "index"],
)
def test_the_command_keeps_the_kind_of_installation(
    monkeypatch: pytest.MonkeyPatch, origin: dict[str, Any] | None, command: str
) -> None:
    text = None if origin is None else json.dumps(origin)
    installed = SimpleNamespace(read_text={"direct_url.json": text}.get)
    monkeypatch.setattr(missing, "distribution", {"offload-adam": installed}.get)
    assert how_to_install("watch") == command


def test_sources_on_the_path_are_installed_editable(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(missing, "distribution", fail)
    root = Path(__file__).parents[2]
    assert how_to_install("watch") == f"run pip install -e '.[watch]' in {root}"
