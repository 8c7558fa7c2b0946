"""Checks saved state, and plans the copies that load it: from any world size, format and shape."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from offload_adam.fsdp_private import (
    as_dtensor,
    is_dtensor,
    local_of,
    part_of_whole,
    placement_of,
)
from offload_adam.memory.codes import CodedMoment, Plane, check_storable
from offload_adam.memory.planes import SCALED_KEY
from offload_adam.memory.split_master import from_bytes, join_to_even, remainder_of
from offload_adam.options import MAX_STEP_COUNT
from offload_adam.params.bucket import BucketState
from offload_adam.params.elements import in_memory_order, in_shape_of
from offload_adam.printable import show
from offload_adam.state.boxes import memory_order
from offload_adam.state.state_shard import (
    SCALE_KEY,
    StateShard,
    describe_range,
    local_range,
    parts_of,
    shard_of,
)

logger = logging.getLogger(__name__)

_LOADABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def plan_load(
    state: BucketState, position: int, saved: Mapping[str, Any]
) -> list[tuple[Plane, torch.Tensor]]:
    """Check the saved state of one parameter, and return the copies that load it.

    Args:
        saved: the keys of `local_state` and `coded_state`, with tensors of the parameter's whole
            shape (from any world size, or from torch's Adam) or of this rank's range. Missing
            moments are loaded as zeros if no step was counted, since torch creates them at the
            first step. Without a saved master weight, the current one stays; the next step replaces
            it if the parameter is not its rounded value. A split master weight takes the
            parameter's value. State of another format is converted, and moments are rounded to
            nearest.

    Returns:
        (target, source) pairs.

    Raises:
        TypeError, ValueError: a tensor has another shape, or float32 cannot hold its values; the
            message names the parameter.
    """
    copies: list[tuple[Plane, torch.Tensor]] = []
    num_updates = float(saved.get("step", 0))
    scale = _scale_of(state, position, saved)
    copies.append((state.step_counts[position], _scalar(num_updates, torch.float32)))
    if state.scales is not None:
        copies.append((state.scales[position], _scalar(scale, torch.float64)))
    for key, target in parts_of(state, position).items():
        other = OTHER_KEY.get(key, key)
        found_key = key if key in saved or other not in saved else other
        if found_key in saved:
            found = _saved_part(state, position, found_key, saved[found_key], target)
            is_remainder = key == found_key == "master_remainder"
            if key != found_key or (is_remainder and found.dtype != target.dtype):
                weight = shard_of(state, position).weight
                if state.layout.world_size == 1:
                    weight = in_shape_of(weight, local_of(state.parameters[position]))
                found = converted(key, target.dtype, found_key, found, weight, scale)
            copies.append((target, found))
        elif key not in OTHER_MASTER_KEY and num_updates > 0:
            raise ValueError(
                f"The saved state has no {key} of parameter {state.names[position]!r}, but counts "
                f"{num_updates:.0f} update(s). Load a complete state."
            )
        elif key != "master_weight":
            # A 0-d zero: `copy_` broadcasts it, so no memory of the target's size is needed.
            copies.append((target, torch.zeros((), dtype=target.dtype, device=target.device)))
    return copies


def copy_all(copies: Iterable[tuple[Plane, torch.Tensor]], *, had_codes: bool) -> None:
    """Run the copies of `plan_load`.

    Args:
        had_codes: the state was saved in the same format. Otherwise rounding is not logged.
    """
    num_rounded = 0
    for target, source in copies:
        is_exact = copy_plane(target, source)
        num_rounded += not is_exact
    log_rounded(num_rounded if had_codes else 0)


def copy_plane(target: Plane, source: torch.Tensor) -> bool:
    """Copy a plane; return False if values of codes had to be rounded, because blocks differ."""
    if isinstance(target, CodedMoment):
        # Other dtypes are other formats, which are always rounded.
        return target.copy_(source) or source.dtype != target.dtype or source.dim() == 0
    target.copy_(source)
    return True


def log_rounded(num_rounded: int) -> None:
    """Log that moments were rounded although the format is the same, if there are any."""
    if num_rounded:
        logger.info(
            "Rounded %d moment(s) in 8-bit codes once more, because the blocks of 128 elements "
            "differ from those that were saved.",
            num_rounded,
        )


OTHER_MASTER_KEY = {
    "master_weight": "master_remainder",
    "master_remainder": "master_weight",
}
"""The two keys of a master weight, each with the other one: in fp32, or the lower bits of it."""

OTHER_KEY = {**OTHER_MASTER_KEY, "exp_avg_sq": SCALED_KEY, SCALED_KEY: "exp_avg_sq"}
"""Keys under which the same values are saved in another format."""


def converted(
    key: str,
    dtype: torch.dtype,
    saved_key: str,
    saved: torch.Tensor,
    weight: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Convert a plane that was saved in another format.

    Args:
        key, dtype: of the result. Moments keep the dtype that they have, since copies convert it.
        saved_key: `key`, or its `OTHER_KEY`.
        weight: parameters of the same shape. If `saved` are remainders, these must be loaded.
        scale: see `SCALE_KEY`; used if only one of the two second moments is scaled.
    """
    if key in OTHER_MASTER_KEY:
        saved, weight = saved.cpu(), weight.cpu()
        if saved_key == "master_weight":
            master = saved.float()
        elif weight.dtype == torch.bfloat16:
            master = join_to_even(weight, saved)
        else:  # a remainder has no meaning for a parameter that is not bfloat16
            master = weight.float()
        return master if key == "master_weight" else remainder_of(master, weight, dtype)
    if key == saved_key:
        return saved
    return saved.float() * scale if saved_key == SCALED_KEY else saved.float() / (scale or 1.0)


def _scalar(value: float, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(value, dtype=dtype, device="cpu")


def _scale_of(state: BucketState, position: int, saved: Mapping[str, Any]) -> float:
    """Return the scale of a second moment that is saved or about to be loaded."""
    if SCALE_KEY not in saved:
        return float("exp_avg_sq" in saved)  # an unscaled moment is loaded with the scale 1
    what = f"The saved {SCALE_KEY} of parameter {state.names[position]!r}"
    return check_scale(what, saved[SCALE_KEY])


def check_scale(what: str, value: Any) -> float:
    """Check that a value is the scale of a second moment in codes, and return it.

    Args:
        what: name of the value, for the error message.

    Raises:
        ValueError: it is neither 0 nor in [1, 2).
    """
    scale = _number(value)
    if not (scale == 0 or 1 <= scale < 2):
        raise ValueError(f"{what} must be 0, or at least 1 and less than 2, not {show(value)}")
    return scale


def _dtypes_of(key: str) -> tuple[torch.dtype, ...]:
    return (torch.int16, torch.int8) if key == "master_remainder" else _LOADABLE


def _saved_part(
    state: BucketState, position: int, key: str, value: Any, target: Plane
) -> torch.Tensor:
    """Check a saved tensor, and return the part of it that `target` holds."""
    what = f"{key} of parameter {state.names[position]!r}"
    value = _without_bytes(value) if key == "master_remainder" else value
    _check_values(what, value, _dtypes_of(key))
    if isinstance(target, torch.Tensor):
        return _part_of(state, position, what, value, target.shape)
    local, is_whole = local_of(state.parameters[position]), state.layout.world_size == 1
    shape = local.shape if is_whole else torch.Size([target.numel()])
    part = _part_of(state, position, what, value, shape)
    check_storable(f"The saved {what}", part, is_squared=target.is_squared)
    if not is_whole:
        return part
    if part.stride() != local.stride():
        reordered = torch.empty_strided(
            part.shape, local.stride(), dtype=part.dtype, device=part.device
        )
        part = reordered.copy_(part)
    return in_memory_order(part)


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
    count = _number(value)
    if not (0 <= count <= MAX_STEP_COUNT and count.is_integer()):
        raise ValueError(
            f"{what} must be a whole number of updates of at most {MAX_STEP_COUNT:,}, not "
            f"{show(value)}"
        )


def _number(value: Any) -> float:
    """Return a number or a tensor of one number as a float, NaN for anything else."""
    try:
        return math.nan if isinstance(value, str) else float(value)
    except (ArithmeticError, RuntimeError, TypeError, ValueError):  # such as a tensor on meta
        return math.nan


def _part_of(
    state: BucketState, position: int, what: str, value: torch.Tensor, shape: torch.Size
) -> torch.Tensor:
    """Return this rank's part of a saved tensor; `shape` is that of the part."""
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
        and (value.shape != shape or value.dim() != 1)
    ):
        # A tensor of the whole shape. Copied into memory order, this rank's range is contiguous.
        whole = torch.empty_strided(
            parameter.shape, parameter.stride(), dtype=value.dtype, device=value.device
        )
        start, end = local_range(state, position)
        return in_memory_order(whole.copy_(value))[start:end]
    if value.shape != shape:
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
