"""One rank's part of each parameter's state, as plain tensors and for distributed checkpoints.

A rank owns a range of a parameter's elements in memory order, or of the local part of a DTensor.
Files and `torch.distributed.checkpoint` (DCP) get it as boxes, see boxes.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Never, SupportsIndex

import torch

from offload_adam.fsdp_private import (
    as_dtensor,
    is_dtensor,
    local_of,
    part_of_whole,
    placement_of,
)
from offload_adam.memory.split_master import (
    from_bytes,
    join,
    join_to_even,
    remainder_of,
    to_bytes,
)
from offload_adam.options import MAX_STEP_COUNT, StateFormat
from offload_adam.params.bucket import BucketState
from offload_adam.params.elements import in_memory_order, in_shape_of, with_own_storage
from offload_adam.printable import show
from offload_adam.state.boxes import (
    Box,
    boxes_of_part,
    boxes_of_range,
    inverse_order,
    memory_order,
    views_of,
)
from offload_adam.torch_private import ATEN_TO_COPY, make_wrapper_subclass

if TYPE_CHECKING:  # importing DCP takes seconds, so only the methods that DCP calls import it
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
    from torch.distributed.checkpoint.planner import WriteItem

_aten = torch.ops.aten
_LOCAL_OPERATIONS = {
    _aten.alias.default,
    _aten.clone.default,
    _aten.detach.default,
    ATEN_TO_COPY,
    _aten.empty_like.default,
    _aten.zeros_like.default,
}
"""Operations that are applied to the elements of a `StateShard` and return a `StateShard`."""

_LOADABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def local_range(state: BucketState, position: int) -> tuple[int, int]:
    """Return the range [start, end) of a parameter, in memory order, that this rank owns.

    Of a DTensor, it counts the elements of the local part.
    """
    low, high = state.layout.shard_bounds(state.rank)
    placed = state.layout.placements[position]
    # Clamped, so that a parameter outside this shard has an empty range inside the parameter.
    start = min(max(placed.start, low), placed.end)
    end = max(min(placed.end, high), start)
    return start - placed.start, end - placed.start


class ParameterShard(NamedTuple):
    """This rank's range of one parameter and its state, in memory order.

    bucket: index of the parameter's bucket.
    counted: False if another rank has the same elements, and saves them.
    start, end: this rank owns elements [start, end) of the parameter, or of a DTensor's local part.
    weight: (end - start,) view of the parameter, in its dtype, on its device.
    planes: (end - start,) views of the state, by torch's keys.
    high: (end - start,) view of the high halves of split master weights; None if they are not
        split.
    step: 0-d view of the step count.
    """

    parameter: torch.nn.Parameter
    bucket: int
    counted: bool
    start: int
    end: int
    weight: torch.Tensor
    planes: Mapping[str, torch.Tensor]
    high: torch.Tensor | None
    step: torch.Tensor

    @property
    def state_format(self) -> StateFormat:
        """The format of the state."""
        return "bf16" if self.planes["exp_avg"].dtype == torch.bfloat16 else "fp32"

    @property
    def order(self) -> tuple[int, ...]:
        """The dimensions in memory order, the outermost first."""
        return memory_order(local_of(self.parameter))

    def boxes(self) -> list[Box]:
        """Return the boxes of the whole parameter that the range consists of, in memory order."""
        return boxes_of_part(self.parameter, self.order, self.start, self.end)


def decoded(
    planes: Mapping[str, torch.Tensor], high: torch.Tensor | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the planes of a state in float32, by torch's keys: views, or copies if converted.

    Args:
        planes: of one length, by torch's keys.
        high: high halves of split master weights, of the same length; None if not split.
    """
    for key, plane in planes.items():
        if key == "master_remainder":
            assert high is not None
            yield "master_weight", join(high, plane)
        else:
            yield key, plane.float()


def shards_of(states: Iterable[BucketState]) -> Iterator[ParameterShard]:
    """Yield this rank's range of every parameter, bucket by bucket; a range may be empty."""
    for state in states:
        for position in range(len(state.parameters)):
            yield shard_of(state, position)


def shard_of(state: BucketState, position: int) -> ParameterShard:
    """Return this rank's range of one parameter, which may be empty."""
    parameter, part = state.parameters[position], _slice_of(state, position)
    planes = state.planes.named(own_master=state.own_master)
    is_split = state.planes.master_remainder is not None
    start, end = local_range(state, position)
    return ParameterShard(
        parameter,
        state.layout.index,
        state.counted,
        start,
        end,
        # Not of `state.shard`: averaged weights may be swapped in.
        in_memory_order(local_of(parameter).detach())[start:end],
        {key: plane[part] for key, plane in planes.items()},
        state.planes.master_weight[part] if is_split else None,
        state.step_counts[position],
    )


def _slice_of(state: BucketState, position: int) -> slice:
    """Return where `local_range` is in this rank's shard."""
    start, end = local_range(state, position)
    if start == end:  # it may be outside the shard, where its offset would be negative
        return slice(0, 0)
    low, _ = state.layout.shard_bounds(state.rank)
    offset = state.layout.placements[position].start + start - low
    return slice(offset, offset + end - start)


def local_state(state: BucketState, position: int) -> dict[str, torch.Tensor]:
    """Return torch's keys with views of this rank's state of one parameter.

    With one rank, every tensor has the parameter's shape and strides. With more, it is the 1-d
    range `local_range`, which may be empty. The state of a DTensor is a DTensor that is placed as
    the parameter, unless ranks with the same part of it divide the state. Remainders of master
    weights are then bytes, see `placed_as`.
    """
    # With their own storages, because `torch.save` writes whole storages: here all of the plane.
    parts = {key: with_own_storage(part) for key, part in _parts_of(state, position).items()}
    parameter = state.parameters[position]
    if is_dtensor(parameter) and state.layout.world_size == 1:
        parts = {key: placed_as(parameter, part) for key, part in parts.items()}
    return {"step": state.step_counts[position], **parts}


def placed_as(parameter: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """Return a part of a parameter's state as a DTensor that is placed as the parameter.

    int16 becomes uint8 with one more dimension: torch can then gather and broadcast it.
    """
    return as_dtensor(to_bytes(part) if part.dtype == torch.int16 else part, parameter)


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


def _parts_of(state: BucketState, position: int) -> dict[str, torch.Tensor]:
    """Return the planes' parts for `local_state`, as views of the planes."""
    part = _slice_of(state, position)
    planes = state.planes.named(own_master=state.own_master)
    if state.layout.world_size > 1:
        return {key: plane[part] for key, plane in planes.items()}
    parameter = local_of(state.parameters[position])
    return {key: in_shape_of(plane[part], parameter) for key, plane in planes.items()}


def state_shard(state: BucketState, position: int, local: torch.Tensor) -> StateShard:
    """Return a tensor of `local_state` as a `StateShard`."""
    parameter = state.parameters[position]
    start, _ = local_range(state, position)
    return StateShard(parameter.shape, memory_order(parameter), start, local)


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
    targets = {"step": state.step_counts[position], **_parts_of(state, position)}
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
            needed = _describe(start, end, parameter.numel())
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


def _describe(start: int, end: int, numel: int) -> str:
    """Describe the elements [start, end) of a tensor for an error message."""
    if start == end:
        return f"none of {numel} elements"
    return f"elements [{start}, {end}) of {numel}"


class BoxSource(NamedTuple):
    """A box in logical dimensions, and a function that returns its elements as a tensor."""

    box: Box
    tensor: Callable[[], torch.Tensor]


class BoxTensor(torch.Tensor):
    """A tensor of which this process holds some boxes: DCP saves them and loads into them.

    It has the shape of the whole tensor and no storage. Every operation on it raises an error.

    Source: the `_Checkpointable` protocol of `torch.distributed.checkpoint`.
    """

    _sources: dict[tuple[int, ...], BoxSource]

    @staticmethod
    def __new__(
        cls,
        shape: Sequence[int],
        dtype: torch.dtype,
        sources: Iterable[BoxSource],
    ) -> BoxTensor:
        """Construct a tensor from this process's boxes.

        At least one process must have a box, or DCP does not save the tensor.
        """
        tensor = make_wrapper_subclass(cls, torch.Size(shape), dtype=dtype)
        assert isinstance(tensor, BoxTensor)
        tensor._sources = {source.box.offsets: source for source in sources}
        return tensor

    def _boxes(self) -> dict[tuple[int, ...], BoxSource]:
        """Return this process's boxes by their offsets."""
        return self._sources

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's own has mangled names
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Raise an error, since there are no elements to compute with."""
        raise NotImplementedError(f"{cls.__name__} only supports checkpoints, not {func}.")

    def __repr__(self) -> str:  # type: ignore[override]
        """Show the shape and the number of this process's boxes."""
        return f"{type(self).__name__}(shape={list(self.shape)}, boxes={len(self._boxes())})"

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        """Return the metadata of this process's boxes."""
        return [_chunk(source.box) for source in self._boxes().values()]

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        """Return one DCP write item per box."""
        from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                index=MetadataIndex(fqn, torch.Size(source.box.offsets)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(_chunk(source.box), properties, self.shape),
            )
            for source in self._boxes().values()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        """Return the elements of one box, which DCP writes or loads into."""
        assert index.offset is not None
        return self._boxes()[tuple(index.offset)].tensor()


def _chunk(box: Box) -> ChunkStorageMetadata:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

    return ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes))


def box_sources(
    shape: Sequence[int], order: Sequence[int], boxes: Sequence[Box], local: torch.Tensor
) -> list[BoxSource]:
    """Return one rank's boxes of a tensor, as views of `local`.

    Args:
        shape: of the whole tensor.
        order: dimensions in memory order, the outermost first.
        boxes: with their dimensions in memory order.
        local: (n,) elements of the boxes, one box after the other.
    """
    shape, inverse = torch.Size(shape), inverse_order(order)
    # The bound method `detach` of a view returns a new tensor over the same memory on each call.
    sources = [
        BoxSource(box.permuted(inverse), view.permute(inverse).detach)
        for box, view in views_of(local, boxes)
    ]
    if shape.numel() == 0:  # one empty box, since DCP does not save a tensor without boxes
        none = Box((0,) * len(shape), tuple(shape))
        sources.append(BoxSource(none, local.view(shape).detach))
    return sources


class StateShard(BoxTensor):
    """A tensor of the parameter's shape, of which this rank holds a contiguous range of elements.

    `torch.distributed.checkpoint` saves it and loads it with any world size. It can be copied,
    moved, cast and compared, and `copy_` loads into it. `to_local()` returns this rank's elements.
    It cannot be pickled, because one rank's file would lack the other ranks' state.
    """

    _order: tuple[int, ...]
    _start: int
    _local: torch.Tensor

    @staticmethod
    def __new__(
        cls, shape: Sequence[int], order: tuple[int, ...], start: int, local: torch.Tensor
    ) -> StateShard:
        """Construct the shard of a rank.

        Args:
            shape: of the parameter.
            order: dimensions in memory order, the outermost first.
            start: index in memory order of the first element of `local`.
            local: (n,) elements [start, start + n), not copied.
        """
        shard = make_wrapper_subclass(
            cls, torch.Size(shape), dtype=local.dtype, device=local.device
        )
        assert isinstance(shard, StateShard)
        shard._order, shard._start, shard._local = order, start, local
        return shard

    def to_local(self) -> torch.Tensor:
        """Return this rank's elements as a 1-d tensor in memory order that shares their memory."""
        return self._local

    def has_range_of(self, order: tuple[int, ...], start: int, end: int) -> bool:
        """Return whether this shard holds exactly elements [start, end) in this memory order."""
        own = (self._start, self._start + self._local.numel())
        return self._order == order and own == (start, end)

    def __deepcopy__(self, memo: dict[int, Any]) -> StateShard:
        """Copy this rank's elements."""
        memo[id(self)] = copied = self._with(self._local.clone())
        return copied

    def __reduce_ex__(self, protocol: SupportsIndex) -> Never:
        """Reject pickling, as by `torch.save`.

        Raises:
            TypeError: always; the message names the ways to save the state of all ranks.
        """
        raise TypeError(
            "state_dict() holds only this rank's part of the state (of this tensor "
            f"{self._range()}), so a file of it would lack the state of the other ranks. Call "
            "full_state_dict() on every rank and save the result of rank 0, or use "
            "offload_adam.save_checkpoint or torch.distributed.checkpoint. To write one file per "
            "rank, save local_state_dict(). In Trainer, pass OffloadAdamCallback(); with "
            "Accelerate, call keep_state_sharded(accelerator, optimizer). Both are in "
            "offload_adam.integrations."
        )

    def __repr__(self) -> str:  # type: ignore[override]
        """Show the shape and this rank's range."""
        return f"StateShard({self._range()}, shape={list(self.shape)})"

    def _boxes(self) -> dict[tuple[int, ...], BoxSource]:
        # Not cached: dcp.async_save copies the tensor's attributes, and cached boxes would still be
        # views of the optimizer's memory, which the next step modifies.
        memory_shape = [self.shape[dim] for dim in self._order]
        end = self._start + self._local.numel()
        boxes = boxes_of_range(memory_shape, self._start, end)
        sources = box_sources(self.shape, self._order, boxes, self._local)
        return {source.box.offsets: source for source in sources}

    def _range(self) -> str:
        end = self._start + self._local.numel()
        return _describe(self._start, end, self.shape.numel())

    def _with(self, local: torch.Tensor) -> StateShard:
        return StateShard(self.shape, self._order, self._start, local)

    def _local_part(self, value: torch.Tensor) -> torch.Tensor | None:
        """Return the elements of `value` in this rank's range, or None if it lacks some of them.

        Args:
            value: a shard of the same range, a tensor of the whole shape, or a 0-d tensor.
        """
        end = self._start + self._local.numel()
        if isinstance(value, StateShard):
            fits = value.shape == self.shape and value.has_range_of(self._order, self._start, end)
            return value._local if fits else None
        if value.shape == self.shape:
            return value.permute(self._order).reshape(-1)[self._start : end]
        return value if value.dim() == 0 else None

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's own has mangled names
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Copy, move, cast, compare or load the local elements; reject everything else."""
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, StateShard):
            if func in _LOCAL_OPERATIONS:
                # A memory format such as channels_last needs all dimensions, but the local tensor
                # is 1-d.
                kwargs.pop("memory_format", None)
                return first._with(func(first._local, *args[1:], **kwargs))
            # `dcp.async_save` allocates its host copy by `new_empty` with the whole shape.
            if func is _aten.new_empty.default and tuple(args[1]) == first.shape:
                return first._with(func(first._local, first._local.shape, **kwargs))
            if func in (_aten.copy_.default, _aten.equal.default):
                part = first._local_part(args[1])
                if part is not None:
                    result = func(first._local, part, *args[2:], **kwargs)
                    return first if func is _aten.copy_.default else result
        raise NotImplementedError(
            f"{func} is not supported for {first!r}. Use to_local() for the elements of this rank, "
            "or the optimizer's full_state_dict() for whole tensors."
        )
