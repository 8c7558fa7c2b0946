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
    WithJsonSchema,
)

from offload_adam.config.declared import keys_of
from offload_adam.schedules import schedule_from_state

Beta = Annotated[float, Field(ge=0, lt=1)]
OpenBeta = Annotated[float, Field(gt=0, lt=1)]

Name = Literal["OffloadAdam", "Adam"]

# The constructors look for DistributedDataParallel if gradient_reduction is not given. In a run,
# the job itself wraps the model in it if "external" is configured.
ExecutionKeys = keys_of("optimizer", gradient_reduction="optimizer")


_NAME_TEXT = "The optimizer, which decides the other keys of this section."
_EPS_TEXT = "Added to the denominator of the update, so that it is not zero."
_NESTEROV_TEXT = "Use Nesterov's momentum: add the gradient once more to its average."


class OffloadAdamSection(ExecutionKeys):  # type: ignore[misc, valid-type]  # a created class
    """`OffloadAdam` and its hyperparameters."""

    name: Annotated[Name, WithJsonSchema({"const": "OffloadAdam"})] = Field(
        default="OffloadAdam", description=_NAME_TEXT
    )
    lr: PositiveFloat = Field(default=1e-3, description="Learning rate.")
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = Field(
        default=(0.9, 0.999),
        description="Decay rates of the averages of gradients and of their squares, such as "
        "[0.9, 0.95].",
    )
    eps: PositiveFloat = Field(default=1e-8, description=_EPS_TEXT)
    weight_decay: NonNegativeFloat = Field(
        default=0.0, description="Weight decay of matrices. Biases and norms have none."
    )
    decoupled_weight_decay: bool = Field(
        default=False,
        description="Decay weights as in AdamW. With false, add an L2 penalty as in Adam.",
    )
    amsgrad: bool = Field(
        default=False,
        description="Divide by the largest second moment so far (AMSGrad). One rank only.",
    )
    nesterov: bool = Field(default=False, description=_NESTEROV_TEXT)
    maximize: bool = Field(default=False, description="Maximize the loss instead of minimizing it.")
    streaming: bool = Field(
        default=True,
        description="Copy gradients to the host during backward. With false they stay in `.grad` "
        "until `step()`.",
    )

    @property
    def streams(self) -> bool:
        """Whether gradients are copied to the host during backward."""
        return self.streaming


LearningRate = float | list[float] | dict[str, Any]
_LEARNING_RATE_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"type": "number", "minimum": 0},
        {"type": "array", "items": {"type": "number", "minimum": 0}, "minItems": 1},
        {"type": "object", "required": ["name"]},
    ]
}


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
    """`Adam` and its arguments, which are those of MindSpore's Adam."""

    name: Annotated[Name, WithJsonSchema({"const": "Adam"})] = Field(description=_NAME_TEXT)
    learning_rate: Annotated[
        LearningRate, PlainValidator(_read_learning_rate), WithJsonSchema(_LEARNING_RATE_SCHEMA)
    ] = Field(
        default=1e-3,
        description="A number, a list with one number for each step, or a schedule: a mapping with "
        "its `name` and its arguments. The section `schedule` applies only to a number.",
    )
    beta1: OpenBeta = Field(default=0.9, description="Decay rate of the average of gradients.")
    beta2: OpenBeta = Field(
        default=0.999,
        description="Decay rate of the average of squared gradients.",
    )
    eps: PositiveFloat = Field(default=1e-8, description=_EPS_TEXT)
    use_locking: bool = Field(
        default=False,
        description="Has no effect, because updates never race.",
    )
    use_nesterov: bool = Field(default=False, description=_NESTEROV_TEXT)
    weight_decay: NonNegativeFloat = Field(
        default=0.0,
        description="L2 penalty of the weights, except norms and parameters with beta or gamma in "
        "their names.",
    )
    loss_scale: PositiveFloat = Field(
        default=1.0,
        description="Factor by which the loss is multiplied, and gradients are divided.",
    )
    use_amsgrad: bool = Field(
        default=False,
        description="Divide by the largest second moment so far (AMSGrad). One rank only.",
    )
    use_lazy: bool = Field(
        default=False, description="A sparse gradient updates only the rows that it touches."
    )
    use_offload: bool = Field(
        default=False,
        description="Store the state in host memory, and copy gradients there during backward.",
    )
    epsilon_hat: bool = Field(
        default=False,
        description="Use the arithmetic that MindSpore was observed to use, which adds `eps` "
        "before the bias correction.",
    )
    decay_norms: bool = Field(default=False, description="Apply weight decay to norm layers, too.")

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
