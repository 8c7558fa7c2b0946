"""What goes into a checkpoint: every tensor by name, and what is no tensor as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from offload_adam.checkpoint.boxes import boxes_of_range
from offload_adam.checkpoint.files import Blob
from offload_adam.errors import CheckpointError
from offload_adam.sharded_optimizer import ShardedOptimizer
from offload_adam.step.parameter_shard import ParameterShard

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


@dataclass(frozen=True, slots=True)
class Part:
    """A contiguous range of a named tensor, as it lies in memory.

    Boxes count in the tensor's dimensions as they lie in memory: who reads a file with another
    safetensors reader finds a channels_last weight with its channels last.

    shape, order: of the whole tensor, see `manifest.TensorEntry`.
    data: 1-d, on any device; elements [start, end) in memory order.
    """

    name: str
    shape: tuple[int, ...]
    order: tuple[int, ...]
    start: int
    end: int
    data: torch.Tensor

    @property
    def dtype_name(self) -> str:
        """Safetensors' name of the dtype."""
        return DTYPE_NAMES[self.data.dtype]

    def blobs(self) -> Iterator[tuple[Blob, tuple[int, ...]]]:
        """Yield the boxes that the range is cut into, as they lie, with their offsets."""
        host = self.data if self.data.device.type == "cpu" else self.data.cpu()
        view = as_bytes(host)
        itemsize = host.element_size()
        memory_shape = [self.shape[dim] for dim in self.order]
        done = 0
        for box in boxes_of_range(memory_shape, self.start, self.end):
            numel = 1
            for size in box.sizes:
                numel *= size
            data = view[done * itemsize : (done + numel) * itemsize]
            label = ",".join(map(str, box.offsets))
            yield Blob(f"{self.name}@{label}", self.dtype_name, box.sizes, data), box.offsets
            done += numel


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """Return a 1-d host tensor's memory."""
    if tensor.numel() == 0:
        return memoryview(b"")
    view: memoryview = tensor.detach().view(torch.uint8).numpy().data
    return view


def memory_order(tensor: torch.Tensor) -> tuple[int, ...]:
    """Return a dense tensor's dimensions as they lie in memory, the outermost first."""
    return tuple(sorted(range(tensor.dim()), key=lambda dim: (-tensor.stride()[dim], dim)))


def parameter_names(model: nn.Module) -> dict[int, str]:
    """Return the name of each parameter of a model, a tied one under its first."""
    return {id(parameter): name for name, parameter in model.named_parameters()}


def name_of(shard: ParameterShard, names: Mapping[int, str]) -> str:
    """Return the model's name of an optimizer's parameter.

    Raises:
        CheckpointError: it is not the model's.
    """
    name = names.get(id(shard.parameter))
    if name is None:
        raise CheckpointError(
            f"the optimizer has a parameter of shape {tuple(shard.parameter.shape)} that is not "
            "among the model's: give the model that the optimizer trains"
        )
    return name


def sharded_parts(model: nn.Module, optimizer: ShardedOptimizer) -> Iterator[Part]:
    """Yield this rank's ranges of all trained parameters and their state."""
    names = parameter_names(model)
    for shard in optimizer.shards():
        name = name_of(shard, names)
        shape, order = tuple(shard.parameter.shape), memory_order(shard.parameter)
        yield Part(f"model/{name}", shape, order, shard.start, shard.end, shard.weight)
        for key, plane in shard.planes.items():
            yield Part(f"optimizer/{name}/{key}", shape, order, shard.start, shard.end, plane)


def whole_tensors(model: nn.Module, optimizer: ShardedOptimizer) -> dict[str, torch.Tensor]:
    """Return by name what the optimizer does not train: frozen parameters and saved buffers."""
    trained = {id(shard.parameter) for shard in optimizer.shards()}
    saved = model.state_dict(keep_vars=True)
    seen: set[int] = set()
    found = {}
    for name, value in saved.items():
        if isinstance(value, torch.Tensor) and id(value) not in trained | seen:
            seen.add(id(value))
            found[f"model/{name}"] = value.detach()
    return found


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
