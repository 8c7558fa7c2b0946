"""Which parameters an optimizer takes in, checked and described before anything is allocated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from offload_adam.parameters.families import (
    check_parameter,
    family_of,
    memory_strides,
    refuse_overlaps,
)
from offload_adam.parameters.groups import hyperparameters_of, names_of

Named = tuple[str, torch.nn.Parameter]


@dataclass(frozen=True, slots=True)
class NewParameter:
    """A trainable parameter that the optimizer is about to take in.

    index counts over all trainable parameters.

    group: place of its hyperparameters among those that a step is given; its parameter group,
        unless the optimizer keeps several for one group.
    centralized: the mean over all dimensions but the first is taken from its gradients.
    """

    index: int
    name: str
    parameter: torch.nn.Parameter
    group: int
    amsgrad: bool
    centralized: bool = False

    @property
    def family(self) -> str:
        """What the parameters of one bucket share: dtype, device, and which planes they have."""
        return family_of(self.parameter) + ("+amsgrad" if self.amsgrad else "")


@dataclass(frozen=True, slots=True)
class Selection:
    """The parameters of some groups: those that get state, and by name those that do not."""

    new: list[NewParameter]
    frozen: list[Named]


def select_parameters(
    groups: Sequence[Mapping[str, Any]],
    module: torch.nn.Module | None,
    *,
    first_index: int,
    first_group: int,
) -> Selection:
    """Tell the trainable parameters of these groups from the frozen ones, and number them."""
    selection = Selection([], [])
    names = names_of(groups, module)
    for number, (group, group_names) in enumerate(zip(groups, names, strict=True), first_group):
        for name, parameter in zip(group_names, group["params"], strict=True):
            if parameter.requires_grad:
                index = first_index + len(selection.new)
                centralized = group.get("grad_centralization", False) and parameter.dim() > 1
                selection.new.append(
                    NewParameter(index, name, parameter, number, group["amsgrad"], centralized)
                )
            else:
                selection.frozen.append((name, parameter))
    return selection


def check_parameters(new: Iterable[NewParameter], known: Iterable[Named]) -> None:
    """Refuse parameters that cannot be optimized, or that lie over each other or known ones.

    Raises:
        TypeError, ValueError: naming the parameter.
    """
    members = [(item.name, item.parameter) for item in new]
    for name, parameter in members:
        check_parameter(name, parameter)
    members += known
    refuse_overlaps([name for name, _ in members], [parameter for _, parameter in members])


def refuse_unrelated(module: torch.nn.Module | None, groups: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a module that holds none of the parameters: it is another one than was meant.

    Raises:
        ValueError: naming the module's type.
    """
    if module is None:
        return
    held = set(map(id, module.parameters()))
    if not any(id(parameter) in held for group in groups for parameter in group["params"]):
        raise ValueError(
            f"module= is a {type(module).__name__} that holds none of the parameters: pass the "
            "model whose parameters these are, as it is now, or leave module= out"
        )


def describe(selection: Selection, groups: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Describe what every rank must have in common, field by field."""
    fields = [
        ("the number of parameter groups", str(len(groups))),
        ("the number of trainable parameters", str(len(selection.new))),
        ("the frozen parameters", ", ".join(name for name, _ in selection.frozen) or "none"),
    ]
    for item in selection.new:
        parameter = item.parameter
        fields += [
            (f"the name of parameter {item.index}", item.name),
            (f"the shape of {item.name!r}", str(tuple(parameter.shape))),
            (f"the dtype of {item.name!r}", str(parameter.dtype)),
            (f"the device type of {item.name!r}", parameter.device.type),
            (f"the strides of {item.name!r}", str(memory_strides(parameter))),
            (f"the group of {item.name!r}", str(item.group)),
            (f"the centralization of {item.name!r}", str(item.centralized)),
        ]
    for number, group in enumerate(groups):
        values = asdict(hyperparameters_of(group)) | {"amsgrad": group["amsgrad"]}
        fields += [(f"{name} of group {number}", repr(value)) for name, value in values.items()]
    return fields
