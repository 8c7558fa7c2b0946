"""The inputs of torch's own optimizer tests, and torch's plain Adam to compare with.

torch keeps the inputs in a private module, so that each version brings its own.
"""

from __future__ import annotations

import copy
import functools
import importlib
import os
from collections.abc import Callable, Iterable
from typing import Any
from unittest import mock

import pytest
import torch

from offload_adam import OffloadAdam, OffloadAdamW

PAIRS = {"Adam": OffloadAdam, "AdamW": OffloadAdamW}
"""Our optimizers by the name of torch's."""


@functools.cache
def case_module() -> Any:
    """Return the module with torch's inputs, or skip the test."""
    pytest.importorskip("expecttest", reason="torch's inputs need expecttest, of the test extra")
    name = "torch.testing._internal.common_optimizers"
    # Importing it would freeze the flags of torch.backends for every later test.
    with mock.patch("torch.backends.disable_global_flags"), mock.patch.dict(os.environ):
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            pytest.skip(f"torch {torch.__version__} has no inputs to read: {error}")
    if not hasattr(module, "optim_db"):
        pytest.skip(f"torch {torch.__version__} has no optim_db in {name}")
    return module


def info_of(name: str) -> Any:
    """Return torch's description of the tests of one of its optimizers."""
    return next(info for info in case_module().optim_db if info.name == name)


def inputs_of(name: str) -> list[dict[str, Any]]:
    """Return the keyword arguments that torch tests on a CPU and on a GPU, without repetitions.

    `capturable` is left out: it is tested with what is rejected by design.
    """
    every: list[dict[str, Any]] = []
    for device in ("cpu", "cuda"):
        for case in info_of(name).optim_inputs_func(device=device):
            kwargs = {key: value for key, value in case.kwargs.items() if key != "capturable"}
            if repr(kwargs) not in map(repr, every):
                every.append(kwargs)
    assert len(every) >= 8
    return every


def flags_of(name: str) -> list[str]:
    """Return the flags that choose an implementation: foreach, fused, differentiable, ..."""
    info = info_of(name)
    return [*info.supported_impls, *(["capturable"] if info.has_capturable_arg else [])]


def make_pair(
    name: str, ours: Any, theirs: Any, **kwargs: Any
) -> tuple[OffloadAdam, torch.optim.Optimizer]:
    """Return our optimizer over `ours` and torch's plain one over `theirs`, with own arguments."""
    reference = getattr(torch.optim, name)(theirs, foreach=False, **copy.deepcopy(kwargs))
    return PAIRS[name](ours, **copy.deepcopy(kwargs)), reference


def assert_equal(
    ours: Iterable[torch.Tensor],
    theirs: Iterable[torch.Tensor],
    *,
    rtol: float = 2e-6,
    atol: float = 2e-6,
) -> None:
    """Compare element by element: values of about 1, in fp32."""
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our.detach(), their.detach(), rtol=rtol, atol=atol)


def assert_equal_state(ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer) -> None:
    """Compare what two optimizers would save for each parameter, by torch's keys."""
    saved, expected = ours.state_dict()["state"], theirs.state_dict()["state"]
    for packed, entry in expected.items():
        for key, value in entry.items():
            torch.testing.assert_close(saved[packed][key], value, rtol=1e-5, atol=2e-6)


class Affine:
    """A weight, a bias and an input; the loss is the squared norm of `weight @ input + bias`.

    contiguous: False for parameters that are views with gaps.
    """

    def __init__(self, *, seed: int = 0, contiguous: bool = True) -> None:
        generator = torch.Generator().manual_seed(seed)

        def values(*shape: int) -> torch.Tensor:
            drawn = torch.randn(*shape, 2, generator=generator)
            return drawn[..., 0].contiguous() if contiguous else drawn[..., 0]

        self.weight = torch.nn.Parameter(values(10, 5))
        self.bias = torch.nn.Parameter(values(10))
        self.input = values(5).contiguous()

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """Weight and bias."""
        return [self.weight, self.bias]

    @property
    def named(self) -> list[tuple[str, torch.nn.Parameter]]:
        """Weight and bias with their names."""
        return [("weight", self.weight), ("bias", self.bias)]

    def loss(self) -> torch.Tensor:
        """Return the loss."""
        return (self.weight.mv(self.input) + self.bias).pow(2).sum()

    def closure_of(self, optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
        """Return a closure for `optimizer.step`."""

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            return loss

        return closure
