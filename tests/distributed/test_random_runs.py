"""Random runs: several ranks give the same bits as a world of one with the mean gradients.

Ranks run different numbers of backwards over different parameters in different orders, and set some
gradients by hand. Gradients are few-bit numbers, so that their sums and means are exact.
"""

from __future__ import annotations

import math
import random
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

from offload_adam import OffloadAdam, OffloadPolicy
from tests.support.ranks import RankPool
from tests.support.reference import Weights, bits, mean_of
from tests.support.scenario import Offloading

SHAPES: list[tuple[int, ...]] = [
    (150,),
    (3, 40),
    (),
    (0, 4),
    (260,),
    (128,),
    (1,),
    (64, 3),
    (513,),
]
NUM_AT_FIRST = 5
NUM_STEPS = 6

Gradients = list[torch.Tensor | None]


class Options(NamedTuple):
    """What one run is made with."""

    way: str
    dtype: torch.dtype
    bucket_nbytes: int
    max_grad_norm: float | None
    reduce_dtype: torch.dtype | None
    offloads: bool

    @classmethod
    def of(cls, seed: int) -> Options:
        """Draw the options of a seed; the ways take turns."""
        draw = random.Random(seed)
        return cls(
            ("drop_in", "streaming", "no_sync", "accumulate")[seed % 4],
            draw.choice([torch.float32, torch.bfloat16, torch.float16]),
            draw.choice([256, 1024, 4096, 1 << 20]),
            draw.choice([None, 0.5]),
            draw.choice([None, torch.float32]),
            draw.choice([False, True]),
        )


class RankStep(NamedTuple):
    """One rank's part of a step: the gradients and the order of each backward, and what is set."""

    backwards: list[tuple[Gradients, list[int]]]
    by_hand: Gradients


def draw_rank_step(place: str, num_parameters: int, options: Options, world_size: int) -> RankStep:
    """Draw what one rank does; `place` is its seed, so that every rank knows what all do."""
    draw = random.Random(place)

    def gradient(shape: tuple[int, ...]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(draw.randrange(1 << 30))
        few_bits = torch.randint(-4, 5, shape, generator=generator)
        return (few_bits * world_size / 64).to(options.dtype)

    backwards = []
    used: set[int] = set()
    for _ in range(draw.choice([0, 1, 1, 1] if options.way == "streaming" else [0, 1, 1, 2])):
        order = draw.sample(range(num_parameters), num_parameters)
        here = set(order[draw.choice([0, 0, 2, num_parameters]) :])
        used |= here
        given = [gradient(s) if p in here else None for p, s in enumerate(SHAPES)]
        backwards.append((given, order))
    sets = draw.random() < 0.3
    late = {p for p in range(num_parameters) if sets and p not in used and draw.random() < 0.5}
    by_hand = [gradient(shape) if p in late else None for p, shape in enumerate(SHAPES)]
    return RankStep(backwards, by_hand)


def total_of(part: RankStep) -> Gradients:
    """Return the sum of all that one rank has for each parameter."""
    rows = zip(*(given for given, _ in part.backwards), part.by_hand, strict=True)
    present = [[gradient for gradient in row if gradient is not None] for row in rows]
    return [torch.stack(grads).double().sum(0) if grads else None for grads in present]


def carry_out(part: RankStep, model: Weights, optimizer: OffloadAdam, way: str) -> None:
    """Run this rank's backwards, and set what is to be set."""
    for number, (given, order) in enumerate(part.backwards):
        keeps = way == "no_sync" and number + 1 < len(part.backwards)
        with optimizer.no_sync() if keeps else nullcontext():
            loss = model(given, order)
            if loss.requires_grad:
                loss.backward()
    for parameter, gradient in zip(model.all, part.by_hand, strict=True):
        if gradient is not None:
            parameter.grad = gradient


def make_pair(
    apart: Weights, together: Weights, options: Options, rank: int, world_size: int
) -> tuple[OffloadAdam, OffloadAdam]:
    """Make the optimizer that all ranks share, and one that this rank has to itself."""
    alone = [dist.new_group([other]) for other in range(world_size)][rank]
    maker = Offloading if options.offloads else OffloadAdam
    given: dict[str, Any] = {
        "lr": 1e-2,
        "weight_decay": 0.1,
        "max_grad_norm": options.max_grad_norm,
        "offload": OffloadPolicy(bucket_nbytes=options.bucket_nbytes),
        "num_threads": 1,
        "overlap": None,
    }
    shared = maker(
        apart.all[:NUM_AT_FIRST],
        module=None if options.way == "drop_in" else apart,
        gradient_reduction="optimizer",
        reduce_dtype=options.reduce_dtype,
        accumulate="host" if options.way == "accumulate" else None,
        **given,
    )
    own = maker(
        together.all[:NUM_AT_FIRST], process_group=alone, gradient_reduction="external", **given
    )
    return shared, own


def change_both(draw: random.Random, models: list[Weights], optimizers: list[OffloadAdam]) -> None:
    """Perhaps change weights, learning rates or groups, alike for both."""
    event = draw.choice(["nothing", "clamp", "lr", "groups"])
    for model, optimizer in zip(models, optimizers, strict=True):
        if event == "clamp":
            with torch.no_grad():
                for parameter in model.all[:NUM_AT_FIRST]:
                    parameter.clamp_(-0.7, 0.7)
        elif event == "lr":
            optimizer.param_groups[0]["lr"] *= 0.5
        elif event == "groups" and len(optimizer.param_groups) == 1:
            optimizer.add_param_group({"params": model.all[NUM_AT_FIRST:], "lr": 3e-2})


def run_beside_a_world_of_one(rank: int, world_size: int, seed: int) -> int:
    """Train both ways, hold every bit of one to the other, and return how many steps were taken."""
    options = Options.of(seed)
    apart, together = Weights(SHAPES, options.dtype), Weights(SHAPES, options.dtype)
    shared, own = make_pair(apart, together, options, rank, world_size)
    for step in range(NUM_STEPS):
        draw = random.Random(f"{seed} {step}")
        change_both(draw, [apart, together], [shared, own])
        num_parameters = NUM_AT_FIRST if len(shared.param_groups) == 1 else len(SHAPES)
        parts = [
            draw_rank_step(f"{seed} {step} {other}", num_parameters, options, world_size)
            for other in range(world_size)
        ]
        if draw.random() < 0.15:
            _spoil(parts[draw.randrange(world_size)])
        carry_out(parts[rank], apart, shared, options.way)
        means = mean_of([total_of(part) for part in parts])
        for parameter, mean in zip(together.all, means, strict=True):
            parameter.grad = None if mean is None else mean.to(options.dtype)
        if draw.random() < 0.2:
            norms = [float(optimizer.clip_grad_norm_(0.3)) for optimizer in (shared, own)]
            assert norms[0] == norms[1] or all(map(math.isnan, norms))
        _step_alike(shared, own)
        assert bits(apart.all) == bits(together.all), (options, step)
    full, expected = shared.full_state_dict(), own.full_state_dict()
    for packed, entry in full.get("state", {}).items():
        for key, tensor in entry.items():
            assert torch.equal(tensor, expected["state"][packed][key]), (options, packed, key)
    shared.close()
    own.close()
    return NUM_STEPS - shared.skipped_steps


def _spoil(part: RankStep) -> None:
    """Put an infinity into one of a rank's gradients, if it has any."""
    for given in (*(given for given, _ in part.backwards), part.by_hand):
        for gradient in given:
            if gradient is not None and gradient.numel() > 0:
                gradient.view(-1)[-1] = math.inf
                return


def _step_alike(shared: OffloadAdam, own: OffloadAdam) -> None:
    """Step both, and compare what they report."""
    reports = []
    for optimizer in (shared, own):
        optimizer.step()
        optimizer.zero_grad()
        report = optimizer.last_step
        assert report is not None
        reports.append((report.skipped, report.num_updated, report.clip_factor))
    assert reports[0] == reports[1]
    shared.synchronize()  # a device's updates run on beside the next forward


@pytest.mark.parametrize("seed", range(8))
def test_random_runs_match_a_world_of_one(ranks: RankPool, seed: int) -> None:
    world_size = 2 + seed % 3
    num_taken = ranks.run(run_beside_a_world_of_one, world_size, seed)
    assert len(set(num_taken)) == 1
    assert num_taken[0] > 0


@pytest.mark.slow
def test_many_random_runs_match_a_world_of_one(ranks: RankPool) -> None:
    for seed in range(8, 68):
        ranks.run(run_beside_a_world_of_one, 2 + seed % 3, seed)
