"""Which parameters weight decay leaves out where there are no groups to say so."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable

import torch
from torch import nn

from offload_adam.torch_private import norm_base

_FILTERED_NAMES = ("beta", "gamma")
_NORM_LAYERS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, norm_base)


def norm_parameters(module: nn.Module | None) -> set[int]:
    """Return the ids of the weights and biases of torch's norm layers, their gammas and betas."""
    if module is None:
        return set()
    return {
        id(parameter)
        for layer in module.modules()
        if isinstance(layer, _NORM_LAYERS)
        for parameter in layer.parameters(recurse=False)
    }


def is_decayed(name: str, parameter: torch.Tensor, norms: Collection[int]) -> bool:
    """Tell whether weight decay acts on a parameter of an optimizer without groups."""
    return id(parameter) not in norms and not any(part in name for part in _FILTERED_NAMES)


def warn_if_all_decay(decayed: Iterable[bool]) -> None:
    """Say once that weight decay acts on everything, and how to leave out what it should not."""
    if all(decayed):
        warnings.warn(
            "weight_decay acts on every parameter, norm layers and biases included: it leaves out "
            "parameters with beta or gamma in their names, and there is none. Pass module=model "
            "to leave out its norm layers, or groups: [{'params': decayed}, {'params': the rest, "
            "'weight_decay': 0.0}]",
            UserWarning,
            stacklevel=2,
        )
