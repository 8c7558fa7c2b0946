"""The specification in NumPy float64, from its text alone: nothing of the package is imported here.

A parameter is an array; a gradient is an array, None, or `Sparse`. Weights of 16-bit parameters are
kept in float64 like all others: the caller rounds where it compares.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import EllipsisType

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


@dataclass
class Sparse:
    """Entries of a sparse gradient: row numbers with repetitions, a row of values for each."""

    rows: npt.NDArray[np.int64]
    values: Array


Gradient = Array | Sparse | None
Schedule = Callable[[int], float]


@dataclass
class Parameter:
    """One parameter with its state and what its group says."""

    weight: Array
    lr: float | Schedule
    weight_decay: float | Schedule = 0.0
    centralized: bool = False
    m: Array = field(init=False)
    v: Array = field(init=False)
    vhat: Array = field(init=False)

    def __post_init__(self) -> None:
        self.weight = np.array(self.weight, dtype=np.float64)
        self.m = np.zeros_like(self.weight)
        self.v = np.zeros_like(self.weight)
        self.vhat = np.zeros_like(self.weight)


@dataclass
class ReferenceAdam:
    """All parameters and the one step counter."""

    parameters: Sequence[Parameter]
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    loss_scale: float = 1.0
    nesterov: bool = False
    amsgrad: bool = False
    lazy: bool = False
    epsilon_hat: bool = False
    offload: bool = False
    step: int = 0

    def update(self, gradients: Sequence[Gradient]) -> bool:
        """Take one step; False where it is skipped."""
        if any(not _is_finite(gradient) for gradient in gradients):
            return False
        rates = [_at(parameter.lr, self.step) for parameter in self.parameters]
        decays = [_at(parameter.weight_decay, self.step) for parameter in self.parameters]
        self.step += 1
        for parameter, gradient, lr, decay in zip(
            self.parameters, gradients, rates, decays, strict=True
        ):
            if isinstance(gradient, Sparse):
                self._update_sparse(parameter, gradient, lr, decay)
            elif gradient is not None:
                whole = ...
                prepared = self._prepare(gradient, parameter.weight, decay, parameter.centralized)
                self._update_rows(parameter, whole, prepared, lr)
        return True

    def _update_sparse(
        self, parameter: Parameter, gradient: Sparse, lr: float, decay: float
    ) -> None:
        entries = self._prepare(
            gradient.values, parameter.weight[gradient.rows], decay, parameter.centralized
        )
        summed = np.zeros_like(parameter.weight)
        np.add.at(summed, gradient.rows, entries)
        if self.lazy:
            touched = np.unique(gradient.rows)
            self._update_rows(parameter, touched, summed[touched], lr)
        else:
            self._update_rows(parameter, ..., summed, lr)

    def _prepare(self, gradient: Array, weight: Array, decay: float, centralized: bool) -> Array:
        """Do the steps 1 to 3 of the specification, in its order."""
        g = gradient + (decay * self.loss_scale) * weight
        if centralized and not self.offload and g.ndim > 1:
            g = g - g.mean(axis=tuple(range(1, g.ndim)), keepdims=True)
        return np.asarray(g / self.loss_scale)

    def _update_rows(
        self,
        parameter: Parameter,
        rows: EllipsisType | npt.NDArray[np.int64],
        g: Array,
        lr: float,
    ) -> None:
        t = self.step
        m = self.beta1 * parameter.m[rows] + (1 - self.beta1) * g
        v = self.beta2 * parameter.v[rows] + (1 - self.beta2) * g * g
        parameter.m[rows], parameter.v[rows] = m, v
        if self.amsgrad:
            v = np.maximum(parameter.vhat[rows], v)
            parameter.vhat[rows] = v
        if self.nesterov:
            m = self.beta1 * m + (1 - self.beta1) * g
        if self.epsilon_hat:
            rate = lr * np.sqrt(1 - self.beta2**t) / (1 - self.beta1**t)
            change = rate * m / (np.sqrt(v) + self.eps)
        else:
            unbiased = v / (1 - self.beta2**t)
            change = lr * (m / (1 - self.beta1**t)) / (np.sqrt(unbiased) + self.eps)
        parameter.weight[rows] = parameter.weight[rows] - change


def _at(value: float | Schedule, step: int) -> float:
    return value(step) if callable(value) else value


def _is_finite(gradient: Gradient) -> bool:
    if gradient is None:
        return True
    values = gradient.values if isinstance(gradient, Sparse) else gradient
    return bool(np.isfinite(values).all())
