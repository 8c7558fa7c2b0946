"""One rank's part of each parameter's state, as plain tensors and for distributed checkpoints.

A rank owns a range of a parameter's elements in memory order, or of the local part of a DTensor.
Files and `torch.distributed.checkpoint` (DCP) get it as boxes, see boxes.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Never, SupportsIndex

import torch

from offload_adam.fsdp_private import (
    as_dtensor,
    is_dtensor,
    local_of,
)
from offload_adam.memory.codes import CodedMoment, Plane, values_of
from offload_adam.memory.split_master import join, to_bytes
from offload_adam.options import StateFormat
from offload_adam.params.bucket import BucketState
from offload_adam.params.elements import in_memory_order, in_shape_of, with_own_storage
from offload_adam.state.boxes import (
    Box,
    boxes_of_part,
    boxes_of_range,
    inverse_order,
    memory_order,
    views_of,
)
from offload_adam.state.coded_tensor import CodedTensor
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


SCALE_KEY = "exp_avg_sq_scale"
"""Key of the scale of a second moment in codes."""


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
    planes: (end - start,) views of the state, by the keys of `StatePlanes.named`.
    high: (end - start,) view of the high halves of split master weights; None if they are not
        split.
    step: 0-d view of the step count.
    scale: 0-d view of the scale of a second moment in codes; None without codes.
    state_format: the format of the state.
    """

    parameter: torch.nn.Parameter
    bucket: int
    counted: bool
    start: int
    end: int
    weight: torch.Tensor
    planes: Mapping[str, Plane]
    high: torch.Tensor | None
    step: torch.Tensor
    scale: torch.Tensor | None
    state_format: StateFormat

    @property
    def order(self) -> tuple[int, ...]:
        """The dimensions in memory order, the outermost first."""
        return memory_order(local_of(self.parameter))

    def boxes(self) -> list[Box]:
        """Return the boxes of the whole parameter that the range consists of, in memory order."""
        return boxes_of_part(self.parameter, self.order, self.start, self.end)


def decoded(
    planes: Mapping[str, Plane], high: torch.Tensor | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the planes of a state in float32: views, or copies if converted.

    The keys are torch's, but for a second moment in codes, which must still be scaled.

    Args:
        planes: of one length, by the keys of `StatePlanes.named`.
        high: high halves of split master weights, of the same length; None if not split.
    """
    for key, plane in planes.items():
        values = values_of(plane)
        if key == "master_remainder":
            assert high is not None
            yield "master_weight", join(high, values)
        else:
            yield key, values.float()


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
        None if state.scales is None else state.scales[position],
        state.state_format,
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
    """Return this rank's state of one parameter: views, by the keys of `StatePlanes.named`.

    With one rank, every tensor has the parameter's shape and strides. With more, it is the 1-d
    range `local_range`, which may be empty. The state of a DTensor is a DTensor that is placed as
    the parameter, unless ranks with the same part of it divide the state. 16-bit remainders of
    master weights are then bytes, see `placed_as`.

    A moment in codes is a `CodedTensor`.
    """
    local = local_of(state.parameters[position])

    def view_of(part: Plane) -> torch.Tensor:
        if isinstance(part, CodedMoment):
            whole = state.layout.world_size == 1
            return CodedTensor(part, local if whole else part.codes)
        # With its own storage, because `torch.save` writes whole storages: here all of the plane.
        return with_own_storage(part)

    parts = {key: view_of(part) for key, part in parts_of(state, position).items()}
    placed = _placed(state, position, parts)
    scale = {} if state.scales is None else {SCALE_KEY: state.scales[position]}
    return {"step": state.step_counts[position], **scale, **placed}


def coded_state(state: BucketState, position: int) -> dict[str, torch.Tensor]:
    """Return copies of the values of moments in codes, in place of `CodedTensor` objects."""
    coded = {k: p for k, p in parts_of(state, position).items() if isinstance(p, CodedMoment)}
    values = {key: part.values() for key, part in coded.items()}
    if state.layout.world_size == 1:
        parameter = local_of(state.parameters[position])
        values = {key: in_shape_of(part, parameter) for key, part in values.items()}
    return _placed(state, position, values)


def _placed(
    state: BucketState, position: int, parts: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    parameter = state.parameters[position]
    if is_dtensor(parameter) and state.layout.world_size == 1:
        return {key: placed_as(parameter, part) for key, part in parts.items()}
    return parts


def placed_as(parameter: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """Return a part of a parameter's state as a DTensor that is placed as the parameter.

    int16 becomes uint8 with one more dimension: torch can then gather and broadcast it.
    """
    return as_dtensor(to_bytes(part) if part.dtype == torch.int16 else part, parameter)


def parts_of(state: BucketState, position: int) -> dict[str, Plane]:
    """Return the planes' parts of one parameter, as views of the planes.

    With one rank, tensors have the parameter's shape. Moments in codes are always flat.
    """
    part = _slice_of(state, position)
    planes = state.planes.named(own_master=state.own_master)
    parts = {key: plane[part] for key, plane in planes.items()}
    if state.layout.world_size > 1:
        return parts
    parameter = local_of(state.parameters[position])
    return {
        key: in_shape_of(part, parameter) if isinstance(part, torch.Tensor) else part
        for key, part in parts.items()
    }


def state_shard(state: BucketState, position: int, local: torch.Tensor) -> StateShard:
    """Return a tensor of `local_state` as a `StateShard`."""
    parameter = state.parameters[position]
    start, _ = local_range(state, position)
    return StateShard(parameter.shape, memory_order(parameter), start, local)


def describe_range(start: int, end: int, numel: int) -> str:
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
    local: torch.Tensor | None

    @staticmethod
    def __new__(
        cls,
        shape: Sequence[int],
        dtype: torch.dtype,
        sources: Iterable[BoxSource],
        local: torch.Tensor | None = None,
    ) -> BoxTensor:
        """Construct a tensor from this process's boxes.

        At least one process must have a box, or DCP does not save the tensor.

        Args:
            local: (n,) the elements of all boxes, if they are in memory.
        """
        tensor = make_wrapper_subclass(cls, torch.Size(shape), dtype=dtype)
        assert isinstance(tensor, BoxTensor)
        tensor._sources = {source.box.offsets: source for source in sources}
        tensor.local = local
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
        return describe_range(self._start, end, self.shape.numel())

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
