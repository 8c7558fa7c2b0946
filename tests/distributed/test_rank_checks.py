"""Construction: every rank constructs the same optimizer, or every rank raises an error."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from offload_adam import OffloadAdam, OffloadPolicy
from tests.support.ranks import RankPool
from tests.support.reference import Outcome, Weights, bits, outcome_of

AMSGRAD = "amsgrad=True is not supported in distributed training (world size > 1)"


def refused(model: torch.nn.Module, make: Callable[[], OffloadAdam]) -> Outcome:
    """Construct an optimizer that is rejected; check that nothing was allocated or moved for it."""
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    with patch("offload_adam.memory.arena.mmap.mmap", side_effect=AssertionError("allocated")):
        outcome = outcome_of(make)
    assert [parameter.data_ptr() for parameter in model.parameters()] == addresses
    return outcome


def reject_everywhere(rank: int, world_size: int) -> list[Outcome]:
    model = Weights([(3, 2), (2,)])
    last = {"params": [model.w1], "amsgrad": True}
    attempts: list[tuple[Any, dict[str, Any]]] = [
        (model.parameters(), {"amsgrad": True, "gradient_reduction": "optimizer"}),
        (model.parameters(), {"amsgrad": True, "module": model}),
        ([{"params": [model.w0]}, last], {"gradient_reduction": "optimizer"}),
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


def test_amsgrad_is_rejected_before_anything_is_allocated(
    ranks: RankPool,
) -> None:
    for outcomes in ranks.run(reject_everywhere, 2):
        assert len(outcomes) == 4
        for outcome in outcomes:
            assert outcome.error == "ValueError"
            assert outcome.message.startswith(AMSGRAD)


def reject_without_group(rank: int, world_size: int) -> list[Outcome]:
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
    for outcomes in ranks.run(reject_without_group, 2):
        for outcome in outcomes[:2]:
            assert outcome.error == "ValueError"
            assert outcome.message.startswith(AMSGRAD)
        for outcome in outcomes[2:]:
            assert outcome.error == "RuntimeError"
            assert "torch.distributed.init_process_group()" in outcome.message


def reject_on_one(rank: int, world_size: int) -> list[Outcome]:
    """Make a mistake on rank 1 only, for which ranks 0 and 2 must not wait forever."""
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
    first, second, third = ranks.run(reject_on_one, 3)
    assert first == second == third
    problems = [
        "lr must be finite and at least 0, not -1.0",
        "num_threads must be at least 1, not 0",
        "reduce_dtype must be torch.float32 or None",
        "max_grad_norm must be above 0",
        AMSGRAD,
        "accumulate must be one of 'auto', 'host', 'error', None, not 'disk'",
        "gradient_reduction must be 'optimizer' or 'external', not 'nobody'",
        "Parameter",
        "betas[1] must lie in [0, 1), not 1.5",
    ]
    for outcome, problem in zip(first, problems, strict=True):
        assert outcome.error in ("ValueError", "TypeError")
        phase, _, message = outcome.message.partition(": ")
        assert phase in (
            "Rank(s) [1] failed in construction",
            "Rank(s) [1] failed in add_param_group",
        )
        assert message.startswith(problem)


def fail_alone(rank: int, world_size: int) -> Outcome:
    """Raise an error on rank 1 that no argument causes."""
    model = Weights([(3,)])
    broken = OSError("no space") if rank == 1 else None
    with patch("offload_adam.step.build.HostArena", side_effect=broken, return_value=None):
        return outcome_of(lambda: OffloadAdam(model.parameters(), gradient_reduction="optimizer"))


def test_an_error_that_no_argument_causes_keeps_its_type_on_its_rank(ranks: RankPool) -> None:
    first, second, third = ranks.run(fail_alone, 3)
    assert first == third
    assert second == Outcome("OSError", "no space")
    assert first.error == "PeerError"
    assert first.message == "Rank(s) [1] failed in allocating its state: OSError: no space"


def make_different_models(rank: int, world_size: int) -> list[Outcome]:
    odd = rank == 2
    plain = Weights([(3, 2), (4,)])

    def make(params: Any, **options: Any) -> Outcome:
        return refused(
            plain, lambda: OffloadAdam(params, gradient_reduction="optimizer", **options)
        )

    def with_version(version: str) -> Outcome:
        with patch.object(torch, "__version__", version):
            return make(plain.named_parameters())

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
        with_version("1.0" if odd else torch.__version__),
    ]


def test_an_error_about_different_models_quotes_the_first_difference(ranks: RankPool) -> None:
    first, second, third = ranks.run(make_different_models, 3)
    assert first == second == third
    expected = [
        "the name of parameter 1 is other, but w1 on rank 0",
        "the shape of 'w0' is (2, 3), but (3, 2) on rank 0",
        "the dtype of 'w0' is torch.bfloat16, but torch.float32 on rank 0",
        "the name of parameter 0 is w1, but w0 on rank 0",
        "the number of trainable parameters is 1, but 2 on rank 0",
        "the number of parameter groups is 2, but 1 on rank 0",
        "lr of group 0 is 0.01, but 0.001 on rank 0",
        "max_grad_norm is 1.0, but None on rank 0",
        "reduce_dtype is torch.float32, but None on rank 0",
        f"the version of torch is 1.0, but {torch.__version__} on rank 0",
    ]
    for outcome, difference in zip(first, expected, strict=True):
        assert outcome.error == "RankDisagreementError"
        assert outcome.message == (
            f"Rank(s) [2] have a different optimizer than rank 0: {difference}."
        )


def differ_each_in_its_way(rank: int, world_size: int) -> Outcome:
    model = Weights([(3 + rank // 2,)])
    lr = 1e-2 if rank == 1 else 1e-3
    return refused(
        model, lambda: OffloadAdam(model.parameters(), lr=lr, gradient_reduction="optimizer")
    )


def test_the_error_quotes_the_difference_of_each_rank(ranks: RankPool) -> None:
    first, *others = ranks.run(differ_each_in_its_way, 4)
    assert all(other == first for other in others)
    name = "\"param_groups[0]['params'][0]\""
    assert first.message == (
        "Rank(s) [1] have a different optimizer than rank 0: lr of group 0 is 0.01, but 0.001 "
        "on rank 0. Rank(s) [2, 3] have a different optimizer than rank 0: the shape of "
        f"{name} is (4,), but (3,) on rank 0."
    )


def make_outside_of_the_group(rank: int, world_size: int) -> Outcome:
    alone = dist.new_group([0])
    model = Weights([(3,)])
    outcome = outcome_of(lambda: OffloadAdam(model.parameters(), process_group=alone).close())
    dist.barrier()
    return outcome


def test_a_rank_outside_the_given_group_raises_an_error(ranks: RankPool) -> None:
    inside, outside = ranks.run(make_outside_of_the_group, 2)
    assert inside == Outcome("", "")
    assert outside.error == "ValueError"
    assert "Rank 1 is not in process_group" in outside.message


def start_from_different_weights(
    rank: int, world_size: int, dtype: torch.dtype
) -> tuple[list[bytes], list[bytes], list[bytes]]:
    model = Weights([(7, 19), (300,), (1,), ()], dtype, seed=rank)
    mine = bits(model.all)
    optimizer = OffloadAdam(
        model.parameters(),
        gradient_reduction="optimizer",
        offload=OffloadPolicy(bucket_nbytes=512),
        num_threads=1,
    )
    full = optimizer.full_state_dict()
    masters = [] if rank else list(full["offload_adam"]["master_weight"].values())
    optimizer.close()
    return mine, bits(model.all), bits([master.to(dtype) for master in masters])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_weights_of_rank_0_are_broadcast(ranks: RankPool, dtype: torch.dtype) -> None:
    results = ranks.run(start_from_different_weights, 3, dtype)
    given = results[0][0]
    assert results[1][0] != given
    for _, taken, _ in results:
        assert taken == given
    assert results[0][2] == ([] if dtype == torch.float32 else given)


def refuse_fsdp1(rank: int, world_size: int, wraps: bool) -> list[Outcome]:
    from torch.distributed.fsdp import FullyShardedDataParallel

    outcomes = []
    for keeps_parameters in (False, True):
        torch.manual_seed(0)
        # Two equal layers: the ranks' parts are of equal size.
        model = FullyShardedDataParallel(
            torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)),
            use_orig_params=keeps_parameters,
            device_id=torch.device("cpu"),
        )
        before = bits(list(model.parameters()))
        options: dict[str, Any] = (
            {"module": model} if wraps else {"gradient_reduction": "optimizer"}
        )
        outcomes.append(refused(model, partial(OffloadAdam, model.parameters(), **options)))
        assert bits(list(model.parameters())) == before
    return outcomes


@pytest.mark.parametrize("wraps", [False, True])
def test_shards_of_fsdp1_are_rejected(ranks: RankPool, wraps: bool) -> None:
    for outcomes in ranks.run(refuse_fsdp1, 2, wraps):
        for outcome in outcomes:
            assert outcome.error == "TypeError"
            assert "belongs to FSDP1 (FullyShardedDataParallel)" in outcome.message
            assert "DistributedDataParallel" in outcome.message
