"""What goes into a checkpoint: every tensor by name, and what is no tensor as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from offload_adam.checkpoint.boxes import boxes_of_range
from offload_adam.checkpoint.files import Blob
from offload_adam.checkpoint.manifest import BLOCK_NBYTES
from offload_adam.errors import CheckpointError
from offload_adam.sharded_optimizer import ShardedOptimizer

DTYPE_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True, slots=True)
class Part:
    """A contiguous range of a named tensor, as it lies in memory.

    Boxes count in the tensor's dimensions as they lie in memory: who reads a file with another
    safetensors reader finds a channels_last weight with its channels last.

    shape, order: of the whole tensor, see `manifest.TensorEntry`.
    data: 1-d, on any device; elements [start, end) in memory order.
    bucket: whose update writes to it, None for none.
    """

    name: str
    shape: tuple[int, ...]
    order: tuple[int, ...]
    start: int
    end: int
    data: torch.Tensor
    bucket: int | None = None

    @property
    def dtype_name(self) -> str:
        """Safetensors' name of the dtype."""
        return DTYPE_NAMES[self.data.dtype]

    def blobs(self) -> Iterator[tuple[Blob, tuple[int, ...]]]:
        """Yield the boxes that the range is cut into, as they lie, with their offsets."""
        memory_shape = [self.shape[dim] for dim in self.order]
        done = 0
        for box in boxes_of_range(memory_shape, self.start, self.end):
            numel = math.prod(box.sizes)
            data = HostBytes(self.data[done : done + numel])
            label = ",".join(map(str, box.offsets))
            yield Blob(f"{self.name}@{label}", self.dtype_name, box.sizes, data), box.offsets
            done += numel


@dataclass(frozen=True, slots=True)
class HostBytes:
    """The bytes of a 1-d tensor, on the host: where they lie, or in copies of one block each."""

    data: torch.Tensor

    def __iter__(self) -> Iterator[memoryview]:
        """Yield views that together are all of it, each valid until the next."""
        if self.data.device.type == "cpu":
            yield as_bytes(self.data)
            return
        for piece in self.data.split(BLOCK_NBYTES // self.data.element_size()):
            yield as_bytes(piece.cpu())


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """Return a 1-d host tensor's memory."""
    if tensor.numel() == 0:
        return memoryview(b"")
    view: memoryview = tensor.detach().view(torch.uint8).numpy().data
    return view


def memory_order(tensor: torch.Tensor) -> tuple[int, ...]:
    """Return a dense tensor's dimensions as they lie in memory, the outermost first."""
    return tuple(sorted(range(tensor.dim()), key=lambda dim: (-tensor.stride()[dim], dim)))


def inverse_order(order: Sequence[int]) -> list[int]:
    """Return what permutes dimensions as they lie in memory back into logical ones."""
    return [order.index(dim) for dim in range(len(order))]


class ParameterNames:
    """A model's names of its parameters, a tied one under its first."""

    def __init__(self, model: nn.Module) -> None:
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}

    def __call__(self, parameter: torch.Tensor) -> str:
        """Return the name of an optimizer's parameter.

        Raises:
            CheckpointError: it is not the model's.
        """
        name = self._names.get(id(parameter))
        if name is None:
            raise CheckpointError(
                f"the optimizer has a parameter of shape {tuple(parameter.shape)} that is not "
                "among the model's: give the model that the optimizer trains"
            )
        return name


def sharded_parts(model: nn.Module, optimizer: ShardedOptimizer) -> Iterator[Part]:
    """Yield this rank's ranges of all trained parameters and their state, bucket by bucket."""
    name_of = ParameterNames(model)
    for shard in optimizer.shards():
        name = name_of(shard.parameter)
        shape, order = tuple(shard.parameter.shape), memory_order(shard.parameter)
        tensors = {f"model/{name}": shard.weight}
        tensors |= {f"optimizer/{name}/{key}": plane for key, plane in shard.planes.items()}
        for full_name, data in tensors.items():
            yield Part(full_name, shape, order, shard.start, shard.end, data, shard.bucket)


def whole_tensors(model: nn.Module, optimizer: ShardedOptimizer) -> dict[str, torch.Tensor]:
    """Return by name what the optimizer does not train: frozen parameters and saved buffers."""
    trained = {id(shard.parameter) for shard in optimizer.shards()}
    saved = model.state_dict(keep_vars=True)
    own = _first_names(model, saved)
    return {
        f"model/{name}": value.detach()
        for name, value in saved.items()
        if isinstance(value, torch.Tensor) and id(value) not in trained and own[id(value)] == name
    }


def tied_names(model: nn.Module) -> dict[str, str]:
    """Return the further names of the model's saved tensors, each with the one it is saved by."""
    saved = model.state_dict(keep_vars=True)
    own = _first_names(model, saved)
    return {
        f"model/{name}": f"model/{own[id(value)]}"
        for name, value in saved.items()
        if isinstance(value, torch.Tensor) and own[id(value)] != name
    }


def _first_names(model: nn.Module, saved: Mapping[str, Any]) -> dict[int, str]:
    """Return the name under which each tensor of a model's state dict is saved."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for name, value in saved.items():
        names.setdefault(id(value), name)
    return names


def whole_part(name: str, tensor: torch.Tensor) -> Part:
    """Return a whole tensor as one part; a copy where its elements do not lie together."""
    if tensor.dtype not in DTYPE_NAMES:
        raise CheckpointError(f"{name} has dtype {tensor.dtype}, which a checkpoint cannot hold")
    order = memory_order(tensor)
    flat = tensor.permute(order).reshape(-1)
    return Part(name, tuple(tensor.shape), order, 0, tensor.numel(), flat)


def to_plain(value: Any) -> Any:
    """Return a state as JSON holds it; tensors become lists.

    Raises:
        CheckpointError: something else in it is no plain value.
    """
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(key): to_plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise CheckpointError(f"a checkpoint cannot hold {value}: JSON has finite numbers only")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise CheckpointError(
        f"a checkpoint cannot hold a {type(value).__name__}: give numbers, text, lists and mappings"
    )
