"""Checks saved state, and plans the copies that load it: from any world size, format and shape."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from offload_adam.fsdp_private import (
    as_dtensor,
    is_dtensor,
    local_of,
    part_of_whole,
    placement_of,
)
from offload_adam.memory.split_master import from_bytes, join_to_even, remainder_of
from offload_adam.options import MAX_STEP_COUNT
from offload_adam.params.bucket import BucketState
from offload_adam.params.elements import in_memory_order, in_shape_of
from offload_adam.printable import show
from offload_adam.state.boxes import memory_order
from offload_adam.state.state_shard import (
    StateShard,
    describe_range,
    local_range,
    parts_of,
    shard_of,
)

_LOADABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def plan_load(
    state: BucketState, position: int, saved: Mapping[str, Any]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Check the saved state of one parameter, and return the copies that load it.

    Args:
        saved: the keys of `local_state`, with tensors of the parameter's whole shape (from any
            world size, or from torch's Adam) or of this rank's range. Missing moments are loaded as
            zeros if no step was counted, since torch creates them at the first step. Without a
            saved master weight, the current one stays; the next step replaces it if the parameter
            is not its rounded value. A split master weight takes the parameter's value.
            Moments are rounded to nearest if they were saved in fp32 and are stored in bf16.

    Returns:
        (target, source) pairs.

    Raises:
        TypeError, ValueError: a tensor has another shape, or float32 cannot hold its values; the
            message names the parameter.
    """
    copies = []
    num_updates = float(saved.get("step", 0))
    targets = {"step": state.step_counts[position], **parts_of(state, position)}
    for key, target in targets.items():
        value: Any = _without_bytes(saved.get(key)) if key == "master_remainder" else saved.get(key)
        what = f"{key} of parameter {state.names[position]!r}"
        other = OTHER_MASTER_KEY.get(key)
        if key not in saved and other is not None and other in saved:
            found = _without_bytes(saved[other])
            copies.append((target, _converted_master(state, position, key, found, target)))
        elif key not in saved:
            if key not in ("step", *OTHER_MASTER_KEY) and num_updates > 0:
                raise ValueError(
                    f"The saved state has no {what}, but counts {num_updates:.0f} update(s). Load "
                    "a complete state."
                )
            if key != "master_weight":
                # A 0-d zero: `copy_` broadcasts it, so no memory of the target's size is needed.
                copies.append((target, torch.zeros((), dtype=target.dtype, device=target.device)))
        elif key == "step":
            count = torch.tensor(float(value), dtype=target.dtype, device=target.device)
            copies.append((target, count))
        else:
            _check_values(what, value, _dtypes_of(key))
            copies.append((target, _part_of(state, position, what, value, target)))
    return copies


OTHER_MASTER_KEY = {
    "master_weight": "master_remainder",
    "master_remainder": "master_weight",
}
"""The two keys of a master weight, each with the other one: in fp32, or the low half of it."""


def _dtypes_of(key: str) -> tuple[torch.dtype, ...]:
    return (torch.int16,) if key == "master_remainder" else _LOADABLE


def _converted_master(
    state: BucketState, position: int, key: str, value: Any, target: torch.Tensor
) -> torch.Tensor:
    """Check a master weight that was saved under the other key, and convert it to `key`."""
    saved_key = OTHER_MASTER_KEY[key]
    what = f"{saved_key} of parameter {state.names[position]!r}"
    _check_values(what, value, _dtypes_of(saved_key))
    part = _part_of(state, position, what, value, target)
    weight = shard_of(state, position).weight
    if state.layout.world_size == 1:
        weight = in_shape_of(weight, local_of(state.parameters[position]))
    return convert_master(key, part, weight)


def convert_master(key: str, saved: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Convert a master weight that was saved under the other key of `OTHER_MASTER_KEY`.

    Args:
        key: key of the result.
        saved: int16 remainders for "master_weight", else master weights of a floating dtype.
        weight: parameters of the same shape. For "master_weight", they must be loaded already.

    Returns:
        int16 remainders or float32 master weights, on the host.
    """
    saved, weight = saved.cpu(), weight.cpu()
    if key == "master_remainder":
        return remainder_of(saved.float(), weight)
    # A remainder has no meaning for a parameter that is not bfloat16.
    return join_to_even(weight, saved) if weight.dtype == torch.bfloat16 else weight.float()


def _check_values(what: str, value: object, dtypes: Sequence[torch.dtype]) -> None:
    """Check that a saved tensor is dense, has one of `dtypes`, and does not overflow float32.

    Raises:
        TypeError, ValueError: the message names the tensor by `what`.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"The saved {what} must be a tensor, not {show(value)}.")
    local = local_of(value)
    is_dense = local.layout is torch.strided and not local.is_nested and not local.is_quantized
    if local.is_meta or not is_dense or value.dtype not in dtypes:
        *others, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
        wanted = f"{', '.join(others)} or {last}" if others else last
        raise ValueError(
            f"The saved {what} is a tensor of {value.dtype}, {local.layout} on {local.device}, but "
            f"must be a dense one of {wanted} with values. Convert it, or load a state that Adam "
            "or AdamW has saved."
        )
    if value.dtype == torch.float64 and not torch.equal(local.isinf(), local.float().isinf()):
        raise ValueError(
            f"The saved {what} has values beyond the range of float32, in which the state is kept."
        )


def check_step_count(what: str, value: Any) -> None:
    """Check that a value is a number of updates: whole and at least 0.

    Args:
        what: name of the value, for the error message.

    Raises:
        ValueError: it is not such a number.
    """
    try:
        count = math.nan if isinstance(value, str) else float(value)
    except (ArithmeticError, RuntimeError, TypeError, ValueError):  # such as a tensor on meta
        count = math.nan
    if not (0 <= count <= MAX_STEP_COUNT and count.is_integer()):
        raise ValueError(
            f"{what} must be a whole number of updates of at most {MAX_STEP_COUNT:,}, not "
            f"{show(value)}"
        )


def _part_of(
    state: BucketState, position: int, what: str, value: torch.Tensor, target: torch.Tensor
) -> torch.Tensor:
    """Return the part of a saved tensor that `target` holds."""
    parameter = state.parameters[position]
    if is_dtensor(parameter):
        part = _part_of_dtensor(parameter, what, value)
        if state.layout.world_size == 1:
            return part
        start, end = local_range(state, position)
        return part.contiguous().view(-1)[start:end]
    if isinstance(value, StateShard) and value.shape == parameter.shape:
        start, end = local_range(state, position)
        if not value.has_range_of(memory_order(parameter), start, end):
            needed = describe_range(start, end, parameter.numel())
            raise ValueError(
                f"The saved {what} is {show(value)}, but this rank needs {needed}. "
                "Load it through torch.distributed.checkpoint, or load a full_state_dict()."
            )
        return value.to_local()
    if (
        state.layout.world_size > 1
        and value.shape == parameter.shape
        and (value.shape != target.shape or value.dim() != 1)
    ):
        # A tensor of the whole shape. Copied into memory order, this rank's range is contiguous.
        whole = torch.empty_strided(
            parameter.shape, parameter.stride(), dtype=value.dtype, device=value.device
        )
        start, end = local_range(state, position)
        return in_memory_order(whole.copy_(value))[start:end]
    if value.shape != target.shape:
        raise ValueError(
            f"The saved {what} has shape {tuple(value.shape)} instead of "
            f"{tuple(parameter.shape)}. Load a state that was saved for this model."
        )
    return value


def _part_of_dtensor(parameter: torch.Tensor, what: str, value: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of the saved state of a parameter that is a DTensor."""
    if value.shape != parameter.shape:
        raise ValueError(
            f"The saved {what} has shape {tuple(value.shape)} instead of "
            f"{tuple(parameter.shape)}. Load a state that was saved for this model."
        )
    if not is_dtensor(value):
        return part_of_whole(value, parameter)
    if placement_of(value) != placement_of(parameter):
        raise ValueError(
            f"The saved {what} is placed as {placement_of(value)}, but the parameter as "
            f"{placement_of(parameter)}. Load it through torch.distributed.checkpoint."
        )
    return local_of(value)


def _without_bytes(value: Any) -> Any:
    """Return saved remainders as int16 if they are bytes, as `placed_as` makes them."""
    if (
        not isinstance(value, torch.Tensor)
        or value.dtype != torch.uint8
        or value.shape[-1:] != (2,)
    ):
        return value
    remainder = from_bytes(local_of(value))
    return as_dtensor(remainder, value) if is_dtensor(value) else remainder
