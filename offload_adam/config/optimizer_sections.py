"""The section of the optimizer: one form for each of the two, told apart by `optimizer.name`."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    FiniteFloat,
    PlainValidator,
    Tag,
)

from offload_adam.config.declared import keys_of
from offload_adam.schedules import schedule_from_state

Beta = Annotated[FiniteFloat, Field(ge=0, lt=1)]
OpenBeta = Annotated[FiniteFloat, Field(gt=0, lt=1)]
NotNegative = Annotated[FiniteFloat, Field(ge=0)]
Positive = Annotated[FiniteFloat, Field(gt=0)]

TAGS = ("OffloadAdam", "Adam")
"""The optimizers' names. pydantic puts them into the places of mistakes, where no key has them."""

Name = Annotated[
    Literal["OffloadAdam", "Adam"],
    BeforeValidator(lambda name: "OffloadAdam" if name == "offload_adam" else name),
]


class ExecutionKeys(keys_of("optimizer")):  # type: ignore[misc]  # a created class
    """How either optimizer is run."""

    # Unlike the optimizers, a job has a default for drop-in mode too.
    gradient_reduction: Literal["optimizer", "external"] = Field(
        default="optimizer",
        description="Who averages gradients over the ranks; external wraps the model in "
        "DistributedDataParallel.",
    )


class OffloadAdamSection(ExecutionKeys):
    """`OffloadAdam` and its hyperparameters.

    `streaming` lets gradients leave during backward; without it they stay in `.grad` until
    `step()`.
    """

    name: Name = "OffloadAdam"
    lr: Positive = 1e-3
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: NotNegative = 0.0
    decoupled_weight_decay: bool = False
    amsgrad: bool = False
    nesterov: bool = False
    maximize: bool = False
    streaming: bool = True

    @property
    def streams(self) -> bool:
        """Whether gradients leave during backward."""
        return self.streaming


LearningRate = float | list[float] | dict[str, Any]


def _read_learning_rate(value: object) -> LearningRate:
    """Return a learning rate in one of its three forms, each tried here.

    A union of types would answer a mistake with one message for each of them.
    """
    if isinstance(value, dict):
        try:
            schedule_from_state(value)
        except (KeyError, TypeError) as error:
            raise ValueError(str(error)) from error
        return value
    if isinstance(value, list):
        if not value:
            raise ValueError("must have at least one value")
        return [_rate(item) for item in value]
    return _rate(value)


def _rate(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(
            "must be a number, a list of one number a step, or a schedule such as "
            "{name: WarmUpLR, learning_rate: 1e-3, warmup_steps: 100}"
        )
    if not (math.isfinite(value) and value >= 0):
        raise ValueError("must be finite and at least 0")
    return float(value)


class AdamSection(ExecutionKeys):
    """`Adam` and its arguments; gradients leave during backward where `use_offload` is set.

    `learning_rate` is a number, which the section `schedule` moves, or else stands for itself: a
    list of one number a step, or one of this package's schedules as a mapping of its name and its
    arguments.
    """

    name: Name
    learning_rate: Annotated[LearningRate, PlainValidator(_read_learning_rate)] = 1e-3
    beta1: OpenBeta = 0.9
    beta2: OpenBeta = 0.999
    eps: Positive = 1e-8
    use_locking: bool = False
    use_nesterov: bool = False
    weight_decay: NotNegative = 0.0
    loss_scale: Positive = 1.0
    use_amsgrad: bool = False
    use_lazy: bool = False
    use_offload: bool = False
    epsilon_hat: bool = False
    decay_norms: bool = False

    @property
    def streams(self) -> bool:
        """Whether gradients leave during backward."""
        return self.use_offload

    @property
    def schedules_itself(self) -> bool:
        """Whether the learning rate changes without the section `schedule`."""
        return not isinstance(self.learning_rate, float)


def _tag(value: object) -> str:
    name = value.get("name") if isinstance(value, dict) else getattr(value, "name", None)
    return "Adam" if name == "Adam" else "OffloadAdam"


OptimizerSection = Annotated[
    Annotated[OffloadAdamSection, Tag("OffloadAdam")] | Annotated[AdamSection, Tag("Adam")],
    Discriminator(_tag),
]
