"""The section `optimizer`: its keys depend on `optimizer.name`."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, FiniteFloat, PlainValidator, Tag

from offload_adam.config.declared import keys_of
from offload_adam.schedules import schedule_from_state

Beta = Annotated[FiniteFloat, Field(ge=0, lt=1)]
OpenBeta = Annotated[FiniteFloat, Field(gt=0, lt=1)]
NotNegative = Annotated[FiniteFloat, Field(ge=0)]
Positive = Annotated[FiniteFloat, Field(gt=0)]

TAGS = ("OffloadAdam", "Adam")
"""Names of the optimizers. pydantic adds them to the paths of mistakes."""

Name = Annotated[
    Literal["OffloadAdam", "Adam"],
    BeforeValidator(lambda name: "OffloadAdam" if name == "offload_adam" else name),
]


class ExecutionKeys(keys_of("optimizer")):  # type: ignore[misc]  # a created class
    """Keys of both optimizers."""

    # The optimizers require this option where they cannot know the answer; a run has a default.
    gradient_reduction: Literal["optimizer", "external"] = Field(
        default="optimizer",
        description="What averages gradients over the ranks: the optimizer, or (external) "
        "DistributedDataParallel around the model.",
    )


class OffloadAdamSection(ExecutionKeys):
    """`OffloadAdam` and its hyperparameters.

    `streaming` copies gradients to the host during backward. Without it they stay in `.grad` until
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
        """Whether gradients are copied to the host during backward."""
        return self.streaming


LearningRate = float | list[float] | dict[str, Any]


def _read_learning_rate(value: object) -> LearningRate:
    """Validate a learning rate: a number, a list of numbers or a schedule.

    With a union of types, pydantic would report one mistake for each type.
    """
    if isinstance(value, dict):
        try:
            schedule_from_state(value)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(str(error).removesuffix(".")) from error
        return value
    if isinstance(value, list):
        if not value:
            raise ValueError("must have at least one value")
        return [_rate(item) for item in value]
    return _rate(value)


def _rate(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(
            "must be a number, a list with one number for each step, or a schedule such as "
            "{name: WarmUpLR, learning_rate: 1e-3, warmup_steps: 100}"
        )
    try:
        rate = float(value)
    except OverflowError:  # an integer above the largest float
        rate = math.inf
    if not (math.isfinite(rate) and rate >= 0):
        raise ValueError("must be finite and at least 0")
    return rate


class AdamSection(ExecutionKeys):
    """`Adam` and its arguments.

    `use_offload` copies gradients to the host during backward. `learning_rate` is a number, a list
    with one number for each step, or a schedule: a mapping of its name and its arguments. The
    section `schedule` changes only a number.
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
        """Whether gradients are copied to the host during backward."""
        return self.use_offload

    @property
    def schedules_itself(self) -> bool:
        """Whether the learning rate changes with the step, without the section `schedule`."""
        return not isinstance(self.learning_rate, float)


def _tag(value: object) -> str:
    name = value.get("name") if isinstance(value, dict) else getattr(value, "name", None)
    return "Adam" if name == "Adam" else "OffloadAdam"


OptimizerSection = Annotated[
    Annotated[OffloadAdamSection, Tag("OffloadAdam")] | Annotated[AdamSection, Tag("Adam")],
    Discriminator(_tag),
]
