"""Other libraries' AdamW, as torch optimizers that keep their state in given planes."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from offload_adam.bench.contender import ADAMW
from offload_adam.bench.planes import Planes


class PeerUnavailableError(RuntimeError):
    """A peer is not installed, or does not work here; the message says which."""


def torch_fused(planes: Planes) -> torch.optim.Optimizer:
    """Return torch's AdamW(fused=True) on these planes."""
    parameter = torch.nn.Parameter(planes.master_weight)
    optimizer = torch.optim.AdamW(
        [parameter],
        lr=ADAMW.lr,
        betas=(ADAMW.beta1, ADAMW.beta2),
        eps=ADAMW.eps,
        weight_decay=ADAMW.weight_decay,
        fused=True,
    )
    parameter.grad = planes.gradient
    optimizer.state[parameter] = {
        "step": torch.tensor(0.0),
        "exp_avg": planes.exp_avg,
        "exp_avg_sq": planes.exp_avg_sq,
    }
    return optimizer


def deepspeed_cpu_adam(planes: Planes) -> torch.optim.Optimizer:
    """Return DeepSpeed's CPUAdam on these planes; its extension is compiled at the first use.

    Raises:
        PeerUnavailableError: it is not installed, or cannot be compiled.
    """
    try:
        cpu_adam: Any = importlib.import_module("deepspeed.ops.adam").DeepSpeedCPUAdam
    except ImportError as error:
        raise PeerUnavailableError(f"not importable: {error}") from error
    parameter = torch.nn.Parameter(planes.master_weight)
    try:
        optimizer: torch.optim.Optimizer = cpu_adam(
            [parameter],
            lr=ADAMW.lr,
            betas=(ADAMW.beta1, ADAMW.beta2),
            eps=ADAMW.eps,
            weight_decay=ADAMW.weight_decay,
            adamw_mode=True,
        )
    except RuntimeError as error:
        raise PeerUnavailableError(f"does not work here: {error}") from error
    parameter.grad = planes.gradient
    optimizer.state[parameter] = {
        "step": 0,
        "exp_avg": planes.exp_avg,
        "exp_avg_sq": planes.exp_avg_sq,
    }
    return optimizer


PEERS = {"deepspeed_cpu_adam": deepspeed_cpu_adam}
"""Peers beside torch, each made on a set of planes."""


def available_peers(planes: Planes) -> tuple[dict[str, torch.optim.Optimizer], dict[str, str]]:
    """Return the peers beside torch that work here, and for each of the others why it does not."""
    optimizers, left_out = {}, {}
    for name, make in PEERS.items():
        try:
            optimizers[name] = make(planes)
        except PeerUnavailableError as error:
            left_out[name] = str(error)
    return optimizers, left_out
