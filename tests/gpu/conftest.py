"""Every test of this folder needs a GPU, and is left out where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    without = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(without)
