"""One random training run: a model without arithmetic, and what happens in each of its steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from hypothesis import strategies as st

from offload_adam.options import Pin, StateFormat

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Step(NamedTuple):
    """One step.

    rounds: for each backward, the layers that its forward uses, in order.
    evaluates: read the parameters once more between the backward and the step.
    non_finite: a layer with a non-finite gradient, so the step is skipped; None for none.
    drops: discard the gradients (zero_grad) and run the backward again.
    """

    rounds: tuple[tuple[int, ...], ...]
    evaluates: bool
    non_finite: int | None
    drops: bool

    def uses_all_of(self, case: Case) -> bool:
        """Return whether at least one backward uses every layer."""
        return any(len(used) == len(case.layers) for used in self.rounds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """All inputs of a run except the random times of the simulated machine.

    layers: for each layer its parameters, as (number of elements, name of the dtype).
    on_device: parameters are on the simulated device, else in host memory.
    side_layers: layers that run on a second stream of the device.
    sharding: each layer is a unit that FSDP2 gathers. With "HSDP", the ranks divide its state.
    reshards: FSDP2 gathers a unit again for the backward.
    """

    layers: tuple[tuple[tuple[int, str], ...], ...]
    steps: tuple[Step, ...]
    world_size: int = 1
    rank: int = 0
    bucket_nbytes: int = 1024
    num_reduce_slots: int = 3
    num_staging_slots: int = 2
    on_device: bool = True
    side_layers: tuple[int, ...] = ()
    sharding: Literal["none", "FSDP2", "HSDP"] = "none"
    reshards: bool = True
    pin: Pin = "all"
    accumulates: bool = False
    accumulates_later: bool = False
    reduces_in_fp32: bool = False
    offload_fraction: float = 1.0
    state_format: StateFormat = "fp32"
    overlaps: bool = True
    max_norm: float | None = None
    seed: int = 0

    @property
    def parameters(self) -> list[tuple[int, str]]:
        """All parameters, layer by layer."""
        return [parameter for layer in self.layers for parameter in layer]

    def members(self, layer: int) -> range:
        """Return the indices of a layer's parameters."""
        start = sum(map(len, self.layers[:layer]))
        return range(start, start + len(self.layers[layer]))

    def weights(self) -> list[torch.nn.Parameter]:
        """Return the parameters at the start."""
        generator = torch.Generator().manual_seed(self.seed)
        drawn = [torch.randn(numel, generator=generator) for numel, _ in self.parameters]
        return [
            torch.nn.Parameter(values.to(DTYPES[name]))
            for values, (_, name) in zip(drawn, self.parameters, strict=True)
        ]

    def gradient(self, step: int, round_: int, parameter: int) -> torch.Tensor:
        """Return a gradient of few-bit numbers, so that sums and sums of squares are exact."""
        numel, name = self.parameters[parameter]
        place = ((self.seed * 100 + step) * 10 + round_) * 1000 + parameter
        generator = torch.Generator().manual_seed(place)
        values = torch.randint(-4, 5, (numel,), generator=generator) / 16
        spoiled = self.steps[step].non_finite
        if spoiled is not None and numel > 0 and parameter == self.members(spoiled)[0]:
            values[numel // 2] = math.nan
        return values.to(DTYPES[name])

    def sum_of_squares(self, step: int) -> float:
        """Return the exact sum of squares of the step's gradients; NaN where one is not finite."""
        total = 0.0
        rounds = self.steps[step].rounds
        for parameter in range(len(self.parameters)):
            layer = next(k for k in range(len(self.layers)) if parameter in self.members(k))
            given = [
                self.gradient(step, number, parameter).double()
                for number, used in enumerate(rounds)
                if layer in used
            ]
            if given:
                total += float(torch.stack(given).sum(0).square().sum())
        return total


MIXTURES = {
    "fp32": ("fp32",),
    "bf16": ("bf16",),
    "fp16": ("fp16",),
    "mixed": ("bf16", "fp32"),
    "all": tuple(DTYPES),
}
"""The dtypes that the parameters of a case may have, by one name."""

_SIZES = st.sampled_from([300, 200, 513, 128, 100, 900, 1, 0])
_RANGES: dict[str, st.SearchStrategy[Any]] = {
    "on_device": st.sampled_from([True, True, True, False]),
    "overlaps": st.sampled_from([True, True, True, False]),
    "pin": st.sampled_from(["all", "staging", "none"]),
    # Mostly one bucket per parameter, and one or two slots, so that buckets reuse slots.
    "bucket_nbytes": st.sampled_from([100, 100, 100, 1200]),
    "num_reduce_slots": st.sampled_from([2, 1]),
    "num_staging_slots": st.sampled_from([2, 1]),
    "offload_fraction": st.sampled_from([1.0, 0.5]),
    "accumulates": st.sampled_from([False, False, False, True]),
    "reduces_in_fp32": st.sampled_from([False, False, True]),
    "max_norm": st.sampled_from([None, 0.5, 20.0]),
    "seed": st.integers(0, 1 << 20),
    "accumulates_later": st.sampled_from([False, False, True]),
}


@st.composite
def cases(
    draw: st.DrawFn, /, *, dtype: str | None = None, world_size: int | None = None, **fixed: Any
) -> Case:
    """Draw a case at random.

    Args:
        dtype: a name of `MIXTURES`.
        world_size, fixed: fields of the case that are not drawn.
    """
    names = MIXTURES[dtype or draw(st.sampled_from(sorted(MIXTURES)))]
    parameters = st.tuples(_SIZES, st.sampled_from(names))
    layers = draw(st.lists(st.lists(parameters, min_size=1, max_size=2), min_size=4, max_size=7))
    world_size = world_size or draw(st.integers(1, 4))
    options = fixed | {name: draw(_RANGES[name]) for name in _RANGES if name not in fixed}
    accumulates = options["accumulates"] or options["accumulates_later"]
    steps = st.lists(_steps(len(layers), accumulates), min_size=2, max_size=3)
    if "sharding" in options:
        options["reshards"] = draw(st.booleans())
    elif options["on_device"] and "side_layers" not in options:
        options["side_layers"] = draw(st.sampled_from([(), (), tuple(range(0, 7, 2))]))
    return Case(
        layers=tuple(map(tuple, layers)),
        steps=tuple(draw(steps)),
        world_size=world_size,
        rank=draw(st.integers(0, world_size - 1)),
        **options,
    )


@st.composite
def _steps(draw: st.DrawFn, num_layers: int, accumulates: bool) -> Step:
    every = list(range(num_layers))
    layers = st.one_of(
        st.just(every), st.permutations(every), st.lists(st.sampled_from(every), unique=True)
    )
    used = st.lists(
        layers.map(lambda chosen: tuple(chosen or every[:1])),
        min_size=1,
        max_size=3 if accumulates else 1,
    )
    rounds = tuple(draw(used))
    spoiled = draw(st.sampled_from([None, None, None, None, None, rounds[0][0]]))
    drops = draw(st.sampled_from([False, False, False, False, True]))
    return Step(rounds, draw(st.booleans()), spoiled, drops)


def simple_case(num_layers: int, dtype: str, *, bucket_nbytes: int = 100, **options: Any) -> Case:
    """Return a case of layers of one parameter each, by default one bucket per layer.

    After two steps that use all layers, each layer is used alone in one step, so that each bucket
    is the first of a step once.
    """
    every = tuple(range(num_layers))
    uses = [every, every, *((layer,) for layer in every), every]
    return Case(
        layers=tuple(((300, dtype),) for _ in every),
        steps=tuple(Step((used,), evaluates=True, non_finite=None, drops=False) for used in uses),
        bucket_nbytes=bucket_nbytes,
        **options,
    )
