"""Which parameters are optimized, which are rejected, and which of them share a bucket."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch

from offload_adam.params.elements import FORMATS, memory_strides
from offload_adam.params.groups import hyperparameters_of, names_of
from offload_adam.torch_private import PARTITIONER_MARKS, is_lazy

_DEVICES = ("cpu", "cuda")

Named = tuple[str, torch.nn.Parameter]


def bucket_key_of(parameter: torch.Tensor) -> str:
    """Return what parameters of one bucket share: dtype and device."""
    return f"{parameter.dtype}@{parameter.device}"


def check_parameter(name: str, parameter: torch.Tensor) -> None:
    """Reject a parameter that cannot be updated, naming it.

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
    if data.dtype not in FORMATS:
        supported = ", ".join(str(dtype) for dtype in FORMATS)
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


def _reject_overlaps(members: Iterable[Named]) -> None:
    """Reject distinct parameters that overlap in memory, naming both.

    Tied weights are one parameter used twice, and pass. Two parameters over the same memory would
    each get memory of its own, and the tie would be lost silently.
    """
    extents = sorted(
        (str(parameter.device), *_extent(parameter), name)
        for name, parameter in members
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


@dataclass(frozen=True, slots=True)
class NewParameter:
    """A trainable parameter that the optimizer is about to allocate state for.

    index: counts over all trainable parameters.
    group: index of its hyperparameters among those of a step. This is its parameter group, unless
        the optimizer keeps several sets of hyperparameters for one group.
    centralized: the mean over all dimensions but the first is subtracted from its gradients.
    """

    index: int
    name: str
    parameter: torch.nn.Parameter
    group: int
    amsgrad: bool
    centralized: bool = False

    @property
    def bucket_key(self) -> str:
        """What the parameters of one bucket share: dtype, device, and which planes they have."""
        return bucket_key_of(self.parameter) + ("+amsgrad" if self.amsgrad else "")


@dataclass(frozen=True, slots=True)
class Selection:
    """The parameters of some groups: those that get state, and by name those that do not."""

    new: list[NewParameter]
    frozen: list[Named]


def select_parameters(
    groups: Sequence[Mapping[str, Any]],
    module: torch.nn.Module | None,
    *,
    first_index: int,
    first_group: int,
) -> Selection:
    """Separate the trainable parameters of these groups from the frozen ones, and number them."""
    selection = Selection([], [])
    names = names_of(groups, module, first_group=first_group)
    for number, (group, group_names) in enumerate(zip(groups, names, strict=True), first_group):
        for name, parameter in zip(group_names, group["params"], strict=True):
            if parameter.requires_grad:
                index = first_index + len(selection.new)
                centralized = group.get("grad_centralization", False) and parameter.dim() > 1
                selection.new.append(
                    NewParameter(index, name, parameter, number, group["amsgrad"], centralized)
                )
            else:
                selection.frozen.append((name, parameter))
    return selection


def check_parameters(new: Iterable[NewParameter], known: Iterable[Named]) -> None:
    """Reject parameters that cannot be optimized, or that overlap in memory with others.

    Args:
        known: parameters that are optimized already.

    Raises:
        TypeError, ValueError: naming the parameter.
    """
    members = [(item.name, item.parameter) for item in new]
    for name, parameter in members:
        check_parameter(name, parameter)
    _reject_overlaps([*members, *known])


def reject_unrelated(module: torch.nn.Module | None, groups: Sequence[Mapping[str, Any]]) -> None:
    """Reject a module that holds none of the parameters: it is the wrong module.

    Raises:
        ValueError: naming the module's type.
    """
    if module is None:
        return
    held = set(map(id, module.parameters()))
    if not any(id(parameter) in held for group in groups for parameter in group["params"]):
        raise ValueError(
            f"module= is a {type(module).__name__} that holds none of the parameters: pass the "
            "model whose parameters these are, as it is now, or leave module= out"
        )


def describe(
    selection: Selection, groups: Sequence[Mapping[str, Any]], *, first_group: int
) -> list[tuple[str, str]]:
    """Describe what every rank must have in common, field by field."""
    fields = [
        ("the number of parameter groups", str(len(groups))),
        ("the number of trainable parameters", str(len(selection.new))),
        ("the frozen parameters", ", ".join(name for name, _ in selection.frozen) or "none"),
    ]
    for item in selection.new:
        parameter = item.parameter
        fields += [
            (f"the name of parameter {item.index}", item.name),
            (f"the shape of {item.name!r}", str(tuple(parameter.shape))),
            (f"the dtype of {item.name!r}", str(parameter.dtype)),
            (f"the device type of {item.name!r}", parameter.device.type),
            (f"the strides of {item.name!r}", str(memory_strides(parameter))),
            (f"the group of {item.name!r}", str(item.group)),
            (f"the centralization of {item.name!r}", str(item.centralized)),
        ]
    for number, group in enumerate(groups, first_group):
        values = asdict(hyperparameters_of(group)) | {"amsgrad": group["amsgrad"]}
        fields += [(f"{name} of group {number}", repr(value)) for name, value in values.items()]
    return fields
