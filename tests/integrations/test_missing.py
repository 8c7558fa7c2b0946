"""The error without the extra `integrations`."""

from __future__ import annotations

import importlib

import pytest

from offload_adam.integrations.missing import explain_missing


def test_a_missing_library_names_the_extra() -> None:
    expected = pytest.raises(ImportError, match=r"pip install 'offload-adam\[integrations\]'")
    with expected, explain_missing("no_such_library"):
        importlib.import_module("no_such_library")


def test_a_broken_library_keeps_its_own_error() -> None:
    expected = pytest.raises(ModuleNotFoundError, match=r"^No module named 'no_such_part'$")
    with expected, explain_missing("its_library"):
        importlib.import_module("no_such_part")
