"""The dtypes of the tensors that a checkpoint holds, and how their bits are copied.

A checkpoint holds every dtype of torch except quantized ones: the scale and zero point of a
quantized tensor are not among its elements.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from offload_adam.errors import CheckpointError
from offload_adam.fsdp_private import is_dtensor, local_of
from offload_adam.torch_private import no_torch_function

_IN_SAFETENSORS = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "C64": "complex64",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
"""Names in safetensors, and torch's names."""

TORCH_DTYPES = {
    str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)
}
"""All dtypes of this torch by their text, such as "torch.float32"."""

MAX_DIMS = 64
"""Dimensions of a tensor. Most operations of torch allow no more."""

_QUANTIZED = ("qint8", "qint32", "quint8", "quint4x2", "quint2x4")
DTYPES = {name: getattr(torch, own) for name, own in _IN_SAFETENSORS.items()} | {
    # Not in safetensors, or with a shape that counts two elements a byte (float4_e2m1fn_x2).
    str(dtype).removeprefix("torch."): dtype
    for dtype in TORCH_DTYPES.values()
    if str(dtype).removeprefix("torch.") not in {*_IN_SAFETENSORS.values(), *_QUANTIZED}
}
"""The dtypes of a checkpoint's tensors by their names in the manifest: those of safetensors, where
it has the dtype, and torch's."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# One dtype of each size that torch copies on every device. It has no copy for int4, for example.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


def safetensors_entry(dtype: torch.dtype, shape: list[int]) -> tuple[str, list[int]]:
    """Return the dtype and shape under which a file of safetensors holds a tensor.

    A dtype that safetensors lacks is held as its bytes, in one more dimension.
    """
    name = DTYPE_NAMES[dtype]
    return (name, shape) if name in _IN_SAFETENSORS else ("U8", [*shape, dtype.itemsize])


def is_wrapper(tensor: torch.Tensor) -> bool:
    """Return whether a subclass decides what operations do: it may have no memory of its own."""
    return type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__


def parts_of(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors that a tensor of a model consists of, each with its name.

    Most consist of one, under `name`. A weight of torchao consists of several, such as
    `model/weight/qdata` and `model/weight/scale`. Each is a result of `saveable`, or a DTensor
    whose local part is.

    Raises:
        CheckpointError: as `saveable`.
    """
    if is_dtensor(tensor):
        saveable(name, local_of(tensor))
        yield name, tensor
        return
    if not is_wrapper(tensor) or not hasattr(tensor, "__tensor_flatten__"):
        yield name, saveable(name, tensor)
        return
    keys, _ = tensor.__tensor_flatten__()
    for key in keys:
        yield from parts_of(f"{name}/{key}", getattr(tensor, key))


def saveable(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of a model as one of no subclass, over the same memory, without gradients.

    Raises:
        CheckpointError: a checkpoint cannot hold it; the message says what it is and what to do.
    """
    leave_out = "leave it out of the state dict (a buffer: persistent=False)."
    if is_wrapper(tensor):
        kind = type(tensor)
        raise CheckpointError(
            f"{name} is a {kind.__module__}.{kind.__qualname__} of dtype {tensor.dtype}, whose "
            "elements are not in the memory of this process. Register the tensors that it consists "
            f"of as buffers instead, or {leave_out}"
        )
    if tensor.is_meta:
        raise CheckpointError(
            f"{name} is on the meta device, so it has no values. Give it values, for example with "
            f"to_empty(), or {leave_out}"
        )
    if tensor.is_quantized:
        raise CheckpointError(
            f"{name} has dtype {tensor.dtype}, whose scale and zero point a checkpoint cannot "
            "hold. Register its int_repr(), its scale and its zero point as buffers instead, or "
            f"{leave_out}"
        )
    if tensor.layout is not torch.strided or tensor.is_nested:
        layout = "torch.nested" if tensor.is_nested else tensor.layout
        raise CheckpointError(
            f"{name} has layout {layout}, but checkpoints hold only dense tensors. Convert it "
            f"with to_dense(), or {leave_out}"
        )
    if tensor.dim() > MAX_DIMS:
        raise CheckpointError(
            f"{name} has {tensor.dim()} dimensions, but checkpoints hold at most {MAX_DIMS}. "
            f"Reshape it, or {leave_out}"
        )
    # A subclass such as bitsandbytes' Params4bit may override functions of torch.
    plain: torch.Tensor = no_torch_function(
        torch.Tensor.as_subclass, (), (tensor, torch.Tensor), {}
    )
    return plain.detach()


def is_lazy_view(tensor: torch.Tensor) -> bool:
    """Return whether the values differ from those in memory: a conjugate or a negated view."""
    return tensor.is_conj() or tensor.is_neg()


def as_bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return a view in a dtype that torch copies on every device. `tensor` is no lazy view."""
    return tensor.view(_BITS[tensor.element_size()])


def in_order(tensor: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """Return the elements as a contiguous 1-d tensor, with the dimensions in this order.

    A view where possible, else a copy.
    """
    values = tensor.resolve_conj().resolve_neg()
    # `reshape` alone may return a view with gaps.
    return as_bits(values).permute(order).reshape(-1).contiguous().view(tensor.dtype)


def equal_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors of the same shape and dtype are equal in every bit."""
    order = tuple(range(one.dim()))
    # As bytes, because torch cannot copy or compare tensors of all dtypes.
    found = (in_order(tensor, order).view(torch.uint8).cpu() for tensor in (one, other))
    return torch.equal(*found)


def copy_bits(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy the elements of a tensor of the same shape and dtype, with every bit."""
    if is_lazy_view(target):
        target.copy_(source)  # conjugates or negates the values that it writes to memory
    else:
        as_bits(target).copy_(as_bits(source))
