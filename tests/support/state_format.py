"""A model for tests of state formats, its shardings, and training runs to compare."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from offload_adam import OffloadAdamW, OffloadPolicy

Values = dict[str, torch.Tensor]
"""Whole parameters, state and step counts, by name."""

NUM_STEPS = 5
NUM_BEFORE = 3
"""Steps before a save. The other steps of `NUM_STEPS` follow it."""
WITHOUT_SECOND = 1
"""The step in which `second.weight` has no gradient, so that its step count differs."""


class Layer(nn.Linear):
    """A layer whose loss has exactly the given gradients. Its forward takes them as input."""

    def forward(self, gradients: Values) -> torch.Tensor:  # type: ignore[override]
        terms = [
            (value * gradients[name]).sum().float()
            for name, value in self.named_parameters()
            if name in gradients
        ]
        return sum(terms, torch.zeros(()))


class Net(nn.Module):
    """Layers in bf16 and fp32.

    Args:
        aligned: rows have whole blocks of 128 elements, so ranks that divide rows do not divide
            blocks. Otherwise no size is a multiple of 128 elements or of the ranks.
    """

    def __init__(self, *, aligned: bool = False) -> None:
        super().__init__()
        widths = (128, 256, 128, 128) if aligned else (21, 37, 13, 6)
        self.first = Layer(widths[0], 37, dtype=torch.bfloat16)
        self.second = Layer(widths[1], 21, dtype=torch.bfloat16)
        self.exact = Layer(widths[2], 29, dtype=torch.float32)
        self.table = Layer(widths[3], 137, bias=False, dtype=torch.bfloat16)

    def forward(self, gradients: Values) -> torch.Tensor:
        """Return the loss; it does not depend on parameters without a gradient."""
        losses = [
            layer(
                {
                    name.removeprefix(f"{place}."): gradient
                    for name, gradient in gradients.items()
                    if name.startswith(f"{place}.")
                }
            )
            for place, layer in self.named_children()
        ]
        return torch.stack(losses).sum()


def plain(net: Net) -> None:
    """Leave the model unsharded: only the optimizer shards its state."""


def fsdp(net: Net) -> None:
    for layer in (net.exact, net.first):
        fully_shard(layer)
    fully_shard(net)


def fsdp_by_column(net: Net) -> None:
    def placed(parameter: nn.Parameter) -> Shard | None:
        return Shard(1) if parameter.dim() > 1 and parameter.shape[1] % 2 == 0 else None

    fully_shard(net.exact)
    fully_shard(net, shard_placement_fn=placed)


def hybrid(net: Net) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    fully_shard(net.exact, mesh=mesh)
    fully_shard(net, mesh=mesh)


_TENSOR_PLAN = {"first": ColwiseParallel(), "second": RowwiseParallel()}


def tensor_parallel(net: Net) -> None:
    parallelize_module(net, init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)), _TENSOR_PLAN)


def grid(net: Net) -> None:
    """Shard by tensor parallelism over two ranks, and by FSDP2 over two."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(net, mesh["tp"], _TENSOR_PLAN)
    for layer in (net.exact, net.first):
        fully_shard(layer, mesh=mesh["dp"])
    fully_shard(net, mesh=mesh["dp"])


class Layout(NamedTuple):
    """A world size, and how the model is sharded over it."""

    world_size: int
    shard: Callable[[Net], None]


LAYOUTS = {
    "plain 1": Layout(1, plain),
    "plain 2": Layout(2, plain),
    "plain 3": Layout(3, plain),
    "fsdp 1": Layout(1, fsdp),
    "fsdp 2": Layout(2, fsdp),
    "fsdp 4": Layout(4, fsdp),
    "columns 2": Layout(2, fsdp_by_column),
    "hsdp 4": Layout(4, hybrid),
    "tp 2": Layout(2, tensor_parallel),
    "grid 4": Layout(4, grid),
}


def make(
    layout: str,
    seed: int = 0,
    *,
    state_format: str = "bf16",
    aligned: bool = False,
    streams: bool = False,
    kind: Any = OffloadAdamW,
    **options: Any,
) -> tuple[Net, Any]:
    """Return a model under a layout, and its optimizer.

    Args:
        state_format: format of matrices, and of the first layer's bias unless `aligned`. Other
            biases have fp32 state.
        aligned: see `Net`.
        streams: move gradients during backward.
        kind: class of the optimizer.
        options: further arguments of the optimizer.
    """
    torch.manual_seed(seed)
    net = Net(aligned=aligned)
    LAYOUTS[layout].shard(net)
    named = list(net.named_parameters())
    groups: list[dict[str, Any]] = [
        {"params": [each for each in named if each[0] != "first.bias"]},
        {
            "params": [each for each in named if each[0] == "first.bias"],
            "state_format": "fp32" if aligned else state_format,
        },
    ]
    if layout in ("tp 2", "grid 4"):
        for group in groups:
            group["replicas"] = "copies"  # tensor parallelism leaves copies of the other layers
    settings: dict[str, Any] = {
        "lr": 1e-2,
        "weight_decay": 0.1,
        "state_format": state_format,
        "num_threads": 1,
        "offload": OffloadPolicy(bucket_nbytes=1000),
        "module": net if streams else None,
    }
    return net, kind(groups, **settings | options)


def gradients_of(net: Net, number: int, scale: float = 1.0) -> Values:
    """Return whole gradients that are multiples of 1/64, so that sums over ranks are exact."""
    found = {}
    for position, (name, parameter) in enumerate(net.named_parameters()):
        generator = torch.Generator().manual_seed(100 * number + position)
        values = torch.randint(-16, 17, parameter.shape, generator=generator) / 64
        found[name] = (scale * values).to(parameter.dtype)
    return found


def gradients_at(net: Net, step: int, scale: float = 1.0) -> Values:
    """Return the whole gradients of a step; see `WITHOUT_SECOND`."""
    found = gradients_of(net, step, scale)
    if step == WITHOUT_SECOND:
        del found["second.weight"]
    return found


def train(
    net: Net,
    optimizer: Any,
    start: int,
    end: int,
    change: Callable[[Values], object] = lambda gradients: None,
) -> None:
    """Run steps [start, end) without backward; every rank has the same gradients.

    Args:
        change: modifies the gradients of each step.
    """
    for step in range(start, end):
        gradients = gradients_at(net, step)
        change(gradients)
        for name, parameter in net.named_parameters():
            gradient = gradients.get(name)
            if gradient is not None and isinstance(parameter, DTensor):
                gradient = distribute_tensor(
                    gradient, parameter.device_mesh, parameter.placements, src_data_rank=None
                )
            parameter.grad = gradient
        optimizer.step()
        optimizer.zero_grad()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of a tensor, gathered by torch if it is sharded. Collective."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def weights_of(net: Net) -> Values:
    """Return all whole parameters by name. Collective."""
    return {name: whole(parameter) for name, parameter in net.named_parameters()}


def values_of(net: Net, optimizer: Any) -> Values:
    """Return all whole parameters, and on rank 0 also the whole state. Collective.

    State is converted to fp32, which loses no bits: a master weight and its parameter determine the
    remainder.
    """
    optimizer.synchronize()
    found = weights_of(net)
    full = optimizer.full_state_dict()
    if not full:
        return found
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    members = [member for group in optimizer.param_groups for member in group["params"]]
    for number, member in enumerate(members):
        entry = {**full["state"][number]}
        if number in full["offload_adam"]["master_weight"]:
            entry["master_weight"] = full["offload_adam"]["master_weight"][number]
        found |= {f"{names[id(member)]} {key}": value.clone() for key, value in entry.items()}
    return found


def differences(found: Values, expected: Values) -> list[str]:
    """Return the names of the values that differ in any bit."""
    assert found.keys() == expected.keys()
    return [
        name
        for name, value in found.items()
        if value.dtype != expected[name].dtype or not torch.equal(value, expected[name])
    ]
