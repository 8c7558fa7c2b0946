"""One set of parameters, options and gradients, for the package's `Adam` and for the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from offload_adam import Adam, OffloadPolicy
from offload_adam.schedules import (
    CosineDecayLR,
    ExponentialDecayLR,
    InverseDecayLR,
    NaturalExpDecayLR,
    PolynomialDecayLR,
    WarmUpLR,
)
from tests.unit.adam.reference import Gradient, Parameter, ReferenceAdam, Schedule, Sparse

SHAPES = [(6, 3), (4,), (2, 3, 2), ()]
TABLE = 0
"""The place in `SHAPES` of the parameter that may have sparse gradients."""

RATES: dict[str, Callable[[], Any]] = {
    "fixed": lambda: 0.02,
    "vector": lambda: [0.05, 0.01, 0.02, 0.03, 0.04, 0.01],
    "tensor": lambda: torch.linspace(0.01, 0.06, 6, dtype=torch.float64),
    "callable": lambda: lambda step: 0.05 / (step + 1),
    "exponential": lambda: ExponentialDecayLR(0.05, 0.5, 2),
    "natural": lambda: NaturalExpDecayLR(0.05, 0.3, 2, True),
    "inverse": lambda: InverseDecayLR(0.05, 0.5, 2),
    "cosine": lambda: CosineDecayLR(0.001, 0.05, 4),
    "polynomial": lambda: PolynomialDecayLR(0.05, 0.001, 3, 0.5, True),
    "warm_up": lambda: WarmUpLR(0.05, 3),
}


@dataclass(frozen=True)
class Case:
    """What is varied.

    grouped: the table in one group, with a rate and a decay of its own, the others in another; else
        one list, whose third parameter is called gamma.
    centralized: in both groups, so that tensors of every number of dims are.
    sparse: the table's gradients are sparse, with repeated rows.
    """

    dtype: torch.dtype = torch.float32
    rate: str = "fixed"
    weight_decay: float = 0.0
    moving_decay: bool = False
    grouped: bool = False
    centralized: bool = False
    sparse: bool = False
    loss_scale: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    options: tuple[str, ...] = ()
    seed: int = 0

    @property
    def flags(self) -> dict[str, Any]:
        """The options that are on."""
        return dict.fromkeys(self.options, True)


def decay_of(case: Case) -> float | Schedule:
    """Return the optimizer's weight decay."""
    if case.moving_decay:
        return lambda step: case.weight_decay / (step + 1)
    return case.weight_decay


def initial_weights(case: Case) -> list[torch.Tensor]:
    """Return the parameters' values, in the parameters' dtype."""
    generator = torch.Generator().manual_seed(case.seed)
    return [torch.randn(shape, generator=generator).to(case.dtype) for shape in SHAPES]


def build(case: Case, kind: type[Adam] = Adam) -> Adam:
    """Return the optimizer under test."""
    parameters = [torch.nn.Parameter(weight) for weight in initial_weights(case)]
    names = ["table", "bias", "gamma", "scale"]
    params: list[Any] = list(zip(names, parameters, strict=True))
    if case.grouped:
        own = {"lr": 0.03, "weight_decay": 0.2}
        members = ({"params": params[:1], **own}, {"params": params[1:]})
        params = [{**group, "grad_centralization": case.centralized} for group in members]
    return kind(
        params,
        RATES[case.rate](),
        *case.betas,
        case.eps,
        weight_decay=decay_of(case),
        loss_scale=case.loss_scale,
        offload=OffloadPolicy(bucket_nbytes=64),
        **case.flags,
    )


def build_reference(case: Case) -> ReferenceAdam:
    """Return the reference with the same parameters."""
    rate = RATES[case.rate]()
    if isinstance(rate, (list, torch.Tensor)):
        values = [float(value) for value in rate]
        rate = values.__getitem__
    parameters = []
    for place, weight in enumerate(initial_weights(case)):
        centralized = case.grouped and case.centralized
        parameter = Parameter(weight.double().numpy(), rate, decay_of(case), centralized)
        if case.grouped and place == 0:
            parameter.lr, parameter.weight_decay = 0.03, 0.2
        if not case.grouped and place == 2:
            parameter.weight_decay = 0.0
        parameters.append(parameter)
    flags = case.flags
    return ReferenceAdam(
        parameters,
        *case.betas,
        case.eps,
        loss_scale=case.loss_scale,
        nesterov=flags.get("use_nesterov", False),
        amsgrad=flags.get("use_amsgrad", False),
        lazy=flags.get("use_lazy", False),
        offload=flags.get("use_offload", False),
        epsilon_hat=flags.get("epsilon_hat", False),
    )


def gradients(case: Case, step: int) -> list[torch.Tensor | None]:
    """Return one step's gradients in the order of `SHAPES`; a third of them are missing."""
    generator = torch.Generator().manual_seed(1000 * case.seed + step)
    found: list[torch.Tensor | None] = []
    for place, shape in enumerate(SHAPES):
        gradient = (torch.randn(shape, generator=generator) * case.loss_scale).to(case.dtype)
        if place == TABLE and case.sparse:
            rows = torch.randint(0, shape[0], (4,), generator=generator)
            values = gradient[:4].clone()
            found.append(torch.sparse_coo_tensor(rows[None], values, shape))
        elif torch.rand((), generator=generator) < 0.3:
            found.append(None)
        else:
            found.append(gradient)
    return found


def to_reference(given: Sequence[torch.Tensor | None]) -> list[Gradient]:
    """Return gradients as the reference takes them."""
    converted: list[Gradient] = []
    for gradient in given:
        if gradient is None:
            converted.append(None)
        elif gradient.is_sparse:
            values = gradient._values().double().numpy()
            converted.append(Sparse(gradient._indices()[0].numpy(), values))
        else:
            converted.append(gradient.double().numpy())
    return converted


def in_walking_order(
    optimizer: Adam, given: Sequence[torch.Tensor | None]
) -> tuple[torch.Tensor | None, ...]:
    """Return gradients in the order in which the optimizer takes them."""
    groups = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    places = {id(parameter): place for place, parameter in enumerate(groups)}
    return tuple(given[places[id(parameter)]] for parameter in optimizer.parameters)


def check(optimizer: Adam, reference: ReferenceAdam, num_steps: int) -> None:
    """Compare weights and moments element by element.

    A step rounds a moment a few times, each within 2**-24 of the terms of its sum, and these terms
    decay like the moment. So after any number of steps a moment is off by less than 8 * 2**-24 of
    the largest it has been built from, whose bound is the largest gradient seen; here all are of
    size one. A weight is off by 2**-24 of itself a step, and by the error of the direction, which
    Adam divides by a root: it is measured in units of the learning rate.
    """
    groups = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    unit = 2.0**-24
    for parameter, expected in zip(groups, reference.parameters, strict=True):
        state = optimizer.state[parameter]
        assert float(state["step"]) == reference.step
        scale = max(1.0, float(np.abs(expected.m).max(initial=0.0)) * 10)
        assert np.abs(state["exp_avg"].double().numpy() - expected.m).max() <= 8 * unit * scale
        assert (
            np.abs(state["exp_avg_sq"].double().numpy() - expected.v).max()
            <= 8 * unit * scale * scale
        )
        if "max_exp_avg_sq" in state:
            found = state["max_exp_avg_sq"].double().numpy()
            assert np.abs(found - expected.vhat).max() <= 8 * unit * scale * scale
        master = state.get("master_weight", parameter.detach()).double().numpy()
        largest = float(np.abs(expected.weight).max(initial=0.0)) + 1.0
        tolerance = num_steps * unit * largest * 4
        assert np.abs(master - expected.weight).max() <= tolerance
        if parameter.dtype != torch.float32:
            rounded = state["master_weight"].to(parameter.dtype)
            assert torch.equal(parameter.detach(), rounded)
