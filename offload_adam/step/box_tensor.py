"""A tensor of which a process has some boxes, for `torch.distributed.checkpoint`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from offload_adam.layout.boxes import Box, boxes_of_range
from offload_adam.torch_private import make_wrapper_subclass

if TYPE_CHECKING:  # its import takes seconds: methods that torch calls from there import it
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
    from torch.distributed.checkpoint.planner import WriteItem


class BoxSource(NamedTuple):
    """A box of a tensor in its logical dimensions, and what returns its elements in that shape."""

    box: Box
    tensor: Callable[[], torch.Tensor]


class BoxTensor(torch.Tensor):
    """A tensor of which this process has some boxes: torch saves these, and loads into them.

    It has the whole tensor's shape and no elements of its own: every operation on it is refused.

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
        """Make one of these boxes; where no process has any, torch would lose the tensor."""
        tensor = make_wrapper_subclass(cls, torch.Size(shape), dtype=dtype)
        assert isinstance(tensor, BoxTensor)
        tensor._sources = {source.box.offsets: source for source in sources}
        return tensor

    def _boxes(self) -> dict[tuple[int, ...], BoxSource]:
        """Return what is here, by the offsets of each box."""
        return self._sources

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's own has mangled names
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Refuse: there is nothing to compute with."""
        raise NotImplementedError(f"{cls.__name__} is for checkpoints only, and not for {func}")

    def __repr__(self) -> str:  # type: ignore[override]
        """Show the shape and how many boxes are here."""
        return f"{type(self).__name__}(shape={list(self.shape)}, boxes={len(self._boxes())})"

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        """Return what of the tensor is here."""
        return [_chunk(source.box) for source in self._boxes().values()]

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        """Return one item for each box."""
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
        """Return the elements of one box: to be written, or to be loaded into."""
        assert index.offset is not None
        return self._boxes()[tuple(index.offset)].tensor()


def _chunk(box: Box) -> ChunkStorageMetadata:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

    return ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes))


def logical_box(box: Box, order: Sequence[int]) -> Box:
    """Return a box that counts in dimensions as they lie in memory in logical ones."""
    inverse = inverse_order(order)
    return Box(tuple(box.offsets[i] for i in inverse), tuple(box.sizes[i] for i in inverse))


def memory_order(tensor: torch.Tensor) -> tuple[int, ...]:
    """Return a dense tensor's dimensions as they lie in memory, the outermost first."""
    return tuple(sorted(range(tensor.dim()), key=lambda dim: (-tensor.stride()[dim], dim)))


def inverse_order(order: Sequence[int]) -> list[int]:
    """Return what permutes dimensions as they lie in memory back into logical ones."""
    return [order.index(dim) for dim in range(len(order))]


def range_sources(
    shape: Sequence[int], order: Sequence[int], start: int, local: torch.Tensor
) -> list[BoxSource]:
    """Return the boxes of one rank's range of a tensor, as views of it.

    Args:
        shape: of the whole tensor.
        order: its dimensions as they lie in memory, the outermost first.
        start: index in memory order of the first element of `local`.
        local: (n,) elements [start, start + n).
    """
    shape, sources, done = torch.Size(shape), [], 0
    for box in boxes_of_range([shape[dim] for dim in order], start, start + local.numel()):
        numel = torch.Size(box.sizes).numel()
        view = local[done : done + numel].view(box.sizes).permute(inverse_order(order))
        sources.append(BoxSource(logical_box(box, order), view.detach))
        done += numel
    if shape.numel() == 0:  # DCP loses a tensor of which no rank has a box
        none = Box((0,) * len(shape), tuple(shape))
        sources.append(BoxSource(none, local.view(shape).detach))
    return sources
