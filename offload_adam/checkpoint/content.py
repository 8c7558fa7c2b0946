"""What goes into a checkpoint: every tensor by name, and all other values as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from offload_adam.checkpoint.encoding import decode
from offload_adam.checkpoint.files import Blob
from offload_adam.checkpoint.manifest import BLOCK_NBYTES
from offload_adam.errors import CheckpointError
from offload_adam.layout.boxes import boxes_of_range
from offload_adam.sharded_optimizer import ShardedOptimizer
from offload_adam.step.box_tensor import memory_order
from offload_adam.torch_private import is_lazy

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


@dataclass(frozen=True, slots=True)
class ModelState:
    """A model's state dict but for what the optimizer trains, by names in a checkpoint.

    whole: frozen parameters and saved buffers, the live tensors.
    computed: tensors that a module computes when it is saved, from which `load_state_dict` restores
        its state: `get_extra_state`, a `_save_to_state_dict` of its own, state-dict hooks.
    values: as `computed`, entries that are no tensors.
    tied: further names of live tensors, each with the one that the tensor is saved under.
    """

    whole: dict[str, torch.Tensor]
    computed: dict[str, torch.Tensor]
    values: dict[str, Any]
    tied: dict[str, str]


def model_state(model: nn.Module, optimizer: ShardedOptimizer) -> ModelState:
    """Divide a model's state dict into its live tensors and its computed entries.

    Raises:
        CheckpointError: a tensor of it is not initialized.
    """
    trained = {id(shard.parameter) for shard in optimizer.shards()}
    own = {id(p): name for name, p in model.named_parameters() if id(p) in trained}
    live = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    by_memory = {_memory(tensor): tensor for tensor in live.values()}
    by_memory.pop(None, None)
    computed_from_trained = set(own.values())
    found = ModelState({}, {}, {}, {})
    for name, value in model.state_dict(keep_vars=True).items():
        full_name = f"model/{name}"
        if not isinstance(value, torch.Tensor):
            found.values[full_name] = value
            continue
        if is_lazy(value):
            raise CheckpointError(f"{name!r} of the model is not initialized: run a forward first")
        # A hook may detach a live tensor, which makes another object of the same memory.
        tensor = live.get(id(value), by_memory.get(_memory(value)))
        if tensor is not None:
            first = own.setdefault(id(tensor), name)
            if first != name:
                found.tied[full_name] = f"model/{first}"
            elif id(tensor) not in trained:
                found.whole[full_name] = tensor.detach()
        elif name not in computed_from_trained:
            found.computed[full_name] = value.detach()
    return found


def _memory(tensor: torch.Tensor) -> tuple[object, ...] | None:
    """Return what two objects that are the same tensor have in common, None without memory."""
    if is_lazy(tensor) or tensor.layout is not torch.strided or tensor.data_ptr() == 0:
        return None
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def whole_part(name: str, tensor: torch.Tensor) -> Part:
    """Return a whole tensor as one part; a copy where its elements do not lie together."""
    if tensor.layout is not torch.strided:
        raise CheckpointError(
            f"{name} has layout {tensor.layout}: a checkpoint holds dense tensors"
        )
    if tensor.dtype not in DTYPE_NAMES:
        raise CheckpointError(f"{name} has dtype {tensor.dtype}, which a checkpoint cannot hold")
    order = memory_order(tensor)
    flat = tensor.permute(order).reshape(-1)
    return Part(name, tuple(tensor.shape), order, 0, tensor.numel(), flat)


def decoded_optimizer(saved: Mapping[str, Any], format_version: int) -> Any:
    """Return what `plain_state` gave, from what a checkpoint has of it.

    Raises:
        CheckpointError: it cannot be decoded.
    """
    if format_version > 2:
        return decode(saved, "the saved optimizer")
    # Format 2 had no tags, and made a list of the only tuple.
    groups = [
        {**group, "options": {**group["options"], "betas": tuple(group["options"]["betas"])}}
        for group in saved["groups"]
    ]
    return {**saved, "groups": groups}
