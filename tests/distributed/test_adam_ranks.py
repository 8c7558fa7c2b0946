"""`Adam` on several ranks matches one rank with the mean gradient; errors reach all ranks."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from offload_adam import Adam, OffloadPolicy
from tests.support.ranks import RankPool
from tests.support.reference import Outcome, outcome_of

NUM_STEPS = 3


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(20, 6, sparse=True), nn.Flatten(), nn.Linear(18, 7), nn.Linear(7, 5)
    )


def gradients_of(
    model: nn.Module, step: int, part: int, num_parts: int
) -> list[torch.Tensor | None]:
    """Return one part's gradients of the mean loss over this part of a batch of six."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, 20, (6, 3), generator=generator).chunk(num_parts)[part]
    targets = torch.randint(0, 5, (6,), generator=generator).chunk(num_parts)[part]
    model.zero_grad()
    nn.functional.cross_entropy(model(tokens), targets).backward()
    found = [parameter.grad for parameter in model.parameters()]
    if part == 1:
        found[-1] = None  # a rank without a gradient for a parameter: it counts zeros
    model.zero_grad()
    return found


def mean_of(parts: list[list[torch.Tensor | None]]) -> list[torch.Tensor | None]:
    """Return the mean of the parts' gradients; sparse gradients are concatenated."""
    means: list[torch.Tensor | None] = []
    for members in zip(*parts, strict=True):
        there = [member / len(parts) for member in members if member is not None]
        if there[0].is_sparse:
            rows = torch.cat([member._indices() for member in there], dim=1)
            values = torch.cat([member._values() for member in there])
            means.append(torch.sparse_coo_tensor(rows, values, there[0].shape))
        else:
            means.append(torch.stack(there).sum(0))
    return means


OPTIONS: dict[str, dict[str, Any]] = {
    "beside": {},
    "lazy": {"use_lazy": True},
    "offload": {"use_offload": True},
    "nesterov": {"use_nesterov": True, "epsilon_hat": True},
}


def make_adam(model: nn.Module, **options: Any) -> Adam:
    first, *rest = model.parameters()
    groups = [{"params": [first], "lr": 0.05}, {"params": rest, "grad_centralization": True}]
    return Adam(
        groups,
        0.02,
        weight_decay=0.1,
        loss_scale=2.0,
        offload=OffloadPolicy(bucket_nbytes=512),
        **options,
    )


def results(model: nn.Module, optimizer: Adam) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def walked(optimizer: Adam, given: list[torch.Tensor | None]) -> tuple[torch.Tensor | None, ...]:
    in_groups = [id(p) for group in optimizer.param_groups for p in group["params"]]
    return tuple(given[in_groups.index(id(p))] for p in optimizer.parameters)


def run_part(
    rank: int, world_size: int, name: str, reduction: str, by_call: bool
) -> list[torch.Tensor]:
    model = make_model()
    optimizer = make_adam(model, gradient_reduction=reduction, **OPTIONS[name])
    for step in range(NUM_STEPS):
        parts = [gradients_of(model, step, part, world_size) for part in range(world_size)]
        mine = parts[rank] if reduction == "optimizer" else mean_of(parts)
        if by_call:
            optimizer(walked(optimizer, mine))
        else:
            for parameter, gradient in zip(model.parameters(), mine, strict=True):
                parameter.grad = gradient
            optimizer.step()
    assert optimizer.global_step == NUM_STEPS
    found = results(model, optimizer)
    assert optimizer.last_step is not None
    found.append(torch.tensor(optimizer.last_step.total_norm))
    optimizer.close()
    return found


@pytest.mark.filterwarnings("ignore:grad_centralization has no effect")
@pytest.mark.parametrize("name", sorted(OPTIONS))
@pytest.mark.parametrize("reduction", ["optimizer", "external"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_match_one_rank_with_the_mean_gradient(
    ranks: RankPool, name: str, reduction: str, world_size: int
) -> None:
    by_call = world_size == 2
    found = ranks.run(run_part, world_size, name, reduction, by_call, timeout=60.0)
    model = make_model()
    alone = make_adam(model, **OPTIONS[name])
    for step in range(NUM_STEPS):
        parts = [gradients_of(model, step, part, world_size) for part in range(world_size)]
        alone(walked(alone, mean_of(parts)))
    assert alone.last_step is not None
    expected = [*results(model, alone), torch.tensor(alone.last_step.total_norm)]
    for rank in range(world_size):
        for mine, first, value in zip(found[rank], found[0], expected, strict=True):
            assert torch.equal(mine, first)
            # The mean is rounded in another order: a few 2**-24 of the gradient, and Adam's
            # direction moves by as much of the learning rate where it is not near 0.
            assert torch.allclose(mine, value, rtol=1e-5, atol=1e-5)


def reject_amsgrad(rank: int, world_size: int) -> list[Outcome]:
    outcomes = []
    for asking in ((1,), (0, 2), (0, 1, 2)):
        model = make_model()
        addresses = [parameter.data_ptr() for parameter in model.parameters()]
        make = partial(
            Adam,
            model.parameters(),
            use_amsgrad=rank in asking,
            gradient_reduction="optimizer",
        )
        outcomes.append(outcome_of(make))
        assert [parameter.data_ptr() for parameter in model.parameters()] == addresses
    return outcomes


def test_amsgrad_is_rejected_on_every_rank_and_names_the_ranks_that_set_it(ranks: RankPool) -> None:
    for outcomes in ranks.run(reject_amsgrad, 3, timeout=60.0):
        assert [outcome.error for outcome in outcomes] == ["ValueError"] * 3
        assert all("amsgrad" in outcome.message for outcome in outcomes)
        assert "[1]" in outcomes[0].message
        assert "[0, 2]" in outcomes[1].message


def fail_on_one(rank: int, world_size: int) -> list[Outcome]:
    """Give wrong gradients on rank 1 only: no rank hangs, and a corrected call works."""
    model = make_model()
    optimizer = Adam(model.parameters(), [0.1, 0.2], gradient_reduction="optimizer")
    right = tuple(gradients_of(model, 0, 0, 1))
    table, *rest = right
    assert table is not None
    broken = torch.sparse_coo_tensor(
        torch.tensor([[25]]), torch.ones(1, 6), (20, 6), check_invariants=False
    )
    wrong: list[Any] = [
        right[:-1],
        (table, *rest[:-1], torch.ones(6)),
        (1.0, *rest),
        (broken, *rest),
    ]
    outcomes = []
    for attempt in wrong:
        before = results(model, optimizer)
        outcomes.append(outcome_of(partial(optimizer, attempt if rank == 1 else right)))
        assert all(map(torch.equal, before, model.parameters()))
        assert optimizer.global_step == 0
    dense = (table.to_dense(), *rest)
    outcomes.append(outcome_of(lambda: optimizer(dense if rank == 1 else right)))
    for _ in range(2):
        optimizer(right)
    outcomes.append(outcome_of(lambda: optimizer(right)))
    assert optimizer.global_step == 2
    optimizer.close()
    return outcomes


def test_an_error_on_one_rank_is_an_error_on_all(ranks: RankPool) -> None:
    found = ranks.run(fail_on_one, 3, timeout=60.0)
    for rank, outcomes in enumerate(found):
        assert all(outcome.error for outcome in outcomes)
        if rank != 1:
            assert all("rank(s) [1]" in outcome.message.lower() for outcome in outcomes[:4])
        assert outcomes[4].error == "RankDisagreementError"
        assert "sparse on rank(s) [0, 2] and dense on others" in outcomes[4].message
        assert outcomes[5].error == "ValueError"
        assert "2 values, one per step, so there is none for step 2" in outcomes[5].message
    assert [outcome.error for outcome in found[1][:4]] == [
        "ValueError",
        "ValueError",
        "TypeError",
        "ValueError",
    ]


def save_everywhere(rank: int, world_size: int, name: str) -> list[dict[str, Any]]:
    model = make_model()
    optimizer = make_adam(model, gradient_reduction="optimizer", **OPTIONS[name])
    for step in range(2):
        optimizer(walked(optimizer, gradients_of(model, step, rank, world_size)))
    saved = [optimizer.full_state_dict(), optimizer.local_state_dict()]
    optimizer.close()
    return saved


@pytest.mark.filterwarnings("ignore:grad_centralization has no effect")
@pytest.mark.parametrize("name", ["beside", "offload"])
def test_a_full_state_loads_on_one_rank(ranks: RankPool, name: str) -> None:
    full, local = ranks.run(save_everywhere, 2, name, timeout=60.0)[0]
    alone = make_adam(make_model(), **OPTIONS[name])
    alone.load_state_dict(full)
    assert alone.global_step == 2
    if name == "beside":
        alone.load_state_dict(local)  # every rank holds all of it
    else:
        with pytest.raises(ValueError, match="saved by rank 0 of 2"):
            alone.load_state_dict(local)
    for place, parameter in enumerate(p for g in alone.param_groups for p in g["params"]):
        assert torch.equal(alone.state[parameter]["exp_avg"], full["state"][place]["exp_avg"])
