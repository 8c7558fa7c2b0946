"""Models that are wrapped in DDP, cast or unfrozen after the optimizer was constructed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from offload_adam import FailurePolicy, OffloadAdam
from tests.support.ranks import RankPool

LR = 1e-2
EPS = 1e-2  # see test_ddp


def make_model() -> torch.nn.Sequential:
    torch.manual_seed(5)
    return torch.nn.Sequential(torch.nn.Linear(6, 40), torch.nn.Tanh(), torch.nn.Linear(40, 2))


def batch_of(rank: int, step: int) -> torch.Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * step + rank))


def step_once(model: torch.nn.Module, optimizer: Any, rank: int, step: int) -> None:
    dtype = next(model.parameters()).dtype
    model(batch_of(rank, step).to(dtype)).float().square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def oracle(world_size: int, unfreeze_at: int | None, steps: int) -> list[torch.Tensor]:
    """Train one float64 model on the batches of all ranks with torch's Adam."""
    model = make_model().double()
    model[0].requires_grad_(unfreeze_at is None)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, eps=EPS, foreach=False)
    for step in range(steps):
        if step == unfreeze_at:
            model[0].requires_grad_(True)
        for rank in range(world_size):
            loss = model(batch_of(rank, step).double()).square().mean() / world_size
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach() for parameter in model.parameters()]


def distance(model: torch.nn.Module, expected: list[torch.Tensor]) -> float:
    pairs = zip(model.parameters(), expected, strict=True)
    return max(float((one.double() - other).abs().max()) for one, other in pairs)


def train_without_saying_who_averages(
    rank: int, world_size: int, wraps: str, streams: bool
) -> tuple[float, bool]:
    model = make_model()
    wrapped: torch.nn.Module = DistributedDataParallel(model) if wraps == "before" else model
    optimizer = OffloadAdam(
        model.parameters(), lr=LR, eps=EPS, module=model if streams else None, num_threads=1
    )
    if wraps == "after":
        wrapped = DistributedDataParallel(model)
    for step in range(3):
        step_once(wrapped, optimizer, rank, step)
    averages = optimizer._execution.policy.reduces
    result = distance(model, oracle(world_size, None, 3))
    optimizer.close()
    return result, averages


@pytest.mark.parametrize(("world_size", "streams"), [(2, False), (2, True), (1, True)])
@pytest.mark.parametrize("wraps", ["before", "after", "never"])
def test_who_averages_is_found_out(
    ranks: RankPool, wraps: str, world_size: int, streams: bool
) -> None:
    results = ranks.run(train_without_saying_who_averages, world_size, wraps, streams)
    for error, averages in results:
        assert error < 1e-6
        assert averages == (wraps == "never")


def wrap_a_part(rank: int, world_size: int) -> str:
    model = make_model()
    head = DistributedDataParallel(model[2])
    optimizer = None
    try:
        optimizer = OffloadAdam(model.parameters())
    except ValueError as error:
        return str(error)
    finally:
        del head, optimizer
    return ""


def test_a_model_partly_in_ddp_is_rejected(ranks: RankPool) -> None:
    for message in ranks.run(wrap_a_part, 2):
        assert "DistributedDataParallel averages the gradients of 2 of 4 parameters" in message


def average_nothing(rank: int, world_size: int) -> list[str]:
    """Claim external averages, and average only from the second attempt on."""
    model = make_model()
    optimizer = OffloadAdam(
        model.named_parameters(), lr=LR, eps=EPS, gradient_reduction="external", num_threads=1
    )
    model(batch_of(rank, 0)).square().mean().backward()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    outcomes = []
    try:
        optimizer.step()
    except Exception as error:
        outcomes.append(f"{type(error).__name__}: {error}")
    pairs = zip(before, model.parameters(), strict=True)
    outcomes.append(str(all(torch.equal(one, other) for one, other in pairs)))
    for parameter in model.parameters():
        torch.distributed.all_reduce(parameter.grad)
        assert parameter.grad is not None
        parameter.grad /= world_size
    optimizer.step()
    outcomes.append(str(distance(model, oracle(world_size, None, 1)) < 1e-6))
    optimizer.close()
    return outcomes


def test_gradients_that_nobody_averaged_are_rejected_before_the_first_update(
    ranks: RankPool,
) -> None:
    for error, unchanged, trains in ranks.run(average_nothing, 2):
        assert error.startswith("RankDisagreementError: The gradient of parameter '0.weight'")
        assert unchanged == trains == "True"


def cast_after(rank: int, world_size: int, streams: bool) -> list[bool]:
    model, expected = make_model(), make_model().to(torch.bfloat16)
    options: dict[str, Any] = {"lr": LR, "gradient_reduction": "optimizer", "num_threads": 1}
    optimizer = OffloadAdam(model.parameters(), **options, module=model if streams else None)
    model.to(torch.bfloat16)
    reference = OffloadAdam(expected.parameters(), **options)
    for step in range(3):
        step_once(model, optimizer, rank, step)
        step_once(expected, reference, rank, step)
    pairs = zip(model.parameters(), expected.parameters(), strict=True)
    same = [torch.equal(one, other) for one, other in pairs]
    optimizer.close()
    reference.close()
    return same


@pytest.mark.parametrize("streams", [False, True])
def test_a_model_cast_before_the_first_step_trains_as_if_cast_before(
    ranks: RankPool, streams: bool
) -> None:
    assert ranks.run(cast_after, 2, streams) == [[True] * 4] * 2


def cast_on_one(rank: int, world_size: int) -> str:
    model = make_model()
    optimizer = OffloadAdam(model.named_parameters(), gradient_reduction="optimizer")
    if rank == 1:
        model.to(torch.bfloat16)
    try:
        step_once(model, optimizer, rank, 0)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_a_model_cast_on_one_rank_alone_is_rejected_on_all(ranks: RankPool) -> None:
    for message in ranks.run(cast_on_one, 2):
        assert message.startswith("RankDisagreementError: Rank(s) [1] have a different optimizer")
        assert "the dtype of '0.weight' is torch.bfloat16" in message


def cast_on_one_while_streaming(rank: int, world_size: int) -> str:
    model = make_model()
    optimizer = OffloadAdam(
        model.named_parameters(), module=model, failures=FailurePolicy(stuck_after=3.0)
    )
    if rank == 1:
        model.to(torch.bfloat16)
    try:
        step_once(model, optimizer, rank, 0)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_a_model_cast_on_one_rank_alone_while_streaming_ends_in_bounded_time(
    own_ranks: RankPool,
) -> None:
    for message in own_ranks.run(cast_on_one_while_streaming, 2, timeout=40.0):
        assert message.startswith("PeerFailedError")


def replace_on_one(rank: int, world_size: int, differs: bool) -> str:
    model = make_model()
    optimizer = OffloadAdam(model.named_parameters(), gradient_reduction="optimizer")
    step_once(model, optimizer, rank, 0)
    if rank == 1:
        weight = model.get_parameter("0.weight")
        weight.data = weight.data * (2.0 if differs else 1.0)
    try:
        step_once(model, optimizer, rank, 1)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_data_replaced_on_one_rank_alone_must_have_the_same_values(ranks: RankPool) -> None:
    for message in ranks.run(replace_on_one, 2, True):
        assert message.startswith("RankDisagreementError: Parameters were modified outside")
        assert "rank(s) [1]" in message
    assert ranks.run(replace_on_one, 2, False) == ["", ""]


def load_then_move(rank: int, world_size: int, cast: bool) -> tuple[str, float]:
    model = make_model()
    trained = OffloadAdam(
        model.parameters(), lr=LR, eps=EPS, gradient_reduction="optimizer", num_threads=1
    )
    for step in range(2):
        step_once(model, trained, rank, step)
    saved = trained.local_state_dict()
    again = make_model()
    again.load_state_dict(model.state_dict())
    trained.close()
    optimizer = OffloadAdam(again.parameters(), lr=LR, eps=EPS, num_threads=1)
    optimizer.load_state_dict(saved)
    wrapped: torch.nn.Module = again
    if cast:
        again.get_submodule("2").to(torch.bfloat16)
    else:
        wrapped = DistributedDataParallel(again)
    try:
        if cast:
            optimizer.step()
        for step in range(2, 4):
            step_once(wrapped, optimizer, rank, step)
    except Exception as error:
        return f"{type(error).__name__}: {error}", 0.0
    result = distance(again, oracle(world_size, None, 4))
    optimizer.close()
    return "", result


def test_loaded_state_is_kept_when_the_model_is_wrapped(ranks: RankPool) -> None:
    for message, error in ranks.run(load_then_move, 2, False):
        assert message == ""
        assert error < 1e-6


def test_loaded_state_whose_ranges_would_change_is_rejected(ranks: RankPool) -> None:
    for message, _ in ranks.run(load_then_move, 2, True):
        assert message.startswith("ValueError: The model was moved or cast after optimizer state")


def unfreeze(
    rank: int, world_size: int, streams: bool, overlap: bool, only_on_one: bool
) -> tuple[float, int]:
    model = make_model()
    model[0].requires_grad_(False)
    optimizer = OffloadAdam(
        model.parameters(),
        lr=LR,
        eps=EPS,
        module=model if streams else None,
        overlap=overlap,
        gradient_reduction="optimizer",
        num_threads=1,
    )
    step_once(model, optimizer, rank, 0)
    model[0].requires_grad_(True)
    for step in range(1, 4):
        if only_on_one:
            # The other rank does not use the layer, so it has no gradient of it.
            inputs = batch_of(0, step)
            hidden = model[0](inputs) if rank == 0 else model[0](inputs).detach()
            (model[2](model[1](hidden)).square().mean() * (2.0 if rank == 0 else 0.0)).backward()
            optimizer.step()
            optimizer.zero_grad()
        else:
            step_once(model, optimizer, rank, step)
    optimizer.synchronize()
    if only_on_one:
        expected = make_model().double()
        torchs = torch.optim.Adam(expected.parameters(), lr=LR, eps=EPS, foreach=False)
        expected[0].requires_grad_(False)
        for step in range(4):
            expected[0].requires_grad_(step > 0)
            for other in range(world_size):
                batch = batch_of(0 if step > 0 else other, step).double()
                (expected(batch).square().mean() / world_size).backward()
            torchs.step()
            torchs.zero_grad()
        result = distance(model, [parameter.detach() for parameter in expected.parameters()])
    else:
        result = distance(model, oracle(world_size, 1, 4))
    whole = optimizer.full_state_dict()
    count = len(whole["state"]) if rank == 0 else 4
    optimizer.close()
    return result, count


@pytest.mark.parametrize("only_on_one", [False, True])
@pytest.mark.parametrize(
    ("streams", "overlap"), [(False, False), (True, False), (True, True)], ids=str
)
def test_an_unfrozen_layer_is_trained_on_all_ranks(
    ranks: RankPool, streams: bool, overlap: bool, only_on_one: bool
) -> None:
    for error, count in ranks.run(unfreeze, 2, streams, overlap, only_on_one):
        assert error < 1e-6
        assert count == 4


def unfreeze_in_ddp(rank: int, world_size: int, wraps_again: bool) -> tuple[str, float]:
    model = make_model()
    model[0].requires_grad_(False)
    wrapped = DistributedDataParallel(model)
    optimizer = OffloadAdam(model.named_parameters(), lr=LR, eps=EPS, num_threads=1)
    step_once(wrapped, optimizer, rank, 0)
    model[0].requires_grad_(True)
    if wraps_again:
        wrapped = DistributedDataParallel(model)
    try:
        for step in range(1, 4):
            step_once(wrapped, optimizer, rank, step)
    except Exception as error:
        return f"{type(error).__name__}: {error}", 0.0
    result = distance(model, oracle(world_size, 1, 4))
    optimizer.close()
    return "", result


@pytest.mark.parametrize("wraps_again", [False, True])
def test_a_layer_unfrozen_after_ddp_was_made_is_trained_only_if_ddp_averages_it(
    ranks: RankPool, wraps_again: bool
) -> None:
    for message, error in ranks.run(unfreeze_in_ddp, 2, wraps_again):
        if wraps_again:
            assert message == ""
            assert error < 1e-6
        else:
            assert message.startswith("RankDisagreementError: The gradient of parameter '0.weight'")
            assert "again, if parameters were unfrozen" in message


def unfreeze_on_one(rank: int, world_size: int) -> str:
    model = make_model()
    model[0].requires_grad_(False)
    optimizer = OffloadAdam(model.named_parameters(), gradient_reduction="optimizer")
    model[0].requires_grad_(rank == 1)
    try:
        step_once(model, optimizer, rank, 0)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_a_layer_unfrozen_on_one_rank_alone_is_rejected_on_all(ranks: RankPool) -> None:
    for message in ranks.run(unfreeze_on_one, 2):
        assert message.startswith("RankDisagreementError: Rank(s) [1] have a different optimizer")
        assert "the number of trainable parameters is 2, but 0 on rank 0" in message


def ignore_in_ddp(rank: int, world_size: int, ignores: bool) -> str:
    model: Any = make_model()
    if ignores:
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["0.weight"])
    wrapped = DistributedDataParallel(model)
    try:
        OffloadAdam(model.named_parameters()).close()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    assert wrapped is not None
    return ""


@pytest.mark.parametrize("ignores", [False, True])
def test_parameters_that_ddp_ignores_are_not_averaged(ranks: RankPool, ignores: bool) -> None:
    for message in ranks.run(ignore_in_ddp, 2, ignores):
        if ignores:
            assert message.startswith("ValueError: DistributedDataParallel averages the gradients")
            assert "of 3 of 4 parameters, but not of one of shape (40, 6)" in message
        else:
            assert message == ""
