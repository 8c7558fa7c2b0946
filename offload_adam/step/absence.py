"""Warn about parameters that never get a gradient: the model may no longer use them."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

logger = logging.getLogger(__name__)

NUM_STEPS = 10
"""Steps without a gradient of a parameter after which to warn about it.

Early enough to stop a run that trains nothing; parameters that only some batches use, such as those
of experts, usually have had a gradient by then.
"""


class AbsenceWatch:
    """Warns once, after `NUM_STEPS` steps, about parameters without a gradient on any rank.

    When parameters are added, the count starts again.

    Args:
        names, parameters: of all parameters; these lists grow with `add_param_group`.
    """

    def __init__(self, names: Sequence[str], parameters: Sequence[torch.nn.Parameter]) -> None:
        self._names = names
        self._parameters = parameters
        self._ever = torch.zeros(0, dtype=torch.bool, device="cpu")
        self._num_steps = 0

    def record(self, present_counts: torch.Tensor) -> None:
        """Record which parameters had a gradient in one step.

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
                "No gradient in %d steps for parameter(s) %s%s: they are not trained. If the model "
                "uses parameters of these names, these are other objects now, such as after "
                "load_state_dict(assign=True): construct a new optimizer.",
                NUM_STEPS,
                ", ".join(absent[:5]),
                more,
            )
