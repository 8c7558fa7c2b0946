"""The section `optimizer`, whose keys depend on `optimizer.name`: `OffloadAdam` or `Adam`."""

from __future__ import annotations

import sys
from typing import Annotated, Any, Literal

from pydantic import (
    Discriminator,
    Field,
    NonNegativeFloat,
    PlainValidator,
    PositiveFloat,
    Tag,
)

from offload_adam.config.declared import keys_of
from offload_adam.schedules import schedule_from_state

Beta = Annotated[float, Field(ge=0, lt=1)]
OpenBeta = Annotated[float, Field(gt=0, lt=1)]

Name = Literal["OffloadAdam", "Adam"]

# The constructors look for DistributedDataParallel if gradient_reduction is not given. In a run,
# the job itself wraps the model in it if "external" is configured.
ExecutionKeys = keys_of("optimizer", gradient_reduction="optimizer")


class OffloadAdamSection(ExecutionKeys):  # type: ignore[misc, valid-type]  # a created class
    """`OffloadAdam` and its hyperparameters.

    `weight_decay` applies to matrices, not to biases and norms. `streaming` copies gradients to the
    host during backward. Without it they stay in `.grad` until `step()`.
    """

    name: Name = "OffloadAdam"
    lr: PositiveFloat = 1e-3
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
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


def _read_learning_rate(value: Any) -> LearningRate:
    """Validate a learning rate: a number, a list of numbers or a schedule.

    Not a union of types, for which pydantic would report one mistake for each type.
    """
    if isinstance(value, dict):
        try:
            schedule_from_state(value)
        except (TypeError, ValueError, OverflowError) as error:
            reason = str(error).removesuffix(".")
            raise ValueError(f"must be a valid schedule ({reason})") from error
        return value
    rates = value if isinstance(value, list) else [value]
    if not rates or not all(type(rate) in (int, float) for rate in rates):
        raise ValueError(
            "must be a number, a list with one number for each step, or a schedule such as "
            "{name: WarmUpLR, learning_rate: 1e-3, warmup_steps: 100}"
        )
    if not all(0 <= rate <= sys.float_info.max for rate in rates):
        raise ValueError("must be finite and at least 0")
    return [float(rate) for rate in rates] if isinstance(value, list) else float(rates[0])


class AdamSection(ExecutionKeys):  # type: ignore[misc, valid-type]
    """`Adam` and its arguments.

    `use_offload` copies gradients to the host during backward. `learning_rate` is a number, a list
    with one number for each step, or a schedule: a mapping with its `name` and its arguments. The
    section `schedule` applies only to a number.
    """

    name: Name
    learning_rate: Annotated[LearningRate, PlainValidator(_read_learning_rate)] = 1e-3
    beta1: OpenBeta = 0.9
    beta2: OpenBeta = 0.999
    eps: PositiveFloat = 1e-8
    use_locking: bool = False
    use_nesterov: bool = False
    weight_decay: NonNegativeFloat = 0.0
    loss_scale: PositiveFloat = 1.0
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
        """Whether `learning_rate` is a schedule or a list, so that `schedule` does not apply."""
        return not isinstance(self.learning_rate, float)


def _tag(value: object) -> str:
    """Return which optimizer's keys apply to a section, given as a mapping or as an instance."""
    name = value.get("name") if isinstance(value, dict) else getattr(value, "name", None)
    return "Adam" if name == "Adam" else "OffloadAdam"


OptimizerSection = Annotated[
    Annotated[OffloadAdamSection, Tag("OffloadAdam")] | Annotated[AdamSection, Tag("Adam")],
    Discriminator(_tag),
]
