"""A full state loads into any world size with the same bits; a rank's state only on that rank."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from offload_adam import OffloadAdam
from tests.support.ranks import RankPool
from tests.support.reference import Outcome, bits, outcome_of
from tests.support.scenario import Model, Scenario, gradients_of, make_optimizer, tensors_in

SCENARIO = Scenario("streaming", max_grad_norm=0.5)
NUM_BEFORE = 2
NUM_AFTER = 2


class Run(NamedTuple):
    """Where a run stands: the model, the full state (on rank 0) and this rank's own."""

    model: dict[str, torch.Tensor]
    full: dict[str, Any]
    local: dict[str, Any]


def advance(model: Model, optimizer: OffloadAdam, steps: range, rank: int, world_size: int) -> None:
    for step in steps:
        model(gradients_of(model, step, rank, world_size, SCENARIO)).backward()
        optimizer.step()
        optimizer.zero_grad()


def standing(model: Model, optimizer: OffloadAdam) -> Run:
    """Return copies that share no memory with the optimizer."""
    full = optimizer.full_state_dict()
    local = optimizer.local_state_dict()
    local["state"] = {
        packed: {key: value.clone() for key, value in entry.items()}
        for packed, entry in local["state"].items()
    }
    return Run({k: v.clone() for k, v in model.state_dict().items()}, full, local)


def run_from_the_start(rank: int, world_size: int, num_steps: int) -> Run:
    model = Model()
    optimizer = make_optimizer(model, SCENARIO)
    advance(model, optimizer, range(num_steps), rank, world_size)
    run = standing(model, optimizer)
    optimizer.close()
    return run


def go_on(rank: int, world_size: int, run: Run, model_first: bool) -> Run:
    """Load the model and a full state, in either order, and train on."""
    model = Model()
    optimizer = make_optimizer(model, SCENARIO)
    if model_first:
        model.load_state_dict(run.model)
    optimizer.load_state_dict(run.full)
    if not model_first:
        model.load_state_dict(run.model)
    advance(model, optimizer, range(NUM_BEFORE, NUM_BEFORE + NUM_AFTER), rank, world_size)
    result = standing(model, optimizer)
    optimizer.close()
    return result


def assert_same(found: Run, expected: Run) -> None:
    assert bits(list(found.model.values())) == bits(list(expected.model.values()))
    tensors, expected_tensors = dict(tensors_in(found.full)), dict(tensors_in(expected.full))
    assert tensors.keys() == expected_tensors.keys()
    for key, tensor in tensors.items():
        assert torch.equal(tensor, expected_tensors[key]), key


def test_a_full_state_resumes_in_any_world_size(ranks: RankPool) -> None:
    uninterrupted = run_from_the_start(0, 1, NUM_BEFORE + NUM_AFTER)
    assert_same(ranks.run(run_from_the_start, 3, NUM_BEFORE + NUM_AFTER)[0], uninterrupted)
    for saving in (2, 3):
        run = ranks.run(run_from_the_start, saving, NUM_BEFORE)[0]
        assert_same(go_on(0, 1, run, model_first=True), uninterrupted)
        later = ranks.run(go_on, 4, run._replace(local={}), saving == 3)
        assert_same(later[0], uninterrupted)
        for other in later[1:]:
            assert bits(list(other.model.values())) == bits(list(uninterrupted.model.values()))


def load_own_state(rank: int, world_size: int) -> tuple[Run, list[Outcome]]:
    """Save on every rank, try the neighbour's state, then go on from one's own."""
    run = run_from_the_start(rank, world_size, NUM_BEFORE)
    neighbours: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(neighbours, run.local)
    model = Model()
    optimizer = make_optimizer(model, SCENARIO)
    before = bits(list(model.state_dict().values()))
    outcomes = [outcome_of(lambda: optimizer.load_state_dict(neighbours[rank - 1]))]
    halved = {**run.local, "offload_adam": {"rank": 0, "world_size": 2 * world_size}}
    outcomes.append(outcome_of(lambda: optimizer.load_state_dict(halved)))
    assert all(float(entry["step"]) == 0.0 for entry in optimizer.state.values())
    assert bits(list(model.state_dict().values())) == before
    optimizer.load_state_dict(run.local)
    model.load_state_dict(run.model)
    advance(model, optimizer, range(NUM_BEFORE, NUM_BEFORE + NUM_AFTER), rank, world_size)
    result = standing(model, optimizer)
    optimizer.close()
    return result, outcomes


def load_what_one_rank_cannot(rank: int, world_size: int) -> tuple[list[Outcome], bool, Run]:
    """Load a state that rank 1 alone rejects, in three ways, then go on from the right one."""
    run = run_from_the_start(rank, world_size, NUM_BEFORE)
    model = Model()
    optimizer = make_optimizer(model, SCENARIO)
    before = standing(model, optimizer)
    foreign = {**run.local, "state": {0: {"square_avg": torch.ones(3)}}}
    outcomes = [
        outcome_of(lambda: optimizer.load_state_dict(foreign if rank == 1 else run.local)),
        outcome_of(lambda: optimizer.load_state_dict({} if rank == 1 else run.local)),
    ]

    def fail(*arguments: object) -> None:
        raise OSError("the disk is gone")

    hook = optimizer.register_load_state_dict_pre_hook(fail) if rank == 1 else None
    outcomes.append(outcome_of(lambda: optimizer.load_state_dict(run.local)))
    if hook is not None:
        hook.remove()
    same = all(
        torch.equal(value, before.local["state"][packed][key])
        for packed, entry in standing(model, optimizer).local["state"].items()
        for key, value in entry.items()
    )
    optimizer.load_state_dict(run.local)
    model.load_state_dict(run.model)
    advance(model, optimizer, range(NUM_BEFORE, NUM_BEFORE + NUM_AFTER), rank, world_size)
    result = standing(model, optimizer)
    optimizer.close()
    return outcomes, same, result


def test_a_state_that_one_rank_rejects_is_loaded_on_none(ranks: RankPool) -> None:
    uninterrupted = run_from_the_start(0, 1, NUM_BEFORE + NUM_AFTER)
    results = ranks.run(load_what_one_rank_cannot, 2)
    assert_same(results[0][2], uninterrupted)
    for rank, (outcomes, same, _) in enumerate(results):
        assert same
        foreign, empty, broken = outcomes
        for outcome, words in (
            (foreign, "parameter 0 has 'square_avg', which Adam and AdamW do not have"),
            (empty, "This is not an optimizer's state dict"),
        ):
            assert outcome.error == "ValueError"
            assert "Rank(s) [1] failed in load_state_dict" in outcome.message
            assert words in outcome.message
        assert broken.error == ("PeerError", "OSError")[rank]
        assert "the disk is gone" in broken.message


def test_a_ranks_own_state_goes_back_to_that_rank_alone(ranks: RankPool) -> None:
    world_size = 3
    uninterrupted = run_from_the_start(0, 1, NUM_BEFORE + NUM_AFTER)
    results = ranks.run(load_own_state, world_size)
    assert_same(results[0][0], uninterrupted)
    for _, outcomes in results:
        for outcome in outcomes:
            assert outcome.error == "ValueError"
            assert "full_state_dict()" in outcome.message
        assert "Rank(s) [0, 1, 2] failed in load_state_dict: This" in outcomes[0].message
        assert "saved by rank 2 of 3" in outcomes[0].message  # what the first of these was given
        assert "into rank 0 of 3" in outcomes[0].message
    alone = Model()
    optimizer = make_optimizer(alone, SCENARIO)
    outcome = outcome_of(lambda: optimizer.load_state_dict(results[1][0].local))
    assert "saved by rank 1 of 3" in outcome.message
    assert "into rank 0 of 1" in outcome.message


def save_with_hooks(rank: int, world_size: int) -> list[Any]:
    """Return what hooks of saving saw on this rank, and what is loaded of what they added."""
    model = Model()
    optimizer = make_optimizer(model, SCENARIO)
    state: dict[Any, Any] = optimizer.state
    seen: list[Any] = []

    def pre(_: Any) -> None:
        state["noted"] = rank + 10

    def post(_: Any, saved: dict[str, Any]) -> dict[str, Any]:
        seen.append(saved["state"]["noted"])
        return {**saved, "after": True}

    optimizer.register_state_dict_pre_hook(pre)
    optimizer.register_state_dict_post_hook(post)
    local, full = optimizer.local_state_dict(), optimizer.full_state_dict()
    seen.append([saved.get("after") for saved in (optimizer.state_dict(), local, full)])
    del state["noted"]
    optimizer.load_state_dict(local)
    seen.append(state["noted"])
    advance(model, optimizer, range(1), rank, world_size)
    optimizer.close()
    return seen


def test_hooks_of_saving_run_on_every_rank_that_saves(ranks: RankPool) -> None:
    first, second = ranks.run(save_with_hooks, 2)
    assert first == [10, 10, 10, [True, True, True], 10]
    assert second == [11, 11, [True, True, None], 11]
