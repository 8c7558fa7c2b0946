"""Construction: every rank makes the same optimizer, or every rank is told why not."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from offload_adam import OffloadAdam
from tests.distributed.reference import Outcome, Weights, bits, outcome_of
from tests.ranks import RankPool

AMSGRAD = "amsgrad=True is not supported in distributed training (world size > 1)"


def refused(model: torch.nn.Module, make: Callable[[], OffloadAdam]) -> Outcome:
    """Make an optimizer that is refused, and hold that nothing was allocated or moved for it."""
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    with patch("offload_adam.memory.arena.mmap.mmap", side_effect=AssertionError("allocated")):
        outcome = outcome_of(make)
    assert [parameter.data_ptr() for parameter in model.parameters()] == addresses
    return outcome


def refuse_everywhere(rank: int, world_size: int) -> list[Outcome]:
    model = Weights([(3, 2), (2,)])
    last = {"params": [model.w1], "amsgrad": True}
    attempts: list[tuple[Any, dict[str, Any]]] = [
        (model.parameters(), {"amsgrad": True, "gradient_reduction": "optimizer"}),
        (model.parameters(), {"amsgrad": True, "module": model}),
        ([{"params": [model.w0]}, last], {"gradient_reduction": "optimizer"}),
        (model.parameters(), {}),
    ]
    outcomes = [
        refused(model, partial(OffloadAdam, params, **options)) for params, options in attempts
    ]
    with_one = OffloadAdam([model.w0], gradient_reduction="optimizer")
    address = model.w1.data_ptr()
    outcomes.append(outcome_of(lambda: with_one.add_param_group(last)))
    assert model.w1.data_ptr() == address
    assert len(with_one.param_groups) == 1
    with_one.close()
    return outcomes


def test_amsgrad_and_an_unnamed_reduction_are_refused_before_anything_is_allocated(
    ranks: RankPool,
) -> None:
    for outcomes in ranks.run(refuse_everywhere, 2, timeout=30.0):
        for position in (0, 1, 2, 4):
            assert outcomes[position].error == "ValueError"
            assert outcomes[position].message.startswith(AMSGRAD)
        assert outcomes[3].error == "ValueError"
        assert "no module=, gradient_reduction must be given" in outcomes[3].message


def refuse_without_group(rank: int, world_size: int) -> list[Outcome]:
    dist.destroy_process_group()
    model = Weights([(3,)])
    attempts: list[tuple[Any, dict[str, Any]]] = [
        (model.parameters(), {"amsgrad": True}),
        ([{"params": [model.w0], "amsgrad": True}], {}),
        (model.parameters(), {}),
        (model.parameters(), {"gradient_reduction": "optimizer"}),
        (model.parameters(), {"module": model}),
    ]
    return [refused(model, partial(OffloadAdam, params, **options)) for params, options in attempts]


def test_a_launcher_without_a_process_group_is_an_error(ranks: RankPool) -> None:
    for outcomes in ranks.run(refuse_without_group, 2):
        for outcome in outcomes[:2]:
            assert outcome.error == "ValueError"
            assert outcome.message.startswith(AMSGRAD)
        for outcome in outcomes[2:]:
            assert outcome.error == "RuntimeError"
            assert "torch.distributed.init_process_group()" in outcome.message


def refuse_on_one(rank: int, world_size: int) -> list[Outcome]:
    """Rank 1 alone has a mistake; ranks 0 and 2 would wait for it for ever."""
    here = rank == 1
    model = Weights([(3,), (4,)])
    third = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64 if here else torch.float32))
    wrong: list[dict[str, Any]] = [
        {"lr": -1.0},
        {"num_threads": 0},
        {"reduce_dtype": torch.float16},
        {"max_grad_norm": -1.0},
        {"amsgrad": True},
        {"accumulate": "disk"},
        {"gradient_reduction": "nobody"},
    ]
    outcomes = [
        refused(
            model,
            partial(OffloadAdam, model.parameters(), module=model, **(options if here else {})),
        )
        for options in wrong
    ]
    outcomes.append(refused(model, lambda: OffloadAdam([*model.all, third], module=model)))
    optimizer = OffloadAdam([model.w0], gradient_reduction="optimizer")
    group = {"params": [model.w1], "betas": (0.9, 1.5 if here else 0.99)}
    outcomes.append(outcome_of(lambda: optimizer.add_param_group(group)))
    assert len(optimizer.param_groups) == 1
    # The optimizer is as it was before.
    optimizer.add_param_group({"params": [model.w1]})
    optimizer.close()
    return outcomes


def test_a_mistake_on_one_rank_is_an_error_on_all(ranks: RankPool) -> None:
    first, second, third = ranks.run(refuse_on_one, 3, timeout=30.0)
    assert first == third
    for elsewhere, here in zip(first, second, strict=True):
        assert here.error in ("ValueError", "TypeError")
        assert elsewhere.error == "PeerError"
        phase = elsewhere.message.split(":")[0]
        assert phase in (
            "rank(s) [1] failed in construction",
            "rank(s) [1] failed in add_param_group",
        )
        assert here.message[:300] in elsewhere.message


def make_different_models(rank: int, world_size: int) -> list[Outcome]:
    odd = rank == 2
    plain = Weights([(3, 2), (4,)])

    def make(params: Any, **options: Any) -> Outcome:
        return refused(
            plain, lambda: OffloadAdam(params, gradient_reduction="optimizer", **options)
        )

    named = list(plain.named_parameters())
    renamed = [("w0", plain.w0), ("other" if odd else "w1", plain.w1)]
    shaped = Weights([(2, 3) if odd else (3, 2), (4,)]).named_parameters()
    typed = Weights([(3,)], torch.bfloat16 if odd else torch.float32).named_parameters()
    frozen = Weights([(3, 2), (4,)])
    frozen.w1.requires_grad_(not odd)
    split = [{"params": [named[0]]}, {"params": [named[1]]}]
    joined = [{"params": named}]
    return [
        make(renamed),
        make(shaped),
        make(typed),
        make(list(reversed(named)) if odd else named),
        make(frozen.named_parameters()),
        make(split if odd else joined),
        make(named, lr=1e-2 if odd else 1e-3),
        make(named, max_grad_norm=1.0 if odd else None),
        make(named, reduce_dtype=torch.float32 if odd else None),
    ]


def test_ranks_with_different_models_are_told_the_first_difference(ranks: RankPool) -> None:
    first, second, third = ranks.run(make_different_models, 3, timeout=30.0)
    assert first == second == third
    expected = [
        ("'other (4,)", "'w1 (4,)"),
        ("'w0 (2, 3)", "'w0 (3, 2)"),
        ("'w0 (3,) torch.bfloat16", "'w0 (3,) torch.float32"),
        ("'w1 (4,)", "'w0 (3, 2)"),
        ("nothing", "'w1 (4,)"),
        ("'group ", "'w0 (3, 2)"),
        ("lr=0.01", "lr=0.001"),
        ("max_grad_norm=1.0", "max_grad_norm=None"),
        ("reduce_dtype=torch.float32", "reduce_dtype=None"),
    ]
    for outcome, (found, wanted) in zip(first, expected, strict=True):
        assert outcome.error == "RankDisagreementError"
        assert outcome.message.startswith("rank(s) [2] have another optimizer than rank 0: ")
        there, here = outcome.message.split(" where rank 0 has ")
        assert found in there
        assert wanted in here


def make_outside_of_the_group(rank: int, world_size: int) -> Outcome:
    alone = dist.new_group([0])
    model = Weights([(3,)])
    outcome = outcome_of(lambda: OffloadAdam(model.parameters(), process_group=alone).close())
    dist.barrier()
    return outcome


def test_a_rank_outside_of_the_given_group_is_told_so(ranks: RankPool) -> None:
    inside, outside = ranks.run(make_outside_of_the_group, 2)
    assert inside == Outcome("", "")
    assert outside.error == "ValueError"
    assert "rank 1 is not in process_group" in outside.message


def start_from_different_weights(
    rank: int, world_size: int, dtype: torch.dtype
) -> tuple[list[bytes], list[bytes], list[bytes]]:
    model = Weights([(7, 19), (300,), (1,), ()], dtype, seed=rank)
    mine = bits(model.all)
    optimizer = OffloadAdam(
        model.parameters(), gradient_reduction="optimizer", bucket_nbytes=512, num_threads=1
    )
    full = optimizer.full_state_dict()
    masters = [] if rank else list(full["offload_adam"]["master_weight"].values())
    optimizer.close()
    return mine, bits(model.all), bits([master.to(dtype) for master in masters])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rank_0s_weights_become_every_ranks(ranks: RankPool, dtype: torch.dtype) -> None:
    results = ranks.run(start_from_different_weights, 3, dtype)
    given = results[0][0]
    assert results[1][0] != given
    for _, taken, _ in results:
        assert taken == given
    assert results[0][2] == ([] if dtype == torch.float32 else given)
