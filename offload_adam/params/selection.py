"""Select the parameters to optimize, and reject unsupported ones."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch

from offload_adam.fsdp_private import is_dtensor, local_of, placement_of
from offload_adam.options import StateFormat
from offload_adam.params.elements import FORMATS, memory_strides
from offload_adam.params.groups import hyperparameters_of, names_of
from offload_adam.params.local_shard import LocalShard
from offload_adam.torch_private import PARTITIONER_MARKS, is_lazy

_DEVICES = ("cpu", "cuda")

Named = tuple[str, torch.nn.Parameter]


def bucket_key_of(parameter: torch.Tensor) -> str:
    """Return a key that all parameters of one bucket share: dtype and device."""
    return f"{parameter.dtype}@{parameter.device}"


def check_parameter(name: str, parameter: torch.Tensor) -> None:
    """Check that a parameter can be optimized. Error messages call it `name`.

    Raises:
        TypeError: it is a tensor subclass other than DTensor, or one rank's part of a parameter
            from FSDP1 or DeepSpeed ZeRO-3.
        ValueError: it is not initialised yet, was created in inference mode, is sparse, is not
            fp32, bf16 or fp16, is not on CPU or CUDA, or its elements share memory.
    """
    if is_lazy(parameter):
        raise ValueError(
            f"Parameter {name!r} is not initialised yet. Run a forward of the model, which gives "
            "lazy modules their shapes, before you construct the optimizer."
        )
    if parameter.is_inference():
        raise ValueError(
            f"Parameter {name!r} was created in inference mode and cannot be modified. Construct "
            "the model outside torch.inference_mode()."
        )
    for mark, partitioner in PARTITIONER_MARKS.items():
        if hasattr(parameter, mark):
            raise TypeError(
                f"Parameter {name!r} belongs to {partitioner}, which shards parameters over the "
                "ranks. Shard the model with FSDP2 (fully_shard) instead, wrap it in "
                "DistributedDataParallel, or do not wrap it: this optimizer shards its state."
            )
    # Without the class Parameter, but still with a tensor subclass.
    data = local_of(parameter) if is_dtensor(parameter) else parameter.data
    if type(data) is not torch.Tensor:
        raise TypeError(
            f"Parameter {name!r} is a {type(data).__name__}. Only plain tensors are supported, and "
            "DTensors of them: keep the parameter as fp32 or bf16."
        )
    if data.layout is not torch.strided:
        raise ValueError(
            f"Parameter {name!r} has the layout {data.layout}. Only dense tensors are supported."
        )
    if data.dtype not in FORMATS:
        supported = ", ".join(str(dtype) for dtype in FORMATS)
        raise ValueError(f"Parameter {name!r} has dtype {data.dtype}. Supported are {supported}.")
    if data.device.type not in _DEVICES:
        raise ValueError(
            f"Parameter {name!r} is on device {str(data.device)!r}, but only CPU and CUDA are "
            "supported. Materialise and move the model before you construct the optimizer."
        )
    strides = data.stride()
    if 0 in strides and any(
        stride == 0 and size > 1 for size, stride in zip(data.shape, strides, strict=True)
    ):
        raise ValueError(
            f"Parameter {name!r} is expanded, so its elements share memory. Use a .clone() of it "
            "in the model."
        )


def reject_overlaps(members: Iterable[Named]) -> None:
    """Reject distinct parameters that overlap in memory. One parameter used twice is allowed.

    Raises:
        ValueError: the message names both.
    """
    # Two parameters over the same memory would move to different parts of a bucket, so they would
    # silently no longer be tied.
    extents = sorted(
        (str(tensor.device), *_extent(tensor), name)
        for name, tensor in ((name, local_of(parameter)) for name, parameter in members)
        if tensor.numel() > 0
    )
    for (device, _, end, name), (next_device, start, _, next_name) in pairwise(extents):
        if device == next_device and start < end:
            raise ValueError(
                f"Parameters {name!r} and {next_name!r} overlap in memory. Use one parameter in "
                "both modules (tied weights), or .clone() one of them."
            )


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the range [first, end) of addresses that a tensor spans."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum([(size - 1) * stride for size, stride in steps])
    first = tensor.data_ptr()
    return first, first + (last + 1) * tensor.element_size()


@dataclass(frozen=True, slots=True)
class NewParameter:
    """A trainable parameter for which the optimizer will allocate state.

    index: index among all trainable parameters of the optimizer.
    state_format: the format of its state.
    group: index of its hyperparameters in `StepInputs.hyperparameters`. This is the index of its
        parameter group, unless the optimizer has several sets of hyperparameters for one group.
    centralized: the mean over all dimensions but the first is subtracted from its gradients.
    shard: this rank's part of it, if parameters of the optimizer are sharded over the ranks.
    """

    index: int
    name: str
    parameter: torch.nn.Parameter
    group: int
    amsgrad: bool
    state_format: StateFormat = "fp32"
    centralized: bool = False
    shard: LocalShard | None = None

    @property
    def local(self) -> torch.Tensor:
        """The elements of the parameter that this rank has, as a plain tensor."""
        return local_of(self.parameter)

    @property
    def is_the_same_on_all_ranks(self) -> bool:
        """Whether all ranks have the whole parameter."""
        return not is_dtensor(self.parameter) and not (self.shard and self.shard.is_distinct)

    @property
    def bucket_key(self) -> str:
        """A key that all parameters of one bucket share: dtype, device and planes of state."""
        is_low = self.state_format != "fp32"
        planes = f"+{self.state_format} state" if is_low else "+amsgrad" if self.amsgrad else ""
        return bucket_key_of(self.local) + planes

    @property
    def unit(self) -> str:
        """What else all parameters of one bucket share, if parameters are sharded over ranks."""
        if self.shard is None:
            return ""
        return f"{self.shard.key}, {'part' if is_dtensor(self.parameter) else 'whole'}"


@dataclass(frozen=True, slots=True)
class Selection:
    """The trainable (`new`) and the frozen parameters of some groups."""

    new: list[NewParameter]
    frozen: list[Named]


def select_parameters(
    groups: Sequence[Mapping[str, Any]],
    module: torch.nn.Module | None,
    *,
    known: Collection[torch.Tensor],
    first_group: int,
    state_format: StateFormat = "fp32",
    shard_of: Callable[[str, torch.Tensor, Any], LocalShard] | None = None,
) -> Selection:
    """Separate the trainable parameters of these groups from the frozen ones.

    Args:
        module: gives names to the parameters; None to use their positions.
        known: parameters that already have state, to leave out.
        first_group: index of the first of `groups` in `param_groups`.
        state_format: the format for tensors with two or more dimensions in groups without their own
            `state_format`.
        shard_of: `ShardedModel.shard_of`, None if no parameter is sharded.
    """
    selection = Selection([], [])
    names = names_of(groups, module, first_group=first_group)
    for number, (group, group_names) in enumerate(zip(groups, names, strict=True), first_group):
        for name, parameter in zip(group_names, group["params"], strict=True):
            if parameter in known:
                continue
            if parameter.requires_grad:
                index = len(known) + len(selection.new)
                centralized = group.get("grad_centralization", False) and parameter.dim() > 1
                shard = shard_of and shard_of(name, parameter, group.get("replicas"))
                default = state_format if follows_state_format(parameter) else "fp32"
                selection.new.append(
                    NewParameter(
                        index,
                        name,
                        parameter,
                        number,
                        amsgrad=group["amsgrad"],
                        state_format=group.get("state_format") or default,
                        centralized=centralized,
                        shard=shard,
                    )
                )
            else:
                selection.frozen.append((name, parameter))
    return selection


def follows_state_format(parameter: torch.Tensor) -> bool:
    """Return whether the optimizer's `state_format` applies to a parameter.

    A group's own `state_format` applies to all of its parameters.
    """
    # Biases and norms have few elements, and training is sensitive to their precision.
    return not is_lazy(parameter) and parameter.dim() > 1


def check_parameters(new: Sequence[NewParameter], known: Iterable[Named]) -> None:
    """Check that parameters can be optimized and do not overlap in memory.

    Args:
        known: parameters that already have state.

    Raises:
        TypeError, ValueError: the message names the parameter.
    """
    members = [(item.name, item.parameter) for item in new]
    seen: set[torch.nn.Parameter] = set()
    for item in new:
        if item.amsgrad and item.state_format != "fp32":
            raise ValueError(
                f"Parameter {item.name!r} has amsgrad=True and state_format={item.state_format!r}, "
                "but the largest second moment needs fp32. Pass amsgrad=False or "
                "state_format='fp32'."
            )
    for name, parameter in members:
        check_parameter(name, parameter)
        if parameter in seen:
            raise ValueError(
                f"Parameter {name!r} is twice in its group. List it once. torch warns of this and "
                "updates the parameter twice in each step."
            )
        seen.add(parameter)
    reject_overlaps([*members, *known])


def reject_unrelated(module: torch.nn.Module | None, groups: Sequence[Mapping[str, Any]]) -> None:
    """Reject a module that has none of the parameters, because it must be the wrong module.

    Raises:
        ValueError: the message names the module's type.
    """
    if module is None:
        return
    held = set(map(id, module.parameters()))
    if not any(id(parameter) in held for group in groups for parameter in group["params"]):
        raise ValueError(
            f"module= is a {type(module).__name__} that has none of the parameters. Pass the model "
            "that has these parameters, or leave module= out."
        )


def describe(
    selection: Selection, groups: Sequence[Mapping[str, Any]], *, first_group: int
) -> list[tuple[str, str]]:
    """Return the fields that must be equal on all ranks, as (description, value)."""
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
            # Not the device: each rank has its own GPU.
            (f"the device type of {item.name!r}", item.local.device.type),
            # A shard is a range in memory order, so other strides would mix up elements.
            (f"the strides of {item.name!r}", str(memory_strides(parameter))),
            (f"the group of {item.name!r}", str(item.group)),
            (f"the state format of {item.name!r}", item.state_format),
            (f"the centralization of {item.name!r}", str(item.centralized)),
            (f"the placement of {item.name!r}", placement_of(parameter)),
        ]
    for number, group in enumerate(groups, first_group):
        values = asdict(hyperparameters_of(group)) | {"amsgrad": group["amsgrad"]}
        fields += [(f"{name} of group {number}", repr(value)) for name, value in values.items()]
    return fields
