"""Turns the options that `offload_adam.options` declares into keys of a configuration."""

from __future__ import annotations

from operator import attrgetter
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, create_model

from offload_adam import options
from offload_adam.options import (
    MAX_STEP_COUNT,
    Choice,
    Dtype,
    ExecutionOptions,
    FailurePolicy,
    Flag,
    Number,
    OffloadPolicy,
    Option,
    options_of,
)

MAX_NBYTES = 2**63 - 1
"""Largest number of bytes: torch and files count them in 64 bits."""
TEXT_PATTERN = r"^[^\x00-\x1f\x7f]*$"

# The largest number of steps also limits ranks, sequences and checkpoints: no run needs more.
Count = Annotated[int, Field(gt=0, le=MAX_STEP_COUNT)]
CountOrZero = Annotated[int, Field(ge=0, le=MAX_STEP_COUNT)]
Nbytes = Annotated[int, Field(ge=0, le=MAX_NBYTES)]
Text = Annotated[str, Field(min_length=1, max_length=4096, pattern=TEXT_PATTERN)]
"""A path or a name: 4,096 bytes is the limit of Linux for a path."""


class Section(BaseModel):
    """Base class of a section of the YAML file. Unknown keys and wrong types are mistakes."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def keys_of(section: str, **defaults: Any) -> type[Section]:
    """Return a base class for a section, with the keys that options declare in this section.

    Args:
        section: such as "memory", for the options whose `key` is `memory.<name>`.
        defaults: key -> default that replaces the option's.
    """
    keys: dict[str, Any] = {}
    for policy in (ExecutionOptions, OffloadPolicy, FailurePolicy):
        for option in options_of(policy):
            place, _, name = option.key.partition(".")
            if place == section:
                default = defaults.get(name, option.default)
                keys[name] = (_type_of(option, default), Field(default, description=option.text))
    return create_model(f"{section.capitalize()}Keys", __base__=Section, **keys)


def read_options(config: BaseModel, policy: type) -> dict[str, Any]:
    """Return option name -> configured value, for the options of a policy that have a key."""
    return {
        option.name: attrgetter(option.key)(config) for option in options_of(policy) if option.key
    }


def _type_of(option: Option, default: Any) -> Any:
    """Return the type that pydantic checks an option's key for. null means the default."""
    kind: Any
    match option.rule:
        case Flag():
            kind = bool
        case Choice(values):
            kind = Literal[tuple(value for value in values if value is not None)]
        case options.Text():
            kind = Text
        case Dtype(short=short):
            kind = Literal[short]
        case Number() as rule:
            most = MAX_NBYTES if rule.most is None and rule.kind is int else rule.most
            kind = Annotated[rule.kind, Field(gt=rule.above, ge=rule.least, le=most)]
        case _:
            raise TypeError(f"Option {option.name} has the key {option.key} but no rule. Add one.")
    if default is None:
        return kind | None
    return Annotated[kind, BeforeValidator(lambda value: default if value is None else value)]
