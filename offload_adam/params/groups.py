"""Check parameter groups, read their hyperparameters, and detect edits of groups."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from operator import is_
from typing import Any

import torch

from offload_adam.kernels.scalars import Hyperparameters
from offload_adam.options import STATE_FORMAT, is_number, plain
from offload_adam.printable import show

_BOOLEANS = ("amsgrad", "nesterov", "maximize", "decoupled_weight_decay")
_NUMBERS = ("lr", "eps", "weight_decay")
_PLAIN = (int, float)

TORCH_OPTIONS: Mapping[str, bool | None] = {
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
}
"""Options of torch's Adam, with their defaults, that choose how torch computes an update."""

_REJECTED = {
    "capturable": "no CUDA graph can capture a step that runs on the CPU and talks to other ranks",
    "differentiable": "autograd cannot follow an update outside of torch",
}


def check_group(group: dict[str, Any]) -> None:
    """Check a group's hyperparameters, and replace numbers of NumPy by Python's.

    Raises:
        TypeError, ValueError: for the first wrong hyperparameter; the message names it, its value
            and the allowed values.
    """
    for name in _NUMBERS:
        value = as_float(name, group[name])
        if not (math.isfinite(value) and value >= 0.0):
            raise ValueError(f"{name} must be finite and at least 0, not {value}")
        if type(group[name]) not in _PLAIN:
            # Not `group[name] =`, which AdamGroup rejects for a value that changes with the step.
            dict.__setitem__(group, name, _plain(group[name]))
    betas = group["betas"]
    if not isinstance(betas, Sequence) or len(betas) != 2:
        raise ValueError(f"betas must be two numbers, not {show(betas)}")
    for position, beta in enumerate(betas):
        if not 0.0 <= as_float(f"betas[{position}]", beta) < 1.0:
            raise ValueError(f"betas[{position}] must lie in [0, 1), not {beta}")
    if not all(type(beta) in _PLAIN for beta in betas):
        group["betas"] = tuple(map(_plain, betas))
    for name in _BOOLEANS:
        if not isinstance(group[name], bool):
            raise TypeError(f"{name} must be a bool, not {show(group[name])}")
    # Only groups of `Adam`, or groups loaded from its state, have this key.
    if not isinstance(group.get("epsilon_hat", False), bool):
        raise TypeError(f"epsilon_hat must be a bool, not {show(group['epsilon_hat'])}")
    if group.get("state_format") is not None:
        STATE_FORMAT.check("state_format", group["state_format"])
    for name in TORCH_OPTIONS:  # groups of `Adam` do not have these keys
        chosen = group.get(name)
        if chosen is not None and not isinstance(chosen, bool):
            raise TypeError(f"{name} must be a bool or None, not {show(chosen)}")
        if chosen and name in _REJECTED:
            raise ValueError(
                f"{name}=True is not supported, because {_REJECTED[name]}. Leave {name} out."
            )


def hyperparameters_of(group: Mapping[str, Any]) -> Hyperparameters:
    """Return a group's current hyperparameters, which schedulers may have changed."""
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
    groups: Sequence[Mapping[str, Any]], module: torch.nn.Module | None, *, first_group: int = 0
) -> list[list[str]]:
    """Return a name for every parameter of every group.

    This is the name given with the parameter, else its name in `module`, else its position, such
    as "param_groups[0]['params'][3]".

    Args:
        first_group: index of the first group in `param_groups`.
    """
    known = {} if module is None else {id(p): name for name, p in module.named_parameters()}
    return [_names(group, known, number) for number, group in enumerate(groups, first_group)]


_WRAPPERS = re.compile(r"_orig_mod\.|_checkpoint_wrapped_module\.")
"""What torch.compile and activation checkpointing insert into a parameter's name."""


def bare_name(name: str) -> str:
    """Return a parameter's name without what torch.compile and checkpointing insert."""
    return _WRAPPERS.sub("", name)


def known_names(
    groups: Sequence[Mapping[str, Any]], module: torch.nn.Module | None
) -> list[list[str]] | None:
    """Return the names of all parameters by group, or None if any is missing or repeated."""
    known = {} if module is None else {id(p): name for name, p in module.named_parameters()}
    if any("param_names" not in g and any(id(p) not in known for p in g["params"]) for g in groups):
        return None
    names = names_of(groups, module)
    every = [name for group in names for name in group]
    return names if len(every) == len({*every}) else None


def _names(group: Mapping[str, Any], known: Mapping[int, str], number: int) -> list[str]:
    parameters = group["params"]
    if "param_names" in group:
        return [str(name) for name, _ in zip(group["param_names"], parameters, strict=True)]
    return [
        known.get(id(parameter)) or f"param_groups[{number}]['params'][{position}]"
        for position, parameter in enumerate(parameters)
    ]


def as_float(name: str, value: Any) -> float:
    """Return a number as a float; a one-element tensor counts as one, as torch allows for lr.

    Raises:
        TypeError: the message calls the value `name`.
    """
    if isinstance(value, torch.Tensor):
        is_real = value.numel() == 1 and value.dtype != torch.bool and not value.is_complex()
    else:
        is_real = is_number(value)
    if not is_real:
        raise TypeError(f"{name} must be a number, not {show(value)}")
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(f"{name} is too large for a float: {show(value)}") from error
    except RuntimeError as error:  # a tensor without values, or of a dtype without numbers
        raise TypeError(f"{name} must be a number, not {show(value)}") from error


def _plain(value: Any) -> Any:
    return value if isinstance(value, torch.Tensor) else plain(value)


FIXED_OPTIONS = ("amsgrad", "grad_centralization")
"""Options that determine the allocated state or how gradients are read. They cannot change after
construction, or between save and load."""

LOCAL_OPTIONS = ("params", "param_names", "replicas", "state_format", *TORCH_OPTIONS)
"""Keys that are not loaded from a saved group. Parameters are saved by name. Sharding and state
format may differ between save and load. torch's options have no effect on the state."""


class GroupWatch:
    """Compares parameter groups with those for which state was allocated.

    It detects:

    - parameters that were added to a group, removed, replaced or moved to another group;
    - groups that were added without `add_param_group`, or removed;
    - changes of `state_format` and of the options in `FIXED_OPTIONS`, and wrong hyperparameters.

    Reordering the parameters of a group is allowed.

    Cost: one identity comparison per parameter and step.
    """

    def __init__(self, module: torch.nn.Module | None) -> None:
        self._module = module
        self._members: list[list[torch.nn.Parameter]] = []
        self._options: list[dict[str, Any]] = []
        self._names: dict[int, str] = {}

    def extend(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Remember the current parameters and options of more groups."""
        every = names_of(groups, self._module, first_group=len(self._members))
        for group, names in zip(groups, every, strict=True):
            members = list(group["params"])
            self._members.append(members)
            self._options.append(_fixed_options(group))
            self._names |= {id(member): name for member, name in zip(members, names, strict=True)}

    def check(
        self, groups: Sequence[dict[str, Any]], check_group: Callable[[dict[str, Any]], None]
    ) -> None:
        """Check that the groups still match the state, and that their hyperparameters are valid.

        Args:
            check_group: raises an error for wrong hyperparameters of a group.

        Raises:
            TypeError, ValueError: the message names the group, what is wrong, and the remedy.
        """
        if len(groups) != len(self._members):
            raise ValueError(
                f"There are {len(groups)} parameter groups, but this optimizer has state for "
                f"{len(self._members)}. Add groups with add_param_group(); to remove one, "
                "construct a new optimizer."
            )
        for number, group in enumerate(groups):
            try:
                check_group(group)
                members, known = group["params"], self._members[number]
            except KeyError as error:
                raise ValueError(
                    f"param_groups[{number}] has lost its key {error}. Set it again."
                ) from error
            except (TypeError, ValueError) as error:
                raise type(error)(f"param_groups[{number}]: {error}") from error
            # By identity: == would compare the values of the parameters.
            if len(members) != len(known) or not all(map(is_, members, known)):
                self._reject_moved(groups)
                self._members[number] = list(members)  # only reordered
            self._reject_options(number, _fixed_options(group))

    def _reject_moved(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Reject the first parameter that is not in the group for which it has state."""
        group_of = {
            id(member): number for number, known in enumerate(self._members) for member in known
        }
        for number, group in enumerate(groups):
            for position, member in enumerate(group["params"]):
                where = f"param_groups[{number}]['params'][{position}]"
                before = group_of.pop(id(member), None)
                if before is None:
                    raise ValueError(
                        f"{where} was added after the optimizer was constructed, and has no "
                        "state. Remove it, and add parameters with add_param_group()."
                    )
                if before != number:
                    raise ValueError(
                        f"Parameter {self._names[id(member)]!r} was moved from param_groups"
                        f"[{before}] to {where}, which is not supported. Move it back, or "
                        "construct a new optimizer with other groups."
                    )
        for identity, number in group_of.items():  # not found in any group
            raise ValueError(
                f"Parameter {self._names[identity]!r} was removed from param_groups[{number}] but "
                "still has state. Put it back (without a gradient it is not updated), or construct "
                "a new optimizer without it."
            )

    def _reject_options(self, number: int, options: Mapping[str, Any]) -> None:
        for key, made_with in self._options[number].items():
            if options[key] != made_with:
                raise ValueError(
                    f"param_groups[{number}][{key!r}] was changed to {show(options[key])}, but its "
                    f"state was allocated for {show(made_with)}. Set it back, or construct a new "
                    f"optimizer with {key}={show(options[key])}."
                )


def _fixed_options(group: Mapping[str, Any]) -> dict[str, Any]:
    # Only groups of `Adam` have grad_centralization. state_format is optional in a group.
    fixed = {key: group.get(key, False) for key in FIXED_OPTIONS}
    return {**fixed, "state_format": group.get("state_format")}
