"""The AdamW that every contender computes, and the other libraries that have it."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

import torch

from offload_adam.bench.planes import Planes
from offload_adam.kernels.scalars import Hyperparameters

ADAMW = Hyperparameters(
    lr=1e-3,
    beta1=0.9,
    beta2=0.999,
    eps=1e-8,
    weight_decay=0.01,
    decoupled_weight_decay=True,
    nesterov=False,
    maximize=False,
)
SETTINGS: dict[str, Any] = {
    "lr": ADAMW.lr,
    "betas": (ADAMW.beta1, ADAMW.beta2),
    "eps": ADAMW.eps,
    "weight_decay": ADAMW.weight_decay,
}
"""ADAMW as arguments of a torch optimizer."""
OUR_SETTINGS: dict[str, Any] = {
    **SETTINGS,
    "decoupled_weight_decay": True,
    "max_grad_norm": 1.0,
}
"""ADAMW with clipping as arguments of `OffloadAdam`."""
MAX_GRAD_NORM: float = OUR_SETTINGS["max_grad_norm"]


class PeerUnavailableError(RuntimeError):
    """A peer is not installed or does not work on this machine; the message gives the reason."""


def import_peer(module: str, name: str) -> Any:
    """Return a module's attribute.

    Raises:
        PeerUnavailableError: the module cannot be imported or does not have this attribute.
    """
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise PeerUnavailableError(f"not importable: {error}") from error


def deepspeed_adamw(parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Return DeepSpeed's CPUAdam, which compiles its C++ extension at the first use.

    Raises:
        PeerUnavailableError: DeepSpeed is not installed, or the extension cannot be compiled.
    """
    cpu_adam = import_peer("deepspeed.ops.adam", "DeepSpeedCPUAdam")
    try:
        optimizer: torch.optim.Optimizer = cpu_adam(parameters, **SETTINGS, adamw_mode=True)
    except RuntimeError as error:
        raise PeerUnavailableError(f"does not work here: {error}") from error
    return optimizer


def torch_fused(planes: Planes) -> torch.optim.Optimizer:
    """Return torch's AdamW(fused=True) with weights, gradient and moments in these planes."""
    parameter = torch.nn.Parameter(planes.master_weight)
    optimizer = torch.optim.AdamW([parameter], **SETTINGS, fused=True)
    return _with_state(optimizer, parameter, planes, torch.tensor(0.0))


def deepspeed_cpu_adam(planes: Planes) -> torch.optim.Optimizer:
    """Return DeepSpeed's CPUAdam with weights, gradient and moments in these planes.

    Raises:
        PeerUnavailableError: DeepSpeed is not installed, or the extension cannot be compiled.
    """
    parameter = torch.nn.Parameter(planes.master_weight)
    return _with_state(deepspeed_adamw([parameter]), parameter, planes, 0)


def _with_state(
    optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter, planes: Planes, step: Any
) -> torch.optim.Optimizer:
    parameter.grad = planes.gradient
    optimizer.state[parameter] = {
        "step": step,
        "exp_avg": planes.exp_avg,
        "exp_avg_sq": planes.exp_avg_sq,
    }
    return optimizer


PEERS = {"deepspeed_cpu_adam": deepspeed_cpu_adam}
"""Peers other than torch, each made on a set of planes."""


def available_peers(planes: Planes) -> tuple[dict[str, torch.optim.Optimizer], dict[str, str]]:
    """Return the peers that work on this machine, and for each other peer the reason."""
    optimizers, left_out = {}, {}
    for name, make in PEERS.items():
        try:
            optimizers[name] = make(planes)
        except PeerUnavailableError as error:
            left_out[name] = str(error)
    return optimizers, left_out
