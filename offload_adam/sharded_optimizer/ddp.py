"""Find out who averages gradients: look for DDP, and check that external averages are equal."""

from __future__ import annotations

import gc
from collections.abc import Sequence

import torch
from torch.nn.parallel import DistributedDataParallel

from offload_adam.coordinator.ranks import RankGroup, is_initialized
from offload_adam.errors import RankDisagreementError
from offload_adam.params.selection import Named

_TOLERANCE = 1e-3
"""Relative difference of norms above which gradients count as different.

Averages on different ranks have the same bits, but the order of additions in a norm may depend on
the alignment of memory. Gradients of different batches differ by far more.
"""


def averaged_by_ddp(parameters: Sequence[torch.nn.Parameter]) -> bool:
    """Return whether a `DistributedDataParallel` averages the gradients of these parameters.

    Raises:
        ValueError: DDP averages some of them, but not all.

    Cost: visits every object that Python's garbage collector tracks, about 0.1 s for a million.
    """
    averaged = _ddp_parameters()
    inside = [id(parameter) in averaged for parameter in parameters]
    if any(inside) and not all(inside):
        shape = tuple(parameters[inside.index(False)].shape)
        raise ValueError(
            f"DistributedDataParallel averages the gradients of {sum(inside)} of {len(inside)} "
            f"parameters, but not of one of shape {shape}. Pass gradient_reduction='external' and "
            "average the others yourself, or put all parameters into the DDP module."
        )
    return any(inside)


def is_in_ddp(parameters: Sequence[torch.nn.Parameter]) -> bool:
    """Return whether a `DistributedDataParallel` averages the gradient of any of these."""
    averaged = _ddp_parameters()
    return any(id(parameter) in averaged for parameter in parameters)


def _ddp_parameters() -> set[int]:
    """Return the ids of all parameters whose gradients a DDP module averages."""
    if not is_initialized():  # DDP needs a process group
        return set()
    # DDP leaves no trace on a parameter: its hooks are in C++. `type`, because `isinstance` may run
    # code of objects that pretend to have another class.
    modules = [o for o in gc.get_objects() if issubclass(type(o), DistributedDataParallel)]
    return {
        id(parameter)
        for ddp in modules
        for name, parameter in ddp.module.named_parameters()
        if name not in ddp.parameters_to_ignore
    }


def check_averaged(ranks: RankGroup, members: Sequence[Named]) -> None:
    """Check that gradients which the caller has averaged are the same on all ranks. Collective.

    Compares norms, so it finds gradients that were not averaged. A gradient that is missing on any
    rank, sparse or not finite is not compared.

    Raises:
        RankDisagreementError: naming a parameter whose gradients differ.
    """
    own = torch.tensor(
        [_norm(parameter) for _, parameter in members], dtype=torch.float64, device="cpu"
    )
    norms = torch.stack(ranks.all_gather(own))
    low, high = norms.amin(dim=0), norms.amax(dim=0)  # NaN if any rank's norm is
    different = torch.nonzero(high - low > _TOLERANCE * high).flatten().tolist()
    if different:
        name, _ = members[different[0]]
        raise RankDisagreementError(
            f"The gradient of parameter {name!r} differs between ranks (2-norms from "
            f"{low[different[0]]:.6g} to {high[different[0]]:.6g}), but with "
            "gradient_reduction='external' every rank must have the average. Wrap the model in "
            "DistributedDataParallel (again, if parameters were unfrozen since: DDP averages those "
            "that required gradients when it was constructed), or pass "
            "gradient_reduction='optimizer'."
        )


def _norm(parameter: torch.nn.Parameter) -> float:
    gradient = parameter.grad
    if gradient is None or gradient.layout is not torch.strided:
        return float("nan")
    norm = torch.linalg.vector_norm(gradient.detach(), dtype=torch.float32)
    return float(norm) if norm.isfinite() else float("nan")
