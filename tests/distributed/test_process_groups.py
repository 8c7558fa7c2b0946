"""The process groups of an optimizer: their members, their order, and how NCCL opens them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from offload_adam import OffloadAdam, load_checkpoint, save_checkpoint, torch_private
from offload_adam.coordinator.ranks import open_rank_group
from offload_adam.errors import PeerError, RankDisagreementError
from tests.support.nccl import stand_in_nccl
from tests.support.policies import in_policies
from tests.support.ranks import RankPool

pytestmark = pytest.mark.distributed

TIMEOUT = timedelta(seconds=47)
GPU = torch.device("cuda", 0)


def open_on_members(
    rank: int, world_size: int, members: list[int]
) -> tuple[bool, bool, timedelta] | None:
    """Open a rank group on `members` alone; the default group has NCCL and is bound to a GPU.

    Returns for each member whether NCCL splits, whether its stream has high priority, and its
    timeout.
    """
    store = dist.PrefixStore("again", torch_private.default_store())
    dist.destroy_process_group()
    with stand_in_nccl() as opened:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl", store=store, rank=rank, world_size=world_size, timeout=TIMEOUT
        )
        base = dist.new_group(members, timeout=TIMEOUT, backend="gloo")
        default: Any = dist.group.WORLD
        default.bound_device_id = GPU  # as init_process_group(device_id=...) leaves it
        if rank not in members:
            return None
        ranks = open_rank_group(base)
        ranks.open_data_groups(["cuda"])
        assert default.bound_device_id == GPU
        assert len(opened) == 2
        value = torch.tensor(float(rank), dtype=torch.float32)
        ranks.all_reduce(value)
        assert value == sum(members)
        ranks.release()
    options = opened[1].given
    return options.split_from is not None, options.is_high_priority_stream, options._timeout


@pytest.mark.parametrize("members", [[0, 1, 2], [0, 2]])
def test_nccl_is_not_split_and_has_high_priority(ranks: RankPool, members: list[int]) -> None:
    """A split would be a collective over all ranks, and rank 1 is not always here."""
    given = ranks.run(open_on_members, 3, members)
    expected = (False, True, TIMEOUT)
    assert given == [expected if rank in members else None for rank in range(3)]


def test_torch_splits_a_group_from_a_bound_default_group(ranks: RankPool) -> None:
    """If this fails, the test above cannot."""
    assert ranks.run(torch_splits, 1) == [True]


def torch_splits(rank: int, world_size: int) -> bool:
    store = dist.PrefixStore("again", torch_private.default_store())
    dist.destroy_process_group()
    with stand_in_nccl() as opened:
        dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=0, world_size=1)
        default: Any = dist.group.WORLD
        default.bound_device_id = GPU
        dist.new_group([0], backend="nccl", timeout=TIMEOUT)
    return opened[1].given.split_from is opened[0]


def train_in_order(
    rank: int, world_size: int, first: list[int] | None, then: list[int] | None, folder: str
) -> list[torch.Tensor]:
    """Train, save, load and train on, with groups of all ranks in these orders.

    None is the default group. Returns each step's weights, and what the checkpoint loads.
    """
    found = []
    for number, order in enumerate((first, then)):
        group = None if order is None else dist.new_group(order, sort_ranks=False)
        torch.manual_seed(1)
        model = torch.nn.Linear(30, 7)
        policies = in_policies(bucket_nbytes=512, gradient_reduction="optimizer")
        optimizer = OffloadAdam(model.parameters(), lr=0.1, process_group=group, **policies)
        if number == 1:
            load_checkpoint(folder, model=model, optimizer=optimizer)
            found += [weight.detach().clone() for weight in model.parameters()]
        for step in range(4):
            torch.manual_seed(10 * step + rank)
            for weight in model.parameters():
                # Integers, whose sum has the same bits in any order of the ranks.
                weight.grad = torch.randint_like(weight, -9, 10)
            optimizer.step()
            found += [weight.detach().clone() for weight in model.parameters()]
        if number == 0:
            save_checkpoint(folder, model=model, optimizer=optimizer)
        assert bool(optimizer.full_state_dict()) is (dist.get_rank(group) == 0)
        optimizer.close()
    return found


@pytest.mark.skipif(
    "sort_ranks" not in inspect.signature(dist.new_group).parameters,
    reason="this torch sorts the ranks of every group",
)
@pytest.mark.parametrize("order", [[1, 0], [2, 0, 1]])
def test_a_group_of_all_ranks_in_another_order(
    ranks: RankPool, order: list[int], tmp_path: Path
) -> None:
    expected = ranks.run(train_in_order, len(order), None, None, str(tmp_path / "plain"))
    for number, orders in enumerate([(order, None), (None, order)]):
        found = ranks.run(train_in_order, len(order), *orders, str(tmp_path / str(number)))
        for mine, plain in zip(found, expected, strict=True):
            for a, b in zip(mine, plain, strict=True):
                assert torch.equal(a, b)


def errors_of_rank_2(rank: int, world_size: int) -> list[str]:
    """Let rank 2, the second of a group, differ in one thing after the other."""
    group = dist.new_group([1, 2])
    if rank == 0:
        return []
    differs = rank == 2
    texts = []

    def note(action: Callable[[], object]) -> None:
        try:
            action()
        except (RankDisagreementError, PeerError, ValueError) as error:
            texts.append(str(error))

    def make(lr: float) -> OffloadAdam:
        torch.manual_seed(1)
        weight = torch.nn.Parameter(torch.randn(8))
        weight.grad = torch.ones_like(weight)
        policies = in_policies(gradient_reduction="optimizer")
        return OffloadAdam([weight], lr=lr, process_group=group, **policies)

    note(lambda: make(-1.0 if differs else 0.1))
    note(lambda: make(0.2 if differs else 0.1))
    optimizer = make(0.1)
    weight = optimizer.param_groups[0]["params"][0]
    if differs:
        optimizer.grad_scale = -1.0
    note(optimizer.step)
    optimizer.grad_scale = 1.0
    if differs:
        with torch.no_grad():
            weight.add_(1.0)
    note(optimizer.step)
    optimizer.close()
    return texts


def test_errors_name_a_rank_by_its_number_in_the_default_group(ranks: RankPool) -> None:
    _, first, second = ranks.run(errors_of_rank_2, 3)
    wanted = [
        "Rank(s) [2] failed in construction",
        "Rank(s) [2] have a different optimizer than rank 1",
        "rank(s) [2] raised an error",
        "modified outside the optimizer on rank(s) [2]",
    ]
    assert len(first) == len(second) == len(wanted)
    for text, part in zip(first, wanted, strict=True):
        assert part in text
