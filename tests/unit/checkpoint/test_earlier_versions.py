"""Checkpoints that earlier versions wrote load to the bit, in every state format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from offload_adam import load_checkpoint
from offload_adam.options import StateFormat
from tests.saved.formats import EXTRA, FORMATS, make, values
from tests.saved.write import HERE

VERSIONS = sorted(HERE.glob("[0-9]*"))


def assert_same(found: Any, expected: Any, where: str) -> None:
    """Compare nested dicts and lists; tensors by their bits."""
    assert type(found) is type(expected), where
    if isinstance(expected, dict):
        assert set(found) == set(expected), where
        for key in expected:
            assert_same(found[key], expected[key], f"{where}[{key!r}]")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for number, item in enumerate(expected):
            assert_same(found[number], item, f"{where}[{number}]")
    elif isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype, where
        assert found.shape == expected.shape, where
        bits = [value.contiguous().view(-1).view(torch.uint8) for value in (found, expected)]
        assert torch.equal(*bits), where
    else:
        assert found == expected, where


@pytest.mark.parametrize("state_format", FORMATS)
@pytest.mark.parametrize("folder", VERSIONS, ids=lambda folder: folder.name)
def test_a_checkpoint_of_an_earlier_version_loads_to_the_bit(
    folder: Path, state_format: StateFormat
) -> None:
    model, optimizer = make(state_format, seed=2)
    saved = folder / state_format
    extra = load_checkpoint(saved / "checkpoint", model=model, optimizer=optimizer)
    assert_same(extra, EXTRA, "extra")
    assert_same(values(model, optimizer), torch.load(saved / "expected.pt"), state_format)


def test_there_are_earlier_versions() -> None:
    assert "0.1.0" in [folder.name for folder in VERSIONS]
