"""Mark the tests of this folder, and keep their libraries from using the network."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Before a library is imported. The ranks are spawned later and inherit these.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


# First, because -m selects by what this adds.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.integrations)
