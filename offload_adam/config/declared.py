"""Turns the options that `offload_adam.options` declares into keys of a configuration."""

from __future__ import annotations

from operator import attrgetter
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, create_model

from offload_adam.options import (
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


class Section(BaseModel):
    """A mapping of the YAML file. Unknown keys and values of another type are mistakes."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def keys_of(section: str, **defaults: Any) -> type[Section]:
    """Return a base class for a section, with a key for each option that names this section.

    Args:
        defaults: replace the default of an option, by the name of its key.
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
    """Return the configured values of the options of a policy, by option name."""
    return {
        option.name: attrgetter(option.key)(config) for option in options_of(policy) if option.key
    }


def _type_of(option: Option, default: Any) -> Any:
    """Return the type of an option for pydantic. null means the default."""
    kind: Any
    match option.rule:
        case Flag():
            kind = bool
        case Choice(values):
            kind = Literal[tuple(value for value in values if value is not None)]
        case Dtype(short=short):
            kind = Literal[short]
        case Number() as rule:
            kind = Annotated[rule.kind, Field(gt=rule.above, ge=rule.least, le=rule.most)]
        case _:
            raise TypeError(f"option {option.name} has the key {option.key}, but no rule")
    if default is None:
        return kind | None
    return Annotated[kind, BeforeValidator(lambda value: default if value is None else value)]
