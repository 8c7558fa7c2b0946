"""A run whose steps have one or several backwards, to compare the ways in which they add up."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch

from offload_adam import OffloadAdam, OffloadPolicy
from tests.support.devices import HOST_AS_DEVICE
from tests.support.reference import Weights, bits

SHAPES: list[tuple[int, ...]] = [(150,), (3, 7), (0, 2), (), (40, 9), (260,)]
MISSING = 5
"""The last parameter has no gradient in backwards with an even number."""


class Backward(NamedTuple):
    """One backward of a step.

    sync: outside `no_sync()`.
    spoiled: a gradient is infinite.
    drops: `zero_grad()` follows.
    """

    sync: bool = True
    spoiled: bool = False
    drops: bool = False


class Step(NamedTuple):
    """One step.

    backwards: in order.
    clips: call `clip_grad_norm_` with this norm before the step.
    torch_clips: call torch's function on the stand-ins.
    loss_scale: the gradients' factor, which the step divides out.
    """

    backwards: Sequence[Backward]
    clips: float | None = None
    torch_clips: float | None = None
    loss_scale: float = 1.0


TWO, THREE = [Backward()] * 2, [Backward()] * 3
STEPS = [
    Step(THREE),
    Step([Backward()]),
    Step([Backward(), Backward(spoiled=True), Backward()]),
    Step([Backward(sync=False), Backward(), Backward(sync=False), Backward()]),
    Step([Backward(), Backward(drops=True), *TWO], clips=0.5),
    Step(TWO, torch_clips=0.25),
    Step(TWO, loss_scale=64.0),
    Step([Backward()], clips=0.5),
    Step(THREE),
]


class Result(NamedTuple):
    """The bits of a run.

    weights: of each parameter.
    state: of each tensor in this rank's `optimizer.state`.
    steps: norm before clipping, clip factor, whether skipped, by step.
    bytes_taken: memory that was allocated for sums, on the host and on devices.
    """

    weights: list[bytes]
    state: list[bytes]
    steps: list[tuple[str, float, bool]]
    bytes_taken: int


def gradients(
    model: Weights, place: Sequence[int], backward: Backward, loss_scale: float
) -> list[torch.Tensor | None]:
    """Return random gradients with all bits of their dtype.

    Args:
        place: rank, step and backward.
    """
    seed = sum(part * 100**power for power, part in enumerate(place))
    generator = torch.Generator().manual_seed(seed)
    found: list[torch.Tensor | None] = []
    for position, weight in enumerate(model.all):
        values = torch.randn(weight.shape, generator=generator, dtype=torch.float32)
        if backward.spoiled and position == 4:
            values[7, 3] = torch.inf
        missing = position == MISSING and place[-1] % 2 == 0
        found.append(None if missing else (values * loss_scale).to(weight.dtype))
    return found


def make(
    model: Weights, *, on_device: bool, offload: dict[str, Any], **options: Any
) -> OffloadAdam:
    """Return an optimizer over the model in streaming mode, with several buckets."""

    class OnDevice(OffloadAdam):
        _backend = HOST_AS_DEVICE

    maker = OnDevice if on_device else OffloadAdam
    return maker(
        model.named_parameters(),
        lr=1e-2,
        weight_decay=0.1,
        module=model,
        gradient_reduction="optimizer",
        num_threads=1,
        offload=OffloadPolicy(**{"bucket_nbytes": 700, **offload}),
        **options,
    )


def train(
    rank: int,
    world_size: int,
    dtype: torch.dtype,
    options: dict[str, Any],
    *,
    steps: Sequence[Step] = STEPS,
    fewer_on_others: bool = False,
) -> Result:
    """Train and return the bits of the result.

    Args:
        options: of `make`.
        fewer_on_others: rank r leaves out the first r backwards of a step. Without overlap, where
            no forward waits for another rank, all ranks run a collective before `step()`.
    """
    model = Weights(SHAPES, dtype)
    optimizer = make(model, **{"on_device": False, "offload": {}, **options})
    reports = []
    for number, step in enumerate(steps):
        skipped = rank if fewer_on_others else 0
        for count, backward in enumerate(step.backwards[skipped:]):
            place = (rank + 1, number + 1, count)
            given = gradients(model, place, backward, step.loss_scale)
            with nullcontext() if backward.sync else optimizer.no_sync():
                model(given).backward()
            if backward.drops:
                optimizer.zero_grad()
        if fewer_on_others and not optimizer.overlaps:
            torch.distributed.all_reduce(torch.zeros((), dtype=torch.float32, device="cpu"))
        if step.clips is not None:
            optimizer.clip_grad_norm_(step.clips)
        if step.torch_clips is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), step.torch_clips)
        if step.loss_scale != 1.0:
            optimizer.grad_scale = torch.tensor(step.loss_scale, dtype=torch.float32, device="cpu")
        optimizer.step()
        if step.loss_scale != 1.0:
            del optimizer.grad_scale
        report = optimizer.last_step
        assert report is not None
        reports.append((report.total_norm.hex(), report.clip_factor, report.skipped))
    optimizer.synchronize()
    state = [entry[key] for entry in optimizer.state.values() for key in sorted(entry)]
    taken = [e.nbytes for e in optimizer.memory_ledger() if e.category == "accumulated gradients"]
    result = Result(bits(model.all), bits(state), reports, sum(taken))
    optimizer.close()
    return result
