"""The form of saved optimizer states: this rank's own, a full one, and torch's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from offload_adam.parameters.group_watch import LAID_OUT

STATE_KEY = "offload_adam"
"""The entry of a state dict that torch ignores, and that says where a state belongs."""

_PLANES = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master_weight")
_STATE_KEYS = ("step", *_PLANES)
_GROUP_KEYS = ("lr", "betas", "eps", "weight_decay", "amsgrad")

_TORCH_DEFAULTS = {"foreach": None, "capturable": False, "differentiable": False, "fused": None}


@dataclass(frozen=True, slots=True)
class SavedState:
    """A state dict, read and found to belong here.

    state: torch's keys by packed id, with `master_weight` where one was saved.
    further: what stands under `STATE_KEY`, empty where another optimizer saved it.
    """

    state: Mapping[int, Mapping[str, Any]]
    groups: Sequence[Mapping[str, Any]]
    further: Mapping[str, Any]


def read_saved(state_dict: Mapping[str, Any], world_size: int, rank: int) -> SavedState:
    """Read a state dict, refusing another rank's.

    Raises:
        ValueError: not a state dict, one that holds the ranges of another rank or world, or one of
            an optimizer that is no Adam.
    """
    if "state" not in state_dict or "param_groups" not in state_dict:
        raise ValueError("not an optimizer's state dict: 'state' and 'param_groups' are missing")
    marker = state_dict.get(STATE_KEY, {})
    if "world_size" in marker and (marker["world_size"], marker["rank"]) != (world_size, rank):
        raise ValueError(
            f"this state was saved by rank {marker['rank']} of {marker['world_size']} and holds "
            f"only its ranges; it cannot be loaded into rank {rank} of {world_size}. Save with "
            "full_state_dict() in the old world and load that here"
        )
    masters = marker.get("master_weight", {})
    state = {
        packed: {**entry, **({"master_weight": masters[packed]} if packed in masters else {})}
        for packed, entry in state_dict["state"].items()
    }
    _refuse_foreign(state, state_dict["param_groups"])
    return SavedState(state, state_dict["param_groups"], marker)


def _refuse_foreign(
    state: Mapping[Any, Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]
) -> None:
    """Refuse what another optimizer than Adam and AdamW saved: its moments mean something else.

    A group may hold more than is known here: schedulers and users put keys of their own there.
    """
    for number, group in enumerate(groups):
        for key in _GROUP_KEYS:
            if key not in group:
                raise ValueError(
                    f"the saved group {number} has no {key!r}, which every state of Adam and AdamW "
                    "has: it is another optimizer's, and cannot be loaded"
                )
    for packed, entry in state.items():
        for key in entry:
            if key not in _STATE_KEYS:
                raise ValueError(
                    f"the saved state of parameter {packed} has {key!r}, which Adam and AdamW do "
                    "not have: it is another optimizer's, and cannot be loaded"
                )
        check_step_count(f"the saved step of parameter {packed}", entry.get("step", 0))


def check_step_count(what: str, value: Any) -> None:
    """Refuse what is no count of updates.

    Raises:
        ValueError: saying what it is.
    """
    count = float(value)
    if not (count >= 0.0 and count.is_integer()):
        raise ValueError(f"{what} is {count}, no count of updates")


def merge_groups(
    groups: Sequence[Mapping[str, Any]],
    saved: Sequence[Mapping[str, Any]],
    check: Callable[[dict[str, Any]], None],
) -> list[dict[str, Any]]:
    """Return each group's options as saved; options that the saved ones lack keep their values.

    Args:
        check: refuses a completed group.

    Raises:
        ValueError: another number of groups or parameters, or another of `LAID_OUT`.
    """
    counts = [len(group["params"]) for group in groups]
    saved_counts = [len(group["params"]) for group in saved]
    if counts != saved_counts:
        raise ValueError(
            f"the saved state has groups of {saved_counts} parameters, this optimizer of {counts}"
        )
    merged = []
    for number, (group, saved_group) in enumerate(zip(groups, saved, strict=True)):
        for key in LAID_OUT:
            made_with = group.get(key, False)
            if saved_group.get(key, made_with) != made_with:
                raise ValueError(
                    f"group {number} was saved with {key}={saved_group[key]} and this optimizer "
                    f"has {key}={made_with}: make it with the same"
                )
        kept = {
            key: copy.deepcopy(value)
            for key, value in saved_group.items()
            if key not in ("params", "param_names", *_TORCH_DEFAULTS)
        }
        check({**group, **kept})
        merged.append(kept)
    return merged


def pack_full(
    groups: Sequence[dict[str, Any]],
    packed_ids: Mapping[int, int],
    whole: Mapping[int, Mapping[str, Any]],
    further: Mapping[str, Any],
) -> dict[str, Any]:
    """Return a plain `torch.optim.AdamW` state dict, master weights under a key of their own.

    Args:
        groups: packed groups, as `Optimizer.state_dict` gives them.
        packed_ids: torch's packed id by the parameter's index.
        whole: torch's keys by the parameter's index, with tensors or what will be one.
        further: what torch ignores.
    """
    masters = {}
    state = {}
    for index, entry in sorted(whole.items()):
        entry = dict(entry)
        if "master_weight" in entry:
            masters[packed_ids[index]] = entry.pop("master_weight")
        state[packed_ids[index]] = entry
    return {
        "state": state,
        "param_groups": [{**_TORCH_DEFAULTS, **group} for group in groups],
        STATE_KEY: {"master_weight": masters, **further},
    }
