"""What torch's own functions can do with gradients that have left: take norms, and scale them."""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np
import numpy.typing as npt
import torch

from offload_adam.torch_private import version_of


class StreamedGradients:
    """Norms of this step's streamed gradients, and what the caller has multiplied them by.

    Args:
        take_norms: returns the 2-norm of each parameter's reduced gradient. Collective.

    Lifecycle: `gradients_left` for each bucket with gradients, `forget` after each step.
    """

    def __init__(self, take_norms: Callable[[], npt.NDArray[np.float64]]) -> None:
        self._take_norms = take_norms
        self.forget()

    def forget(self) -> None:
        """Start over with the next step."""
        self.has_gradients = False
        self._norms: npt.NDArray[np.float64] | None = None
        self._factors: dict[int, float] = {}
        self._added_later = False
        self._scalar: tuple[torch.Tensor, int, float] | None = None

    def gradients_left(self) -> None:
        """Hear that further gradients have left `.grad`."""
        self.has_gradients = True
        self._norms = None
        self._added_later = bool(self._factors)

    def norm(self, index: int) -> float:
        """Return the 2-norm of one parameter's gradient. Collective after a backward."""
        if self._norms is None:
            self._norms = self._take_norms()
        return float(self._norms[index]) * abs(self._factors.get(index, 1.0))

    def multiply(self, index: int, factor: float | torch.Tensor, *, inverse: bool = False) -> None:
        """Multiply the gradient of one parameter in the next update, or divide it."""
        value = self._read(factor) if isinstance(factor, torch.Tensor) else float(factor)
        before = self._factors.get(index, 1.0)
        self._factors[index] = float(np.float64(before) / value if inverse else before * value)

    def _read(self, factor: torch.Tensor) -> float:
        """Read a scalar tensor once, for thousands of gradients are multiplied by the same one."""
        known = self._scalar
        if known is None or known[0] is not factor or known[1] != version_of(factor):
            known = self._scalar = (factor, version_of(factor), float(factor))
        return known[2]

    def factor(self) -> float:
        """Return the factor of all gradients.

        Raises:
            ValueError: there is more than one.
        """
        factors = {*map(repr, self._factors.values())}
        if len(factors) > 1:
            raise ValueError(
                f"gradients that have left .grad were multiplied by different factors: "
                f"{', '.join(sorted(factors)[:3])}. Multiply all of them by one number, or "
                "construct the optimizer without module="
            )
        if self._added_later:
            raise ValueError(
                "a backward has brought further gradients after those of this step were "
                "multiplied (clipped) in .grad. Multiply them after the last backward of a step"
            )
        return next(iter(self._factors.values()), 1.0)

    @property
    def multiplied(self) -> Collection[int]:
        """The indices of the parameters whose gradients have a factor."""
        return self._factors.keys()
