"""The sampler reads the memory of all visible GPUs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from offload_adam.profiling.sampler import MemorySampler

ALLOCATED = {0: 0, 1: 300}
RESERVED = {0: 0, 1: 512}


def test_memory_of_a_gpu_that_is_not_the_threads_current_one_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda index=0: ALLOCATED[index])
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda index=0: RESERVED[index])
    path = tmp_path / "memory.jsonl"
    with MemorySampler(path, dict, interval_s=60.0):
        pass  # it samples once more at its end
    (sample,) = map(json.loads, path.read_text().splitlines())
    assert (sample["device_allocated"], sample["device_reserved"]) == (300, 512)
