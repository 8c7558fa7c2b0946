"""The optimizer state for `torch.distributed.checkpoint`: a tensor subclass with its hooks.

    state = {"model": model.state_dict(), "optimizer": OptimizerState(model, optimizer)}
    dcp.save(state, checkpoint_id="folder")
    dcp.load(state, checkpoint_id="folder")  # in any world; straight into the state

What torch writes and reads there is torch's: its metadata and everything that is no tensor are
pickled, it commits nothing, and it would cast. `save_checkpoint` does not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from offload_adam.checkpoint.boxes import Box, boxes_of_range
from offload_adam.checkpoint.content import (
    ParameterNames,
    decoded_optimizer,
    inverse_order,
    memory_order,
)
from offload_adam.checkpoint.encoding import encode
from offload_adam.checkpoint.manifest import FORMAT_VERSION
from offload_adam.sharded_optimizer import ShardedOptimizer
from offload_adam.step.parameter_shard import ParameterShard


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
        cls, shape: Sequence[int], dtype: torch.dtype, sources: Iterable[BoxSource]
    ) -> BoxTensor:
        """Make one of these boxes; where no process has any, torch would lose the tensor."""
        tensor = torch.Tensor._make_wrapper_subclass(cls, torch.Size(shape), dtype=dtype)
        assert isinstance(tensor, BoxTensor)
        tensor._sources = {source.box.offsets: source for source in sources}
        return tensor

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's own has mangled names
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Refuse: there is nothing to compute with."""
        raise NotImplementedError(f"{cls.__name__} is for checkpoints only, and not for {func}")

    def __repr__(self) -> str:  # type: ignore[override]
        """Show the shape and how many boxes are here."""
        return f"BoxTensor(shape={list(self.shape)}, boxes={len(self._sources)})"

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        """Return what of the tensor is here."""
        return [_chunk(source.box) for source in self._sources.values()]

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        """Return one item for each box."""
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                index=MetadataIndex(fqn, torch.Size(source.box.offsets)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(_chunk(source.box), properties, self.shape),
            )
            for source in self._sources.values()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        """Return the elements of one box: to be written, or to be loaded into."""
        assert index.offset is not None
        return self._sources[tuple(index.offset)].tensor()


def _chunk(box: Box) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes))


def logical_box(box: Box, order: Sequence[int]) -> Box:
    """Return a box that counts in dimensions as they lie in memory in logical ones."""
    inverse = inverse_order(order)
    return Box(tuple(box.offsets[i] for i in inverse), tuple(box.sizes[i] for i in inverse))


def _plane_tensor(shard: ParameterShard, plane: torch.Tensor) -> BoxTensor:
    """Return one rank's range of a plane; its boxes are views of it."""
    order = memory_order(shard.parameter)
    shape = shard.parameter.shape
    sources, done = [], 0
    for box in boxes_of_range([shape[dim] for dim in order], shard.start, shard.end):
        numel = torch.Size(box.sizes).numel()
        view = plane[done : done + numel].view(box.sizes).permute(inverse_order(order))
        sources.append(BoxSource(logical_box(box, order), view.detach))
        done += numel
    if shape.numel() == 0:
        none = Box((0,) * len(shape), tuple(shape))
        sources.append(BoxSource(none, plane.view(shape).detach))
    return BoxTensor(shape, plane.dtype, sources)


class OptimizerState:
    """An optimizer as torch's `Stateful`: what `dcp.save` and `dcp.load` ask for its state dict.

    Weights are the model's, which goes beside it. Everything is found by the model's parameter
    names, and the world may be of another size when it is loaded.
    """

    def __init__(self, model: nn.Module, optimizer: ShardedOptimizer) -> None:
        self._name_of = ParameterNames(model)
        self._optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's boxes, which are views of the state, and the rest as JSON."""
        self._optimizer.synchronize()
        self._optimizer.finish_reading()  # it may be to be loaded into
        plain = encode(self._optimizer.plain_state(self._name_of), "optimizer")
        state: dict[str, dict[str, BoxTensor]] = {}
        for shard in self._optimizer.shards():
            planes = {key: _plane_tensor(shard, plane) for key, plane in shard.planes.items()}
            state[self._name_of(shard.parameter)] = planes
        text = plain_text(self._optimizer.num_steps, FORMAT_VERSION, plain)
        return {"state": state, "plain": text}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take what `dcp.load` has read; the boxes have been loaded in place by then.

        Raises:
            CheckpointError: groups or parameters are others.
        """
        values = json.loads(state_dict["plain"])
        plain = decoded_optimizer(values["optimizer"], values.get("format_version", 2))
        self._optimizer.check_plain_state(plain, self._name_of)
        self._optimizer.load_plain_state(plain, self._name_of)
        self._optimizer.num_steps = values["num_steps"]
        self._optimizer.refresh_master()


def plain_text(num_steps: int, format_version: int, plain: Mapping[str, Any]) -> str:
    """Return what is no tensor as the text that stands beside the tensors.

    Args:
        format_version: that `plain` is encoded in, see `decoded_optimizer`.
    """
    values = {"format_version": format_version, "num_steps": num_steps, "optimizer": plain}
    return json.dumps(values, allow_nan=False)
