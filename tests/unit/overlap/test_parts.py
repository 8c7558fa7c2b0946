"""A large update in parts: the bits of an update at once, and each element is copied once."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from offload_adam import Adam, OffloadAdamW, OffloadPolicy
from offload_adam.layout import state_plan
from offload_adam.layout.schedule import Operation
from offload_adam.transfer.stream_waits import StreamWaits
from tests.support.devices import HOST_AS_DEVICE


class Offloading(OffloadAdamW):
    """Treats parameters in host memory like parameters on a device."""

    _backend = HOST_AS_DEVICE


class OffloadingSpecified(Adam):
    """The same for the optimizer that MindSpore's documentation specifies."""

    _backend = replace(HOST_AS_DEVICE)


class Table(torch.nn.Module):
    """An embedding with sparse gradients, and a dense layer after it, in one bucket."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = torch.nn.Embedding(40, 16, sparse=True)
        self.layer = torch.nn.Linear(16, 48)

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.layer(self.rows(indices))
        return found


def run_sparse(*, overlap: bool) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = Table()
    optimizer = OffloadingSpecified(
        list(model.parameters()), 0.01, module=model, overlap=overlap, use_offload=True
    )
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        model(torch.randint(0, 40, (6,), generator=generator)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.close()
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("overlap", [False, True])
def test_a_bucket_with_sparse_gradients_is_updated_as_a_whole(
    overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run_sparse(overlap=False)
    monkeypatch.setattr(state_plan, "PART_NUMEL", 256)
    for ours, theirs in zip(run_sparse(overlap=overlap), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(("part_numel", "num_parts"), [(1 << 24, 1), (256, 7)])
def test_each_element_is_copied_to_the_device_once(
    overlap: bool, part_numel: int, num_parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state_plan, "PART_NUMEL", part_numel)
    copied: Counter[str] = Counter()
    run = StreamWaits.run

    def counted(self: Any, operation: Operation, *arguments: Any, **keywords: Any) -> None:
        if operation is Operation.COPY_H2D:
            copied["parts"] += 1
            copied["elements"] += sum(tensor.numel() for tensor in keywords["writes"])
        run(self, operation, *arguments, **keywords)

    monkeypatch.setattr(StreamWaits, "run", counted)
    model = torch.nn.Linear(60, 30, bias=False)
    optimizer = Offloading(
        model.parameters(), module=model, overlap=overlap, offload=OffloadPolicy(bucket_nbytes=1)
    )
    model(torch.ones(2, 60)).sum().backward()
    optimizer.step()
    optimizer.close()
    assert copied == {"parts": num_parts, "elements": 1800}
