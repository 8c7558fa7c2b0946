"""External edits of parameters, groups and gradients, on all ranks or on one rank only."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from offload_adam import OffloadAdam, OffloadPolicy
from tests.support.ranks import RankPool
from tests.support.reference import (
    Outcome,
    Weights,
    adam_in_float64,
    bits,
    exact_gradients,
    mean_of,
    outcome_of,
)
from tests.support.scenario import Offloading

SHAPES: list[tuple[int, ...]] = [(40, 5), (300,), ()]


def make(model: Weights, *, streams: bool, offloads: bool = False) -> OffloadAdam:
    maker = Offloading if offloads else OffloadAdam
    return maker(
        model.named_parameters(),
        lr=1e-2,
        module=model if streams else None,
        gradient_reduction="optimizer",
        offload=OffloadPolicy(bucket_nbytes=512),
        num_threads=1,
    )


def train_step(model: Weights, optimizer: OffloadAdam, rank: int, seed: int) -> None:
    model(exact_gradients(model.all, 10 * seed + rank, 4)).backward()
    optimizer.step()
    optimizer.zero_grad()


class Followed(NamedTuple):
    """Master weights on rank 0 before and after, the parameters then, and the end's bits."""

    masters_before: list[torch.Tensor]
    masters: list[torch.Tensor]
    parameters: list[torch.Tensor]
    end: list[bytes]


def masters_of(optimizer: OffloadAdam) -> list[torch.Tensor]:
    full = optimizer.full_state_dict()
    return list(full["offload_adam"]["master_weight"].values()) if full else []


def follow(rank: int, world_size: int, dtype: torch.dtype, offloads: bool, change: str) -> Followed:
    """Change weights alike on all ranks, then take a step that moves nothing else."""
    model = Weights(SHAPES, dtype)
    optimizer = make(model, streams=False, offloads=offloads)
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    train_step(model, optimizer, rank, 0)
    before = masters_of(optimizer)
    if change.startswith("clamp"):
        with torch.no_grad():
            for parameter in model.all:
                written = parameter.data if change == "clamp_data" else parameter
                written.clamp_(-0.5, 0.5)
    else:
        model.load_state_dict(saved)
    optimizer.param_groups[0]["lr"] = 0.0
    train_step(model, optimizer, rank, 1)
    after = masters_of(optimizer)
    parameters = [parameter.detach().clone() for parameter in model.all]
    optimizer.param_groups[0]["lr"] = 1e-2
    train_step(model, optimizer, rank, 2)
    end = bits(model.all)
    optimizer.close()
    return Followed(before, after, parameters, end)


@pytest.mark.parametrize("change", ["clamp", "clamp_data", "load_state_dict"])
@pytest.mark.parametrize(
    ("dtype", "offloads"),
    [(torch.bfloat16, False), (torch.float16, True), (torch.float32, True)],
)
def test_masters_follow_a_change_that_all_ranks_make(
    ranks: RankPool, dtype: torch.dtype, offloads: bool, change: str
) -> None:
    first, second, third = ranks.run(follow, 3, dtype, offloads, change)
    assert first.end == second.end == third.end
    num_moved = num_kept = 0
    rows = zip(first.masters_before, first.masters, first.parameters, strict=True)
    for before, after, parameter in rows:
        # Changed means that the parameter is not what its master had been rounded to.
        changed = before.to(dtype) != parameter
        assert torch.equal(after, torch.where(changed, parameter.float(), before))
        num_moved += int(changed.sum())
        num_kept += int((~changed).sum())
    assert num_moved > 100
    assert num_kept > 0


def change_on_one(rank: int, world_size: int, odd: int, streams: bool) -> tuple[Outcome, bool]:
    """Clamp on one rank only, which raises an error; then clamp on the others and take the step."""
    model, expected_model = Weights(SHAPES), Weights(SHAPES)
    optimizer, expected_optimizer = (
        make(model, streams=streams),
        make(expected_model, streams=False),
    )
    train_step(model, optimizer, rank, 0)
    train_step(expected_model, expected_optimizer, rank, 0)

    def clamp(changed: Weights) -> None:
        with torch.no_grad():
            changed.w1.clamp_(-0.5, 0.5)

    model(exact_gradients(model.all, 10 + rank, 4)).backward()
    if rank == odd:
        clamp(model)
    before = bits(model.all)
    outcome = outcome_of(optimizer.step)
    assert bits(model.all) == before
    if rank != odd:
        clamp(model)
    optimizer.step()
    clamp(expected_model)
    train_step(expected_model, expected_optimizer, rank, 1)
    equal = bits(model.all) == bits(expected_model.all)
    optimizer.close()
    expected_optimizer.close()
    return outcome, equal


@pytest.mark.parametrize(
    ("world_size", "odd", "streams"), [(2, 0, True), (2, 1, False), (3, 2, True)]
)
def test_an_edit_on_one_rank_raises_an_error_that_names_it_and_can_be_corrected(
    ranks: RankPool, world_size: int, odd: int, streams: bool
) -> None:
    for rank, (outcome, equal) in enumerate(ranks.run(change_on_one, world_size, odd, streams)):
        assert outcome.error == "RankDisagreementError"
        assert f"modified outside the optimizer on rank(s) [{odd}] but not on" in outcome.message
        here = "'w1'" if rank == odd else "nothing"
        assert f"(modified here: {here})" in outcome.message
        assert equal


def change_data_on_one(rank: int, world_size: int, odd: int) -> tuple[Outcome, bool]:
    """As `change_on_one`, through `.data`, in a shard that rank `odd` has."""
    model, expected_model = (Weights([(300,), (300,), (300,)], torch.bfloat16) for _ in range(2))
    optimizer, expected_optimizer = make(model, streams=False), make(expected_model, streams=False)
    for seed in range(4):
        train_step(model, optimizer, rank, seed)
        train_step(expected_model, expected_optimizer, rank, seed)
    model(exact_gradients(model.all, 40 + rank, 4)).backward()
    if rank == odd:
        model.w1.data.clamp_(-0.5, 0.5)
    before = bits(model.all)
    outcome = outcome_of(optimizer.step)
    assert bits(model.all) == before
    if rank != odd:
        model.w1.data.clamp_(-0.5, 0.5)
    optimizer.step()
    with torch.no_grad():
        expected_model.w1.clamp_(-0.5, 0.5)
    train_step(expected_model, expected_optimizer, rank, 4)
    equal = bits(model.all) == bits(expected_model.all)
    optimizer.close()
    expected_optimizer.close()
    return outcome, equal


@pytest.mark.parametrize(("world_size", "odd"), [(2, 1), (3, 1)])
def test_a_write_through_data_on_one_rank_raises_and_can_be_corrected(
    ranks: RankPool, world_size: int, odd: int
) -> None:
    for outcome, equal in ranks.run(change_data_on_one, world_size, odd):
        assert outcome.error == "RankDisagreementError"
        assert f"outside the optimizer on rank(s) [{odd}] differently than on" in outcome.message
        assert "'w1'" in outcome.message
        assert equal


class Mended(NamedTuple):
    """The outcome of a mistake, and whether the corrected step equals a step without it."""

    outcome: Outcome
    unchanged: bool
    equal: bool


Mistake = Callable[[Weights, OffloadAdam], Callable[[], None]]


def replace_storage(model: Weights, optimizer: OffloadAdam) -> Callable[[], None]:
    ours = model.w1.data
    model.w1.data = ours.bfloat16()

    def mend() -> None:
        model.w1.data = ours

    return mend


def set_another_lr(model: Weights, optimizer: OffloadAdam) -> Callable[[], None]:
    optimizer.param_groups[0]["lr"] = 0.5

    def mend() -> None:
        optimizer.param_groups[0]["lr"] = 1e-2

    return mend


def set_another_eps(model: Weights, optimizer: OffloadAdam) -> Callable[[], None]:
    optimizer.param_groups[0]["eps"] = 1e-3

    def mend() -> None:
        optimizer.param_groups[0]["eps"] = 1e-8

    return mend


def set_no_lr(model: Weights, optimizer: OffloadAdam) -> Callable[[], None]:
    mend = set_another_lr(model, optimizer)
    optimizer.param_groups[0]["lr"] = None
    return mend


def clip_otherwise(model: Weights, optimizer: OffloadAdam) -> Callable[[], None]:
    optimizer.max_grad_norm = 0.5

    def mend() -> None:
        optimizer.max_grad_norm = None

    return mend


def set_a_beta_of_one(model: Weights, optimizer: OffloadAdam) -> Callable[[], None]:
    optimizer.param_groups[0]["betas"] = (1.0, 0.9)

    def mend() -> None:
        optimizer.param_groups[0]["betas"] = (0.9, 0.999)

    return mend


def take_a_parameter_out(model: Weights, optimizer: OffloadAdam) -> Callable[[], None]:
    ours = list(optimizer.param_groups[0]["params"])
    del optimizer.param_groups[0]["params"][1]

    def mend() -> None:
        optimizer.param_groups[0]["params"] = ours

    return mend


MISTAKES: dict[str, tuple[Mistake, str, str, str]] = {
    "storage": (replace_storage, "ParameterReplacedError", "'w1'", "PeerError"),
    "lr": (
        set_another_lr,
        "RankDisagreementError",
        "Rank(s) [1] have a different setting than rank 0: lr of group 0 is 0.5, but 0.01 on rank",
        "RankDisagreementError",
    ),
    "eps": (set_another_eps, "RankDisagreementError", "eps of group 0", "RankDisagreementError"),
    "no_lr": (set_no_lr, "TypeError", "lr must be a number, not None", "PeerError"),
    "beta": (set_a_beta_of_one, "ValueError", "betas[0] must lie in [0, 1)", "PeerError"),
    "taken_out": (take_a_parameter_out, "ValueError", "'w1' was removed", "PeerError"),
    "max_norm": (
        clip_otherwise,
        "RankDisagreementError",
        "the norm to clip to is 0.5, but None on rank 0. Set the same values on every rank",
        "RankDisagreementError",
    ),
}


def make_mistakes(rank: int, world_size: int, streams: bool) -> list[Mended]:
    """Make each mistake on rank 1 alone, in the second step of a run of its own."""
    expected_model = Weights(SHAPES)
    expected_optimizer = make(expected_model, streams=False)
    for seed in range(3):
        train_step(expected_model, expected_optimizer, rank, seed)
    results = []
    for mistake, _, _, _ in MISTAKES.values():
        model = Weights(SHAPES)
        optimizer = make(model, streams=streams)
        train_step(model, optimizer, rank, 0)
        model(exact_gradients(model.all, 10 + rank, 4)).backward()
        mend = mistake(model, optimizer) if rank == 1 else None
        before = bits(model.all)
        outcome = outcome_of(optimizer.step)
        unchanged = bits(model.all) == before
        if mend is not None:
            mend()
        optimizer.step()
        optimizer.zero_grad()
        train_step(model, optimizer, rank, 2)
        results.append(Mended(outcome, unchanged, bits(model.all) == bits(expected_model.all)))
        optimizer.close()
    expected_optimizer.close()
    return results


@pytest.mark.parametrize("streams", [False, True])
def test_a_mistake_on_one_rank_ends_the_step_on_all_and_can_be_corrected(
    ranks: RankPool, streams: bool
) -> None:
    results = ranks.run(make_mistakes, 3, streams)
    for rank, mended in enumerate(results):
        for result, (_, error, words, peer_error) in zip(mended, MISTAKES.values(), strict=True):
            assert result.outcome.error == (error if rank == 1 else peer_error)
            assert (words if rank == 1 else "ank(s) [1] ") in result.outcome.message
            assert result.unchanged
            assert result.equal


class SparseOnOne(torch.nn.Module):
    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(50, 8, sparse=sparse)
        self.head = torch.nn.Linear(8, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.head(self.table(tokens)).square().mean()
        return loss


def use_a_sparse_gradient(
    rank: int, world_size: int, streams: bool
) -> tuple[Outcome, Outcome, list[bytes], list[bytes]]:
    """Give rank 1 only a sparse gradient; drop this gradient and take the next step."""
    torch.manual_seed(7)
    model = SparseOnOne(sparse=rank == 1)
    optimizer = OffloadAdam(
        model.named_parameters(),
        module=model if streams else None,
        gradient_reduction="optimizer",
        offload=OffloadPolicy(bucket_nbytes=512),
        num_threads=1,
    )
    before = bits(list(model.parameters()))
    loss = model(torch.tensor([1, 2, 3]))
    in_backward = outcome_of(loss.backward)
    in_step = outcome_of(optimizer.step)
    assert bits(list(model.parameters())) == before
    optimizer.zero_grad()
    model.table.sparse = False
    model(torch.tensor([4 + rank, 5, 6])).backward()
    optimizer.step()
    after = bits(list(model.parameters()))
    optimizer.close()
    return in_backward, in_step, before, after


@pytest.mark.parametrize("streams", [False, True])
def test_a_sparse_gradient_on_one_rank_is_named_and_no_rank_hangs(
    ranks: RankPool, streams: bool
) -> None:
    first, second = ranks.run(use_a_sparse_gradient, 2, streams)
    for outcome in second[:2] if streams else second[1:2]:
        assert outcome.error == "ValueError"
        assert "'table.weight'" in outcome.message
        assert "sparse=False" in outcome.message
    assert first[0] == Outcome("", "")
    assert first[1].error == "PeerError"
    assert "rank(s) [1]" in first[1].message.lower()
    assert first[3] == second[3] != first[2]


def move_on_one(rank: int, world_size: int, how: str, streams: bool) -> float:
    """Move the model of rank 1 alone; return the distance to torch's Adam in float64."""
    model = Weights(SHAPES)
    optimizer = make(model, streams=streams)
    start = [parameter.detach().clone() for parameter in model.all]
    for seed in range(3):
        if seed > 0 and rank == 1:
            if how == "shared memory":
                model.share_memory()
            else:
                model.double().float()
        train_step(model, optimizer, rank, seed)
    means = [
        mean_of([exact_gradients(start, 10 * seed + r, 4) for r in range(world_size)])
        for seed in range(3)
    ]
    expected = adam_in_float64(start, means, lr=1e-2)
    optimizer.close()
    pairs = zip(model.all, expected, strict=True)
    return max(float((one.double() - other).abs().max()) for one, other in pairs)


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("how", ["shared memory", "there and back"])
def test_one_rank_alone_may_move_its_model(ranks: RankPool, how: str, streams: bool) -> None:
    for error in ranks.run(move_on_one, 2, how, streams):
        assert error < 1e-6
