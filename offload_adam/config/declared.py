"""Turns the options that `offload_adam.options` declares into keys of a configuration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeVar

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

P = TypeVar("P", ExecutionOptions, OffloadPolicy, FailurePolicy)


class Section(BaseModel):
    """A mapping of the YAML file. Unknown keys and values of another type are mistakes."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def keys_of(section: str) -> type[Section]:
    """Return a base class for a section, with a key for each option that names this section."""
    keys: dict[str, Any] = {
        option.key.removeprefix(f"{section}."): (
            _type_of(option),
            Field(default=option.default, description=option.text),
        )
        for policy in (ExecutionOptions, OffloadPolicy, FailurePolicy)
        for option in options_of(policy)
        if option.key.startswith(f"{section}.")
    }
    return create_model(f"{section.capitalize()}Keys", __base__=Section, **keys)


def read_options(config: BaseModel, policy: type[P]) -> dict[str, Any]:
    """Return the configured values of the options of a policy, by option name."""
    return dict(_read(config, policy))


def short_dtype(**names: str) -> BeforeValidator:
    """Return a validator that replaces long names by short ones, such as `float32` by `fp32`."""
    return BeforeValidator(lambda name: names.get(name, name) if isinstance(name, str) else name)


def _read(config: BaseModel, policy: type[P]) -> Iterator[tuple[str, Any]]:
    for option in options_of(policy):
        if option.key:
            section, _, name = option.key.partition(".")
            yield option.name, getattr(getattr(config, section), name)


def _type_of(option: Option) -> Any:
    """Return the type of an option for pydantic. null means the default."""
    kind: Any
    match option.rule:
        case Flag():
            kind = bool
        case Choice(values):
            kind = Literal[tuple(value for value in values if value is not None)]
        case Dtype(name, short):
            kind = Annotated[Literal[short], short_dtype(**{name: short})]
        case Number() as rule:
            finite = None if rule.kind is int else False  # pydantic rejects this argument for int
            bounds = Field(gt=rule.above, ge=rule.least, le=rule.most, allow_inf_nan=finite)
            kind = Annotated[rule.kind, bounds]
        case _:
            raise TypeError(f"option {option.name} has the key {option.key}, but no rule")
    if option.default is None:
        return kind | None
    default = option.default
    return Annotated[kind, BeforeValidator(lambda value: default if value is None else value)]
