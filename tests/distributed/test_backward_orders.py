"""Ranks whose backwards differ in order or in the parameters used, or that run no backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from offload_adam import OffloadAdam, OffloadPolicy
from offload_adam.gradients.stand_in import gradient_of
from tests.support.policies import in_policies
from tests.support.ranks import RankPool
from tests.support.reference import Outcome, Weights, exact_gradients, mean_of, outcome_of

SHAPES: list[tuple[int, ...]] = [(150,), (3, 40), (), (260,), (128,), (1,), (64, 3)]
Means = list[torch.Tensor | None]


def make(model: torch.nn.Module, **options: Any) -> OffloadAdam:
    """Make an optimizer with a bucket per parameter, whose exp_avg is the mean gradient itself."""
    return OffloadAdam(
        model.named_parameters(),
        betas=(0.0, 0.9),
        module=model,
        num_threads=1,
        **in_policies(**{"bucket_nbytes": 512, **options}),
    )


def means_in(optimizer: OffloadAdam) -> list[torch.Tensor]:
    """Return the mean gradients that the last step used, on rank 0; collective."""
    full = optimizer.full_state_dict()
    return [entry["exp_avg"] for entry in full["state"].values()] if full else []


def assert_means(found: list[torch.Tensor], expected: Means) -> None:
    for tensor, mean in zip(found, expected, strict=True):
        wanted = torch.zeros_like(tensor) if mean is None else mean.float()
        assert torch.allclose(tensor, wanted, rtol=0.0, atol=1e-7)


def place(rank: int, step: int) -> tuple[list[int], set[int]]:
    """Return the order in which this rank uses parameters in this step, and the unused ones."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    order = torch.randperm(len(SHAPES), generator=generator).tolist()
    return order, set(order[: rank + step])


def gradients_at(rank: int, world_size: int, step: int) -> list[torch.Tensor | None]:
    unused = place(rank, step)[1]
    gradients = exact_gradients(Weights(SHAPES).all, 10 * step + rank, world_size)
    return [None if p in unused else gradient for p, gradient in enumerate(gradients)]


def use_parameters_in_other_orders(rank: int, world_size: int) -> list[list[torch.Tensor]]:
    model = Weights(SHAPES)
    optimizer = make(model)
    found = []
    for step in range(4):
        order, _ = place(rank, step)
        model(gradients_at(rank, world_size, step), order).backward()
        for position, parameter in enumerate(model.all):
            assert (parameter.grad is None) == (position in place(rank, step)[1])
            assert gradient_of(parameter) is None
        optimizer.step()
        found.append(means_in(optimizer))
    optimizer.close()
    return found


def test_ranks_may_use_different_parameters_in_different_orders(ranks: RankPool) -> None:
    world_size = 3
    found = ranks.run(use_parameters_in_other_orders, world_size)[0]
    for step, means in enumerate(found):
        expected = mean_of([gradients_at(r, world_size, step) for r in range(world_size)])
        for position, (tensor, mean) in enumerate(zip(means, expected, strict=True)):
            if mean is None:  # no rank used it, so its moments are those of the step before
                before = found[step - 1][position] if step else torch.zeros_like(tensor)
                assert torch.equal(tensor, before)
            else:
                assert torch.allclose(tensor, mean.float(), rtol=0.0, atol=1e-7)


def skip_backward_on_one(
    rank: int, world_size: int, options: dict[str, Any]
) -> tuple[list[torch.Tensor], float]:
    """Rank 1 runs no backward in the first step; all of them sum something before `step()`.

    With room to accumulate, rank r runs r backwards in the second.
    """
    model = Weights(SHAPES)
    optimizer = make(model, **options)
    if rank != 1:
        model(exact_gradients(model.all, rank, world_size)).backward()
    total = torch.tensor(float(rank + 1))
    dist.all_reduce(total)
    optimizer.step()
    found = means_in(optimizer)
    if options:
        for number in range(rank):
            model(exact_gradients(model.all, 10 * number + rank, world_size)).backward()
        dist.all_reduce(total)
        optimizer.step()
        found += means_in(optimizer)
    optimizer.close()
    return found, float(total)


@pytest.mark.parametrize("options", [{}, {"accumulate": "host"}], ids=["once", "accumulate"])
def test_a_rank_may_run_no_backward_or_fewer(ranks: RankPool, options: dict[str, Any]) -> None:
    world_size = 3
    results = ranks.run(skip_backward_on_one, world_size, options)
    assert [total for _, total in results] == [18.0 if options else 6.0] * 3
    weights = Weights(SHAPES).all
    nothing: list[torch.Tensor | None] = [None] * len(weights)
    by_rank = [
        nothing if rank == 1 else exact_gradients(weights, rank, world_size)
        for rank in range(world_size)
    ]
    assert_means(results[0][0][: len(weights)], mean_of(by_rank))
    if options:
        # Ranks 1 and 2 each run a first backward, rank 2 a second one.
        one, two, three = (exact_gradients(weights, seed, world_size) for seed in (1, 2, 12))
        added = [
            torch.stack(grads).double().sum(0) / 3 for grads in zip(one, two, three, strict=True)
        ]
        assert_means(results[0][0][len(weights) :], list(added))


def raise_in_backward(rank: int, world_size: int, raising: dict[int, int]) -> list[torch.Tensor]:
    """Raise in the backward of some ranks, at this gradient; drop all gradients and continue."""
    model = Weights(SHAPES)
    # In two buckets, so that a rank may raise before it has sent any.
    optimizer = make(model, bucket_nbytes=4096)
    gradients = exact_gradients(model.all, rank, world_size)

    def refuse(_: torch.Tensor) -> None:
        raise ArithmeticError("on purpose")

    position = raising.get(rank)
    if position is None:
        model(gradients).backward()
    else:
        hook = model.all[position].register_hook(refuse)
        assert outcome_of(model(gradients).backward).error == "ArithmeticError"
        hook.remove()
    optimizer.zero_grad()
    model(exact_gradients(model.all, 10 + rank, world_size)).backward()
    optimizer.step()
    found = means_in(optimizer)
    optimizer.close()
    return found


@pytest.mark.parametrize("raising", [{0: 4, 1: 4, 2: 4}, {1: 0}, {0: 5, 2: 3}], ids=str)
def test_a_backward_that_raises_leaves_nothing_behind(
    ranks: RankPool, raising: dict[int, int]
) -> None:
    found = ranks.run(raise_in_backward, 3, raising)[0]
    weights = Weights(SHAPES).all
    assert_means(found, mean_of([exact_gradients(weights, 10 + rank, 3) for rank in range(3)]))


def train_two_optimizers(rank: int, world_size: int) -> list[torch.Tensor]:
    """Share a backward between two optimizers; step them in another order than constructed."""
    model = Weights(SHAPES)
    names = list(model.named_parameters())
    optimizers = [
        OffloadAdam(
            names[half::2],
            betas=(0.0, 0.9),
            module=model,
            gradient_reduction="optimizer",
            offload=OffloadPolicy(bucket_nbytes=512),
            num_threads=1,
        )
        for half in (0, 1)
    ]
    order, _ = place(rank, 0)
    model(exact_gradients(model.all, rank, world_size), order).backward()
    for optimizer in reversed(optimizers):
        optimizer.step()
    halves = [means_in(optimizer) for optimizer in optimizers]
    for optimizer in optimizers:
        optimizer.close()
    return [halves[p % 2][p // 2] for p in range(len(SHAPES))] if rank == 0 else []


def test_two_optimizers_share_a_backward(ranks: RankPool) -> None:
    found = ranks.run(train_two_optimizers, 3)[0]
    weights = Weights(SHAPES).all
    assert_means(found, mean_of([exact_gradients(weights, rank, 3) for rank in range(3)]))


def set_gradients_late(
    rank: int, world_size: int, only_rank: int | None
) -> tuple[list[torch.Tensor], Outcome, list[torch.Tensor]]:
    """Set `.grad` by hand after the backward: of unused parameters, and of one that has left."""
    model = Weights(SHAPES)
    optimizer = make(model)
    by_hand = only_rank in (None, rank)
    unused = (1, 5)

    def backward_of_the_rest(seed: int) -> list[torch.Tensor]:
        gradients = exact_gradients(model.all, seed + rank, world_size)
        used = [None if p in unused else gradient for p, gradient in enumerate(gradients)]
        model(used).backward()
        return gradients

    gradients = backward_of_the_rest(0)
    if by_hand:
        for position in unused:
            model.all[position].grad = gradients[position]
    optimizer.step()
    found = means_in(optimizer)

    gradients = backward_of_the_rest(10)
    stand_in = model.w0.grad
    if by_hand:
        model.w0.grad = gradients[0]
    outcome = outcome_of(optimizer.step)
    model.w0.grad = stand_in
    optimizer.step()
    result = found, outcome, means_in(optimizer)
    optimizer.close()
    return result


@pytest.mark.parametrize("only_rank", [None, 1])
def test_gradients_may_be_set_by_hand_after_the_backward(
    ranks: RankPool, only_rank: int | None
) -> None:
    world_size = 2
    results = ranks.run(set_gradients_late, world_size, only_rank)
    weights = Weights(SHAPES).all
    unused = (1, 5)

    def expected(seed: int, by_hand: set[int]) -> Means:
        return mean_of(
            [
                [
                    None if p in unused and rank not in by_hand else gradient
                    for p, gradient in enumerate(exact_gradients(weights, seed + rank, world_size))
                ]
                for rank in range(world_size)
            ]
        )

    hands = {0, 1} if only_rank is None else {only_rank}
    first_means = expected(0, hands)
    assert_means(results[0][0], first_means)
    second_means = expected(10, set())
    for position in unused:
        second_means[position] = first_means[position]
    assert_means(results[0][2], second_means)
    for rank, (_, outcome, _) in enumerate(results):
        if rank in hands:
            assert outcome.error == "ValueError"
            assert "'w0' has a .grad at step()" in outcome.message
        else:
            assert outcome.error == "PeerError"


class Checkpointed(torch.nn.Module):
    """Blocks that are recomputed in backward, in nested backwards of their own.

    tied: the last block shares the second one's weight, across two checkpoints.
    """

    def __init__(self, *, tied: bool, recompute: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(12, 12) for _ in range(4))
        self.head = torch.nn.Linear(12, 2)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
        if tied:
            _, second, _, last = self.blocks
            last.weight = second.weight
        self._recompute = recompute

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = inputs.requires_grad_()
        for block in self.blocks:
            if self._recompute:
                hidden = checkpoint(block, hidden, use_reentrant=True).tanh()
            else:
                hidden = block(hidden).tanh()
        return torch.as_tensor(self.head(hidden).square().mean())


def inputs_at(rank: int, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(5, 12, generator=generator)


def train_checkpointed(
    rank: int, world_size: int, tied: bool, options: dict[str, Any]
) -> tuple[Outcome, list[torch.Tensor]]:
    model = Checkpointed(tied=tied, recompute=True)
    optimizer = make(model, **options)
    optimizer.param_groups[0]["lr"] = 0.0
    outcome = Outcome("", "")
    for step in range(2):
        outcome = outcome_of(model(inputs_at(rank, step)).backward)
        if outcome.error:
            break
        optimizer.step()
    found = means_in(optimizer)
    optimizer.close()
    return outcome, found


def plain_mean(tied: bool, step: int, world_size: int) -> list[torch.Tensor]:
    """Return the mean gradient that autograd gives without checkpoints, in float64."""
    by_rank = []
    for rank in range(world_size):
        model = Checkpointed(tied=tied, recompute=False).double()
        model(inputs_at(rank, step).double()).backward()
        by_rank.append([parameter.grad for parameter in model.parameters()])
    return [mean for mean in mean_of(by_rank) if mean is not None]


def test_reentrant_checkpoints_end_their_backwards_without_ending_the_outer_one(
    ranks: RankPool,
) -> None:
    outcome, found = ranks.run(train_checkpointed, 2, False, {})[0]
    assert outcome == Outcome("", "")
    # Gradients of up to 1, through five layers of fp32.
    for mean, expected in zip(found, plain_mean(False, 1, 2), strict=True):
        assert torch.allclose(mean.double(), expected, rtol=0.0, atol=1e-6)


def test_a_parameter_shared_across_reentrant_checkpoints_is_named_or_added(ranks: RankPool) -> None:
    for outcome, _ in ranks.run(train_checkpointed, 2, True, {"accumulate": "error"}):
        assert outcome.error == "ValueError"
        assert "'blocks.1.weight' has already been reduced in this step" in outcome.message
        assert "accumulate='auto'" in outcome.message
    for options in ({}, {"accumulate": "host"}):
        outcome, found = ranks.run(train_checkpointed, 2, True, options)[0]
        assert outcome == Outcome("", "")
        for mean, expected in zip(found, plain_mean(True, 1, 2), strict=True):
            assert torch.allclose(mean.double(), expected, rtol=0.0, atol=1e-6)
