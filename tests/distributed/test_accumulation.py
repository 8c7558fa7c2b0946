"""Several backwards in one step, and the dtype in which ranks' gradients are added."""

from __future__ import annotations

from typing import Any

import torch

from offload_adam import OffloadAdam, OffloadPolicy
from tests.support.ranks import RankPool
from tests.support.reference import Outcome, Weights, outcome_of

SHAPES: list[tuple[int, ...]] = [(150,), (3, 7)]


def make(model: Weights, **options: Any) -> OffloadAdam:
    """Make an optimizer whose exp_avg is the mean gradient itself."""
    return OffloadAdam(
        model.named_parameters(),
        betas=(0.0, 0.9),
        gradient_reduction="optimizer",
        offload=OffloadPolicy(bucket_nbytes=512),
        num_threads=1,
        **options,
    )


def filled(model: Weights, value: float) -> list[torch.Tensor]:
    return [torch.full_like(weight, value) for weight in model.all]


def values_in(optimizer: OffloadAdam) -> list[float]:
    """Return the values of the mean gradient that the last step used, on rank 0; collective."""
    full = optimizer.full_state_dict()
    return sorted(
        {v for e in full.get("state", {}).values() for v in e["exp_avg"].unique().tolist()}
    )


def run_a_second_backward(rank: int, world_size: int) -> tuple[Outcome, list[float]]:
    model = Weights(SHAPES)
    optimizer = make(model, module=model, accumulate="error")
    model(filled(model, 1.0)).backward()
    outcome = outcome_of(model(filled(model, 1.0)).backward)
    optimizer.zero_grad()
    model(filled(model, 2.0 * rank)).backward()
    optimizer.step()
    result = outcome, values_in(optimizer)
    optimizer.close()
    return result


def test_a_second_reduced_backward_with_accumulate_error_names_both_remedies(
    ranks: RankPool,
) -> None:
    results = ranks.run(run_a_second_backward, 2)
    for outcome, _ in results:
        assert outcome.error == "ValueError"
        assert "has already been reduced in this step" in outcome.message
        assert "no_sync()" in outcome.message
        assert "accumulate='auto'" in outcome.message
    assert results[0][1] == [1.0]


def add_small_to_large(rank: int, world_size: int) -> tuple[list[float], list[float]]:
    """Add 1 to 256 three times over: bf16 has no 257, and in it 256 + 1 + 1 + 1 is 256."""
    model = Weights(SHAPES, torch.bfloat16)
    on_host = make(model, module=model, accumulate="host")
    for value in (256.0, 1.0, 1.0, 1.0):
        model(filled(model, value)).backward()
    on_host.step()
    exact = values_in(on_host)
    on_host.close()

    model = Weights(SHAPES, torch.bfloat16)
    in_grad = make(model, module=model)
    with in_grad.no_sync():
        for value in (256.0, 1.0, 1.0):
            model(filled(model, value)).backward()
    model(filled(model, 1.0)).backward()
    in_grad.step()
    rounded = values_in(in_grad)
    in_grad.close()
    return exact, rounded


def test_the_host_adds_in_fp32_what_bf16_would_lose(ranks: RankPool) -> None:
    assert ranks.run(add_small_to_large, 2)[0] == ([259.0], [256.0])


def average(rank: int, world_size: int, streams: bool) -> dict[str, list[float]]:
    found = {}

    def one(name: str, dtype: torch.dtype, value: float, **options: Any) -> None:
        model = Weights(SHAPES, dtype)
        optimizer = make(model, module=model if streams else None, **options)
        model(filled(model, value)).backward()
        optimizer.step()
        assert optimizer.last_step is not None
        assert not optimizer.last_step.skipped
        found[name] = values_in(optimizer)
        optimizer.close()

    large_or_small = 256.0 if rank == 0 else 1.0
    one("bf16", torch.bfloat16, large_or_small)
    one("bf16 in fp32", torch.bfloat16, large_or_small, reduce_dtype=torch.float32)
    # A third of the largest number, 65504, is rounded up, so that three of them overflow.
    one("fp16", torch.float16, 65504.0 if world_size == 2 else 64992.0)
    one("fp16 in fp32", torch.float16, 65504.0 if rank == 0 else 1.0, reduce_dtype=torch.float32)
    one("fp32", torch.float32, large_or_small)
    return found


def test_reducing_in_fp32_is_exact_and_fp16_does_not_overflow(ranks: RankPool) -> None:
    for streams in (False, True):
        assert ranks.run(average, 2, streams)[0] == {
            "bf16": [128.0],
            "bf16 in fp32": [128.5],
            "fp16": [65504.0],
            "fp16 in fp32": [32752.5],
            "fp32": [128.5],
        }
        # 256 + 1 + 1 is exact in fp32, and its third is not.
        third = ranks.run(average, 3, streams)[0]
        assert third["bf16 in fp32"] == [float(torch.tensor(258.0) / 3)]
        assert third["fp16"] == [64992.0]
