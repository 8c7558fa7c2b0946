"""Warn about parameters that never get a gradient: the model may have others in their place."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

logger = logging.getLogger(__name__)

NUM_STEPS = 10
"""Steps that a parameter may be without a gradient before a warning."""


class AbsenceWatch:
    """Looks, in the first steps with its parameters, for those that no rank has a gradient for.

    Lifecycle: warns once, after `NUM_STEPS`; further parameters start the count again.

    Args:
        names, parameters: grow with the optimizer.
    """

    def __init__(self, names: Sequence[str], parameters: Sequence[torch.nn.Parameter]) -> None:
        self._names = names
        self._parameters = parameters
        self._ever = torch.zeros(0, dtype=torch.bool, device="cpu")
        self._num_steps = 0

    def see(self, present_counts: torch.Tensor) -> None:
        """Note which parameters had a gradient in a step.

        Args:
            present_counts: (num parameters,) int64, on how many ranks each has a gradient.
        """
        if present_counts.shape != self._ever.shape:
            self._ever, self._num_steps = present_counts > 0, 0
        elif self._num_steps == NUM_STEPS:
            return
        self._ever |= present_counts > 0
        self._num_steps += 1
        if self._num_steps == NUM_STEPS:
            self._warn()

    def _warn(self) -> None:
        absent = [
            repr(name)
            for name, ever, parameter in zip(
                self._names, self._ever.tolist(), self._parameters, strict=True
            )
            if not ever and parameter.requires_grad
        ]
        if absent:
            more = f" and {len(absent) - 5} more" if len(absent) > 5 else ""
            logger.warning(
                "no gradient in %d steps for parameter %s%s: they are not trained. If the model "
                "uses them, it has other objects in their place (load_state_dict(assign=True)): "
                "make a new optimizer",
                NUM_STEPS,
                ", ".join(absent[:5]),
                more,
            )
