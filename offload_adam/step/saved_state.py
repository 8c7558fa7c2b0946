"""The form of saved optimizer states: this rank's own, a full one, and torch's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

STATE_KEY = "offload_adam"
"""The entry of a state dict that torch ignores, and that says where a state belongs."""

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
        ValueError: not a state dict, or one that holds the ranges of another rank or world.
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
    return SavedState(state, state_dict["param_groups"], marker)


def merge_groups(
    groups: Sequence[Mapping[str, Any]],
    saved: Sequence[Mapping[str, Any]],
    check: Callable[[dict[str, Any]], None],
) -> list[dict[str, Any]]:
    """Return each group's options as saved; options that the saved ones lack keep their values.

    Args:
        check: refuses a completed group.

    Raises:
        ValueError: another number of groups or parameters, or another `amsgrad`.
    """
    counts = [len(group["params"]) for group in groups]
    saved_counts = [len(group["params"]) for group in saved]
    if counts != saved_counts:
        raise ValueError(
            f"the saved state has groups of {saved_counts} parameters, this optimizer of {counts}"
        )
    merged = []
    for number, (group, saved_group) in enumerate(zip(groups, saved, strict=True)):
        if saved_group.get("amsgrad", False) != group["amsgrad"]:
            raise ValueError(
                f"group {number} was saved with amsgrad={saved_group.get('amsgrad')} and this "
                f"optimizer has amsgrad={group['amsgrad']}: make it with the same"
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
