"""Run a measurement from the command line, and repeat one that other processes disturbed."""

from __future__ import annotations

import argparse
import inspect
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from offload_adam.bench.report import machine_line, write_json
from offload_adam.kernels.threads import allowed_cores

logger = logging.getLogger(__name__)

NUM_ATTEMPTS = 3
T = TypeVar("T")


class DisturbedError(RuntimeError):
    """The machine was disturbed; measure again."""


def undisturbed(attempt: Callable[[], T]) -> T:
    """Return the result of the first attempt that raises no DisturbedError.

    Raises:
        DisturbedError: the machine was disturbed at every attempt.
    """
    for number in range(1, NUM_ATTEMPTS):
        try:
            return attempt()
        except DisturbedError as error:
            logger.warning("Attempt %d of %d failed: %s", number, NUM_ATTEMPTS, error)
    return attempt()


def run(
    measure: Callable[..., dict[str, Any]], show: Callable[[dict[str, Any]], Iterable[str]]
) -> None:
    """Call `measure`, print what `show` returns, and write the report if asked.

    Each argument of `measure` whose default value is an int or a str is an option. The default of
    `num_threads` is the number of allowed cores.
    """
    parser = argparse.ArgumentParser(
        description=(inspect.getdoc(measure) or "").partition("\n\n")[0]
    )
    for name, parameter in inspect.signature(measure).parameters.items():
        default = allowed_cores() if name == "num_threads" else parameter.default
        if isinstance(default, int | str):
            option = f"--{name.replace('_', '-')}"
            parser.add_argument(
                option, type=type(default), default=default, help="default: %(default)s"
            )
    parser.add_argument("--json", type=Path, help="write the report here")
    options = vars(parser.parse_args())
    file: Path | None = options.pop("json")
    logging.basicConfig(level=logging.INFO)
    report = measure(**options)
    for line in show(report):
        print(line)
    print(machine_line(report["machine"]))
    if file is not None:
        write_json(report, file)
