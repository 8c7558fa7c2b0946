"""Parameters to which weight decay does not apply by default, if no groups are given."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import nn

from offload_adam.errors import warn_user
from offload_adam.torch_private import norm_base

_FILTERED_NAMES = ("beta", "gamma")  # as MindSpore names the parameters of its norm layers
_NORM_LAYERS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, norm_base)


def norm_parameters(module: nn.Module | None) -> set[int]:
    """Return the ids of the weights (gammas) and biases (betas) of torch's norm layers."""
    if module is None:
        return set()
    return {
        id(parameter)
        for layer in module.modules()
        if isinstance(layer, _NORM_LAYERS)
        for parameter in layer.parameters(recurse=False)
    }


def is_decayed(name: str, parameter: torch.Tensor, norms: Collection[int]) -> bool:
    """Return whether weight decay applies to a parameter of an optimizer without groups."""
    return id(parameter) not in norms and not any(part in name for part in _FILTERED_NAMES)


def warn_if_all_decay(decayed: Iterable[bool]) -> None:
    """Warn if no parameter is excluded from weight decay, and name the ways to exclude some."""
    if all(decayed):
        warn_user(
            "weight_decay applies to every parameter, including norm layers and biases, because no "
            "name contains beta or gamma. Pass module=model to exclude its norm layers, or groups: "
            "[{'params': decayed}, {'params': not_decayed, 'weight_decay': 0.0}]."
        )
