"""What can be wrong with a run before anything of it is started, found all at once."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

from torch import nn

from offload_adam.config import ConfigError, Mistake, RunConfig
from offload_adam.config.optimizer_sections import AdamSection
from offload_adam.coordinator.startup import World
from offload_adam.train.corpus import Corpus, load_corpus
from offload_adam.train.model import build_model, find_factory
from offload_adam.train.run_folder import require_writable
from offload_adam.train.sinks import reject_missing_extras

T = TypeVar("T")


def prepare(config: RunConfig) -> tuple[Corpus, nn.Module]:
    """Return the data and the model, on the CPU, after everything has been tried that can be.

    Raises:
        ConfigError: environment, folder, packages, data or model do not fit the configuration; with
            every mistake, but that a factory which can be found is not called where there are
            others: it may take long.
    """
    found = _Mistakes()
    found.of(_require_environment)
    found.of(lambda: _reject_unshardable(config))
    found.of(lambda: reject_missing_extras(config))
    if os.environ.get("RANK", "0") == "0":
        found.of(lambda: require_writable(config))
    corpus = found.of(lambda: load_corpus(config.data, config.train.sequence_length))
    if found.mistakes and config.model.factory is not None:
        factory = config.model.factory
        found.of(lambda: find_factory(factory))
    model = None if found.mistakes else found.of(lambda: build_model(config))
    if corpus is None or model is None:
        raise ConfigError("configuration", found.mistakes)
    return corpus, model


class _Mistakes:
    """Collects what checks raise, each in the form of the configuration's other mistakes."""

    def __init__(self) -> None:
        self.mistakes: list[Mistake] = []

    def of(self, check: Callable[[], T]) -> T | None:
        """Return what the check returns, None where it raises mistakes."""
        try:
            return check()
        except ConfigError as error:
            self.mistakes.extend(error.mistakes)
            return None


def _require_environment() -> None:
    try:
        World.from_environment()
    except ValueError as error:
        raise ConfigError.at("environment", str(error)) from error


def _reject_unshardable(config: RunConfig) -> None:
    section = config.optimizer
    key = "use_amsgrad" if isinstance(section, AdamSection) else "amsgrad"
    asked = os.environ.get("WORLD_SIZE", "1")  # which may be wrong itself, and is named then
    if getattr(section, key) and asked.isdecimal() and int(asked) > 1:
        raise ConfigError.at(f"optimizer.{key}", f"works on one rank only, and there are {asked}")
