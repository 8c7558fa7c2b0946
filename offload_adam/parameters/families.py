"""Which parameters can be optimized, and which of them may share a bucket."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from offload_adam.kernels.formats import FloatFormat
from offload_adam.torch_private import PARTITIONER_MARKS, is_lazy

_FORMATS = {
    torch.float32: FloatFormat.FLOAT32,
    torch.bfloat16: FloatFormat.BFLOAT16,
    torch.float16: FloatFormat.FLOAT16,
}
_DEVICES = ("cpu", "cuda")


def float_format(dtype: torch.dtype) -> FloatFormat:
    """Return the kernels' name for a dtype that `check_parameter` has admitted."""
    return _FORMATS[dtype]


def family_of(parameter: torch.Tensor) -> str:
    """Return what parameters of one bucket share: dtype and device."""
    return f"{parameter.dtype}@{parameter.device}"


def check_parameter(name: str, parameter: torch.Tensor) -> None:
    """Refuse a parameter that cannot be updated, naming it.

    Raises:
        TypeError: a tensor subclass such as DTensor; one rank's part of a parameter, from FSDP1 or
            DeepSpeed ZeRO-3.
        ValueError: not initialised yet, made in inference mode, sparse, complex, of another dtype
            than fp32, bf16 and fp16, on another device than CPU and CUDA, or with elements that
            share memory.
    """
    if is_lazy(parameter):
        raise ValueError(
            f"parameter {name!r} is not initialised yet: run a forward of the model, which gives "
            "lazy modules their shapes, before the optimizer is made"
        )
    if parameter.is_inference():
        raise ValueError(
            f"parameter {name!r} was made in inference mode, and cannot be written: make the model "
            "outside of torch.inference_mode()"
        )
    for mark, partitioner in PARTITIONER_MARKS.items():
        if hasattr(parameter, mark):
            raise TypeError(
                f"parameter {name!r} belongs to {partitioner}: each rank holds another part, which "
                "rank 0's would overwrite. Wrap the model in DistributedDataParallel, or leave it "
                "unwrapped: the optimizer state is sharded either way"
            )
    data = parameter.data
    if type(data) is not torch.Tensor:
        raise TypeError(
            f"parameter {name!r} is a {type(data).__name__}: only plain tensors can be optimized"
        )
    if data.layout is not torch.strided:
        raise ValueError(f"parameter {name!r} is {data.layout}: only dense parameters can be")
    if data.dtype not in _FORMATS:
        supported = ", ".join(str(dtype) for dtype in _FORMATS)
        raise ValueError(f"parameter {name!r} has dtype {data.dtype}; supported are {supported}")
    if data.device.type not in _DEVICES:
        raise ValueError(
            f"parameter {name!r} is on device {str(data.device)!r}; supported are CPU and CUDA: "
            "materialise and move the model before the optimizer is made"
        )
    if any(
        stride == 0 and size > 1 for size, stride in zip(data.shape, data.stride(), strict=True)
    ):
        raise ValueError(
            f"parameter {name!r} is expanded, its elements share memory: .clone() it first"
        )


def memory_strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """Return the strides a parameter has in its bucket: its own if dense, else contiguous ones.

    Dense means that its elements fill one stretch of memory without gaps, as in channels_last.
    """
    order = sorted(range(tensor.dim()), key=lambda dim: (tensor.stride(dim), tensor.shape[dim]))
    expected = 1
    for dim in order:
        if tensor.shape[dim] != 1:
            if tensor.stride(dim) != expected:
                return _contiguous_strides(tensor.shape)
            expected *= tensor.shape[dim]
    return tensor.stride()


def _contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    strides = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def refuse_overlaps(names: Sequence[str], parameters: Sequence[torch.Tensor]) -> None:
    """Refuse distinct parameters that lie over each other in memory, naming both.

    Tied weights are one parameter used twice and pass; two parameters over one memory would each be
    given memory of its own, and the tie would be lost in silence.
    """
    extents = sorted(
        (str(parameter.device), *_extent(parameter), name)
        for name, parameter in zip(names, parameters, strict=True)
        if parameter.numel() > 0
    )
    for (device, _, end, name), (next_device, start, _, next_name) in pairwise(extents):
        if device == next_device and start < end:
            raise ValueError(
                f"parameters {name!r} and {next_name!r} overlap in memory: pass one parameter that "
                "both modules use (tied weights), or .clone() one of them"
            )


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the half-open range of addresses between a tensor's first and last element."""
    last = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()
