"""`python -m offload_adam.bench.training`: `bench train` for machines without typer."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch

from offload_adam.bench.report import write_json
from offload_adam.bench.training.batches import parse_batches
from offload_adam.bench.training.contenders import CONTENDERS, parse_contenders
from offload_adam.bench.training.model import DTYPES, Sizes
from offload_adam.bench.training.run import NUM_STEPS, failures, measure_train
from offload_adam.bench.training.table import markdown

_SIZES = ("num_layers", "width", "num_heads", "vocabulary", "sequence_length")


def main() -> None:
    """Measure, print the table and write the report; exit with 1 if a contender failed."""
    defaults = Sizes()
    parser = argparse.ArgumentParser(description="Compare training steps with each optimizer.")
    parser.add_argument("--json", type=Path, help="write the report here after each contender")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name in _SIZES:
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=int, default=getattr(defaults, name))
    parser.add_argument("--dtype", default=defaults.dtype, choices=DTYPES)
    parser.add_argument("--num-steps", type=int, default=NUM_STEPS, help="timed steps")
    parser.add_argument("--batches", default="", help="numbers of sequences, such as 48,144")
    parser.add_argument("--largest-batch", type=int, help="most sequences to choose")
    parser.add_argument("--contenders", default=",".join(CONTENDERS), help="default: all")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="for all contenders")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    try:
        sizes = Sizes(dtype=given.dtype, **{name: getattr(given, name) for name in _SIZES})
        batches, contenders = parse_batches(given.batches), parse_contenders(given.contenders)
    except ValueError as error:
        parser.error(str(error))
    report = measure_train(
        sizes,
        given.device,
        num_steps=given.num_steps,
        batches=batches,
        largest_batch=given.largest_batch,
        contenders=contenders,
        time_limit_s=given.time_limit,
        keep=lambda report: None if given.json is None else write_json(report, given.json),
    )
    print(markdown([report]))
    if failed := list(failures(report)):
        raise SystemExit("FAILED: " + "; ".join(failed))


if __name__ == "__main__":
    main()
