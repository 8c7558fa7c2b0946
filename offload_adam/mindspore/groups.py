"""Parameter groups of `Adam`: their keys, and the order of all parameters."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self, cast

import torch

from offload_adam.errors import warn_user
from offload_adam.mindspore.arguments import check_flag
from offload_adam.mindspore.dynamic import Dynamic, read_learning_rate, read_weight_decay
from offload_adam.printable import show

_KEYS = ("params", "lr", "weight_decay", "grad_centralization", "order_params")


class AdamGroup(dict[str, Any]):
    """A parameter group that rejects assignments to values that change with the step.

    If `lr` or `weight_decay` is dynamic, the entry shows the value that the last step used.

    Attributes:
        dynamic: functions of the step, by key: "lr", "weight_decay".
        own: keys that the user set for this group; the others have the optimizer's value.
        filtered: weight decay does not apply to parameters that `decay_filter` excludes by name or
            layer.
    """

    dynamic: Mapping[str, Dynamic] = {}
    own: Collection[str] = ()
    filtered: bool = False
    _shown: ClassVar = ("lr", "weight_decay")

    def __setitem__(self, key: str, value: Any) -> None:
        self._reject_dynamic(key, value)
        super().__setitem__(key, value)

    def update(self, *others: Any, **values: Any) -> None:
        """Set several entries. `dict.update` would not call `__setitem__`."""
        merged = dict(*others, **values)
        for key, value in merged.items():
            self._reject_dynamic(key, value)
        super().update(merged)

    def __ior__(self, other: Any) -> Self:  # type: ignore[override,misc]
        self.update(other)
        return self

    def _reject_dynamic(self, key: str, value: Any) -> None:
        if key in self.dynamic and self.get(key, value) != value:
            raise ValueError(
                f"{key} of this group changes with the step and cannot be set to {show(value)}. To "
                "let a torch scheduler or your code set it, construct Adam with a fixed number for "
                "it."
            )

    def values_at(self, step: int) -> dict[str, float]:
        """Return learning rate and weight decay for a step."""
        return {
            key: self.dynamic[key].at(step) if key in self.dynamic else float(self[key])
            for key in self._shown
        }

    def shown_at(self, step: int) -> dict[str, float]:
        """Return the values for a step. After the end of a list of values, return the last one."""
        return {
            key: self.dynamic[key].shown_at(step) if key in self.dynamic else float(self[key])
            for key in self._shown
        }

    def show(self, values: Mapping[str, float]) -> None:
        """Set the entries of dynamic values to those that a step used."""
        # Not `self.update`, which rejects them.
        super().update({key: values[key] for key in self.dynamic})


@dataclass(frozen=True)
class Groups:
    """The parsed argument `params`.

    members: the groups, or one group of all parameters if `params` holds no groups.
    order: all parameters in the order of `order_params`, None without it.
    grouped: `params` holds groups. Weight decay then applies to all parameters of a group.
    """

    members: list[AdamGroup] = field(default_factory=list)
    order: list[torch.nn.Parameter] | None = None
    grouped: bool = False


@dataclass(frozen=True, slots=True)
class GroupDefaults:
    """The values of a group that does not set its own."""

    lr: float | Dynamic
    weight_decay: float | Dynamic


def read_groups(params: object, defaults: GroupDefaults) -> Groups:
    """Parse the argument `params`.

    Raises:
        ValueError: `params` or a group is empty, or `order_params` lacks a parameter.
        TypeError: not an iterable of parameters, of (name, parameter) pairs, or of group dicts.
        KeyError: a group has an unknown key, or no `params`.
        RuntimeError: a parameter occurs twice.
    """
    items = _listed("params", params)
    grouped = isinstance(items[0], Mapping)
    if any(isinstance(item, Mapping) is not grouped for item in items):
        raise TypeError("params holds both parameters and group dicts. Pass only one of them.")
    if not grouped:
        group = _group(items, {}, defaults, "params")
        group.filtered = True
        return Groups([group])
    orders = [item for item in items if "order_params" in item]
    members = [
        read_group(item, defaults, f"params[{position}]")
        for position, item in enumerate(items)
        if "order_params" not in item
    ]
    if not members:
        raise ValueError("params has no group with the key 'params'. Add the groups to optimize.")
    reject_repeated(members, [])
    return Groups(members, _read_order(orders, members), grouped=True)


def read_group(given: Mapping[str, Any], defaults: GroupDefaults, where: str) -> AdamGroup:
    """Read one group dict.

    Args:
        where: name of the group in error messages.

    Raises:
        KeyError, TypeError, ValueError: as `read_groups`.
    """
    for key in given:
        if key not in _KEYS:
            raise KeyError(f"{where} has the key {key!r}. A group may have {', '.join(_KEYS)}.")
    if "params" not in given:
        raise KeyError(f"{where} has no 'params'. Add the parameters of the group.")
    return _group(_listed(f"{where}['params']", given["params"]), given, defaults, where)


def reject_repeated(new: Sequence[AdamGroup], known: Sequence[Mapping[str, Any]]) -> None:
    """Reject a parameter that occurs twice, in one group or in two.

    Raises:
        RuntimeError: the message names both places.
    """
    seen = {id(p): "a group of this optimizer" for group in known for p in group["params"]}
    for number, group in enumerate(new):
        for position, member in enumerate(group["params"]):
            parameter = _parameter_of(member)
            if id(parameter) in seen:
                raise RuntimeError(
                    f"The parameter at position {position} of group {number} is also in "
                    f"{seen[id(parameter)]}. Pass each parameter once, in one group."
                )
            seen[id(parameter)] = f"group {number} at position {position}"


def reject_unequal_lengths(groups: Iterable[AdamGroup]) -> None:
    """Reject learning rates with different numbers of values, one value per step.

    Raises:
        ValueError: the message names the numbers of values.
    """
    rates = [group.dynamic["lr"] for group in groups if "lr" in group.dynamic]
    lengths = {rate.num_values for rate in rates} - {None}
    if len(lengths) > 1:
        raise ValueError(
            "Learning rates with one value per step have different lengths in the groups: "
            f"{sorted(lengths, key=str)}. Pass equally many values in all groups."
        )


def _group(
    items: list[Any], given: Mapping[str, Any], defaults: GroupDefaults, where: str
) -> AdamGroup:
    for position, item in enumerate(items):
        if not _can_be_optimized(_parameter_of(item)):
            raise TypeError(
                f"{where} has an item of type {type(item).__name__} at position {position}. Pass "
                "parameters or (name, parameter) pairs."
            )
    if len({isinstance(item, torch.Tensor) for item in items}) > 1:
        raise TypeError(
            f"{where} holds both parameters and (name, parameter) pairs. Pass only one of them."
        )
    group = AdamGroup(params=items)
    lr, weight_decay = given.get("lr"), given.get("weight_decay")
    values = {
        "lr": defaults.lr if lr is None else read_learning_rate(f"lr of {where}", lr),
        "weight_decay": defaults.weight_decay
        if weight_decay is None
        else read_weight_decay(f"weight_decay of {where}", weight_decay),
    }
    group.own = [
        key for key, value in (("lr", lr), ("weight_decay", weight_decay)) if value is not None
    ]
    for key, value in values.items():
        group[key] = value.at(0) if isinstance(value, Dynamic) else value
    group["grad_centralization"] = check_flag(
        f"grad_centralization of {where}", given.get("grad_centralization", False)
    )
    group.dynamic = {k: v for k, v in values.items() if isinstance(v, Dynamic)}
    return group


def _listed(name: str, values: object) -> list[Any]:
    """Return a non-empty iterable as a list."""
    if values is None:
        raise ValueError(f"{name} is None. Pass the parameters to optimize.")
    # Parameters must have the same order on all ranks, and a set has no fixed order. The other
    # types are iterable too, but not over parameters.
    unordered = isinstance(values, (set, frozenset, str, bytes, Mapping, torch.Tensor))
    if unordered or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a list of parameters, not a {type(values).__name__}")
    items = list(values)
    if not items:
        raise ValueError(f"{name} is empty. Pass the parameters to optimize.")
    return items


def _parameter_of(item: object) -> object:
    """Return the parameter of a (name, parameter) pair, and any other item unchanged."""
    if isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str):
        return item[1]
    return item


def _can_be_optimized(item: object) -> bool:
    """Return whether this is a parameter, or a plain tensor with `requires_grad=True`."""
    return isinstance(item, torch.nn.Parameter) or (
        isinstance(item, torch.Tensor) and item.requires_grad
    )


def _read_order(
    orders: Sequence[Mapping[str, Any]], members: Sequence[AdamGroup]
) -> list[torch.nn.Parameter] | None:
    """Return the order given by `order_params`, or None without it."""
    if not orders:
        return None
    if len(orders) > 1:
        raise ValueError("order_params is given twice. Pass one order of all parameters.")
    ignored = sorted(set(orders[0]) - {"order_params"})
    if ignored:
        warn_user(
            f"The group with order_params also holds {ignored}, which have no effect there. Put "
            "them into the groups with the parameters."
        )
    given = orders[0]["order_params"]
    if isinstance(given, (str, bytes, torch.Tensor)) or not isinstance(given, Iterable):
        raise TypeError(f"order_params must be a list of parameters, not a {type(given).__name__}")
    order = [_parameter_of(item) for item in given]
    known = {id(_parameter_of(item)) for group in members for item in group["params"]}
    for position, parameter in enumerate(order):
        if id(parameter) not in known:
            raise ValueError(
                f"order_params[{position}] is not in any group. List only parameters of the groups."
            )
    if len(order) != len(known) or len({id(parameter) for parameter in order}) != len(known):
        raise ValueError(
            f"order_params has {len(order)} entries, but there are {len(known)} parameters. List "
            "each parameter once."
        )
    return cast(list[torch.nn.Parameter], order)
