"""The model of a job: the built-in one, or the user's own by its import path."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from offload_adam.config import ConfigError, Mistake, RunConfig
from offload_adam.config.sections import ModelSection
from offload_adam.torch_private import is_lazy
from offload_adam.train.gpt import GPT

_KEY = "model.factory"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build_model(config: RunConfig) -> nn.Module:
    """Return the model on the CPU, in the configured dtype, drawn from the run's seed.

    Raises: ConfigError where the user's factory cannot be found, fails, or returns no model, or one
        with tensors that cannot be trained in the configured dtype.
    """
    torch.manual_seed(config.run.seed)
    if config.model.sizes is not None:
        model: nn.Module = GPT(config.model.sizes, config.train.sequence_length)
    else:
        model = _call_factory(config.model)
    _reject_unready(model)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError.at(_KEY, "the model has no parameter that requires a gradient")
    return model.to(_DTYPES[config.train.dtype])


def _call_factory(section: ModelSection) -> nn.Module:
    """Call the user's `package.module:function` with `model.arguments` as keywords.

    It has to return an nn.Module that maps (batch, time) int64 tokens below 256 to floating
    (batch, time, vocabulary) logits, vocabulary 256 or more.
    """
    factory = find_factory(str(section.factory))
    try:
        model = factory(**section.arguments)
    except (Exception, SystemExit) as error:
        arguments = ", ".join(f"{name}={value!r}" for name, value in section.arguments.items())
        raise ConfigError.at(
            _KEY, f"{section.factory}({arguments}) failed: {_described(error)}"
        ) from error
    if not isinstance(model, nn.Module):
        raise ConfigError.at(
            _KEY, f"{section.factory} must return a torch.nn.Module, got {type(model).__name__}"
        )
    return model


def find_factory(spec: str) -> Callable[..., Any]:
    """Return the function that `package.module:function` names; the working folder is searched too.

    Raises: ConfigError where the module or the function is missing or fails to import.
    """
    module_name, _, function_name = spec.partition(":")
    _search_working_folder()
    try:
        found: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise ConfigError.at(_KEY, f"cannot import {module_name}: {_described(error)}") from error
    for name in function_name.split("."):
        if not hasattr(found, name):
            raise ConfigError.at(_KEY, f"{module_name} has no {function_name}")
        found = getattr(found, name)
    if not callable(found):
        raise ConfigError.at(_KEY, f"{spec} is not a function: it is a {type(found).__name__}")
    return found  # type: ignore[no-any-return]


def _reject_unready(model: nn.Module) -> None:
    """Reject parameters and buffers that have no shape, no values, or that lose half of them.

    On the meta device itself, where a plan is made, no values are wanted.
    """
    problems: dict[str, list[str]] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        problem = _what_is_missing(tensor)
        if problem is not None:
            problems.setdefault(problem, []).append(name)
    if problems:
        found = [Mistake(_KEY, f"{_listed(names)}: {text}") for text, names in problems.items()]
        raise ConfigError("configuration", found)


def _what_is_missing(tensor: torch.Tensor) -> str | None:
    if is_lazy(tensor):
        return (
            "no shape yet, for the module is lazy: call the model once in the factory, such as "
            "model(torch.zeros(1, 8, dtype=torch.int64))"
        )
    if tensor.is_meta and torch.get_default_device().type != "meta":
        return (
            "no values, for it is on the meta device: call model.to_empty(device='cpu') in the "
            "factory, and initialise what that makes"
        )
    if tensor.is_complex():
        return (
            "complex numbers, which are not trained and which train.dtype would make real: keep "
            "torch.view_as_real of it in the model, and torch.view_as_complex in the forward"
        )
    return None


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"


def _described(error: BaseException) -> str:
    """Return the error and where it was raised, in place of a traceback."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({place.filename}, line {place.lineno})"


def _search_working_folder() -> None:
    """Let the console script import from where it was started, as `python -m` does."""
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
