"""Parameter groups: their defaults, their checks, and the hyperparameters that a step reads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from offload_adam.kernels.scalars import Hyperparameters

_BOOLEANS = ("amsgrad", "nesterov", "maximize", "decoupled_weight_decay")


def check_group(group: Mapping[str, Any]) -> None:
    """Refuse hyperparameters that cannot be right, naming argument, value and what is allowed.

    Raises:
        TypeError, ValueError: for the first argument that is wrong.
    """
    lr = _number("lr", group["lr"])
    eps = _number("eps", group["eps"])
    weight_decay = _number("weight_decay", group["weight_decay"])
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not (math.isfinite(value) and value >= 0.0):
            raise ValueError(f"{name} must be finite and at least 0, not {value}")
    betas = group["betas"]
    if not isinstance(betas, Sequence) or len(betas) != 2:
        raise ValueError(f"betas must be two numbers, not {betas!r}")
    for position, beta in enumerate(betas):
        if not 0.0 <= _number(f"betas[{position}]", beta) < 1.0:
            raise ValueError(f"betas[{position}] must lie in [0, 1), not {beta}")
    for name in _BOOLEANS:
        if not isinstance(group[name], bool):
            raise TypeError(f"{name} must be a bool, not {group[name]!r}")
    if not isinstance(group.get("epsilon_hat", False), bool):
        raise TypeError(f"epsilon_hat must be a bool, not {group['epsilon_hat']!r}")


def hyperparameters_of(group: Mapping[str, Any]) -> Hyperparameters:
    """Read one group's hyperparameters as they are at this step; schedulers may have moved them."""
    beta1, beta2 = group["betas"]
    return Hyperparameters(
        lr=float(group["lr"]),
        beta1=float(beta1),
        beta2=float(beta2),
        eps=float(group["eps"]),
        weight_decay=float(group["weight_decay"]),
        decoupled_weight_decay=group["decoupled_weight_decay"],
        nesterov=group["nesterov"],
        maximize=group["maximize"],
        epsilon_hat=group.get("epsilon_hat", False),
    )


def names_of(
    groups: Sequence[Mapping[str, Any]], module: torch.nn.Module | None
) -> list[list[str]]:
    """Return a name for every parameter of every group.

    The names given with the parameters come first, then those of `module`, then the position.
    """
    known = {} if module is None else {id(p): name for name, p in module.named_parameters()}
    return [
        [
            _name(group, known, group_index, position, parameter)
            for position, parameter in enumerate(group["params"])
        ]
        for group_index, group in enumerate(groups)
    ]


def known_names(
    groups: Sequence[Mapping[str, Any]], module: torch.nn.Module | None
) -> list[list[str]] | None:
    """Return the names of all parameters, None where one has no name or shares it with another."""
    known = {} if module is None else {id(p): name for name, p in module.named_parameters()}
    if any("param_names" not in g and any(id(p) not in known for p in g["params"]) for g in groups):
        return None
    names = names_of(groups, module)
    every = [name for group in names for name in group]
    return names if len(every) == len({*every}) else None


def _name(
    group: Mapping[str, Any],
    known: Mapping[int, str],
    group_index: int,
    position: int,
    parameter: torch.Tensor,
) -> str:
    if "param_names" in group:
        return str(group["param_names"][position])
    return known.get(id(parameter), f"param_groups[{group_index}]['params'][{position}]")


def _number(name: str, value: Any) -> float:
    """Return a number as a float; a one-element tensor counts as one, as torch allows for lr."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, not {value!r}")
    return float(value)
