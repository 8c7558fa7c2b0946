"""Notice edits of parameter groups that a step cannot follow, and check those that it can."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import is_
from typing import Any

import torch

from offload_adam.parameters.groups import names_of

LAID_OUT = ("amsgrad", "grad_centralization")
"""Options that decide what state there is, or how gradients are read: fixed with the group."""


class GroupWatch:
    """Compares parameter groups with those that state was made for.

    Sees: parameters appended to a group, taken out, replaced or moved to another; groups that came
    without `add_param_group` or have gone; options of `LAID_OUT` that changed; hyperparameters that
    cannot be right. Another order of a group's parameters changes nothing and passes.
    Cost: one comparison of each parameter's identity a step.
    """

    def __init__(self, module: torch.nn.Module | None) -> None:
        self._module = module
        self._members: list[list[torch.nn.Parameter]] = []
        self._options: list[dict[str, Any]] = []
        self._names: dict[int, str] = {}

    def extend(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Remember further groups, as they are now."""
        for group, names in zip(groups, names_of(groups, self._module), strict=True):
            members = list(group["params"])
            self._members.append(members)
            self._options.append(_laid_out(group))
            self._names |= {id(member): name for member, name in zip(members, names, strict=True)}

    def check(
        self, groups: Sequence[dict[str, Any]], check_group: Callable[[dict[str, Any]], None]
    ) -> None:
        """Refuse what a step could not follow.

        Args:
            check_group: refuses a group's hyperparameters.

        Raises:
            TypeError, ValueError: naming the group, what is wrong there, and the remedy.
        """
        if len(groups) != len(self._members):
            raise ValueError(
                f"there are {len(groups)} parameter groups, and this optimizer has state for "
                f"{len(self._members)}: add a group with add_param_group(); to take one out, make "
                "a new optimizer"
            )
        for number, group in enumerate(groups):
            try:
                check_group(group)
                members, known = group["params"], self._members[number]
            except KeyError as error:
                raise ValueError(f"param_groups[{number}] has no {error} any more") from error
            except (TypeError, ValueError) as error:
                raise type(error)(f"param_groups[{number}]: {error}") from error
            # Not by ==, which compares values, and with them the bits of equal scalars.
            if len(members) != len(known) or not all(map(is_, members, known)):
                self._refuse_moved(groups)
                self._members[number] = list(members)  # only their order is another
            self._refuse_options(number, _laid_out(group))

    def _refuse_moved(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Refuse the first parameter that is not in the group whose state it has."""
        home = {
            id(member): number for number, known in enumerate(self._members) for member in known
        }
        for number, group in enumerate(groups):
            for position, member in enumerate(group["params"]):
                where = f"param_groups[{number}]['params'][{position}]"
                before = home.pop(id(member), None)
                if before is None:
                    raise ValueError(
                        f"{where} was put there after the optimizer had been made, and has no "
                        "state: take it out, and use add_param_group() for further parameters"
                    )
                if before != number:
                    raise ValueError(
                        f"parameter {self._names[id(member)]!r} was moved from param_groups"
                        f"[{before}] to {where}, which this optimizer cannot follow: put it back, "
                        "or make a new optimizer with other groups"
                    )
        for identity, number in home.items():
            raise ValueError(
                f"parameter {self._names[identity]!r} was taken out of param_groups[{number}], "
                "which still holds its state: put it back (without a gradient it is not updated), "
                "or make a new optimizer without it"
            )

    def _refuse_options(self, number: int, options: Mapping[str, Any]) -> None:
        for key, made_with in self._options[number].items():
            if options[key] != made_with:
                raise ValueError(
                    f"param_groups[{number}][{key!r}] is {options[key]!r}, and its state was made "
                    f"for {made_with!r}: set it back, or make a new optimizer with {key}="
                    f"{options[key]!r}"
                )


def _laid_out(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: group.get(key, False) for key in LAID_OUT}
