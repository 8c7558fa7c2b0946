"""`GradientTransfer.has_arrived`."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from offload_adam.coordinator.ranks import RankGroup
from offload_adam.gradients.gradient_transfer import GradientCopy, GradientTransfer
from offload_adam.layout.schedule import Operation
from offload_adam.layout.state_plan import StateLocation
from offload_adam.transfer.collectives import PendingCollective
from tests.support.plans import equal_plans


@pytest.mark.parametrize("location", [StateLocation.DEVICE, StateLocation.HOST])
def test_a_reduction_that_only_a_stream_waits_for_has_not_arrived_before_its_event(
    location: StateLocation,
) -> None:
    """Otherwise, finishing the copy in backward would make the compute stream wait for it."""
    over: set[tuple[Operation, int]] = set()
    waits = SimpleNamespace(is_over=lambda operation, bucket: (operation, bucket) in over)
    transfer = GradientTransfer(RankGroup(), *cast(Any, (None, waits, None, None)))
    plan = replace(equal_plans(1, world_size=2)[0], location=location)
    state: Any = SimpleNamespace(plan=plan, layout=plan.bucket)
    slot = torch.zeros(8)
    reduced = PendingCollective(None, slot, slot[:4])
    copy = GradientCopy(state, cast(Any, None), [], complete=True, pending=reduced)
    assert not transfer.has_arrived(copy)
    over.add((Operation.REDUCE, 0))
    assert transfer.has_arrived(copy)
    assert transfer.has_arrived(GradientCopy(state, cast(Any, None), [], complete=False))
