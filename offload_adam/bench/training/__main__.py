"""`python -m offload_adam.bench.training`: `bench train` where no command line is installed."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch

from offload_adam.bench.training.choices import parse_batches, parse_contenders
from offload_adam.bench.training.contenders import CONTENDERS
from offload_adam.bench.training.model import Sizes
from offload_adam.bench.training.report import summary, write
from offload_adam.bench.training.run import NUM_STEPS, failures, measure_train

_SIZES = ("num_layers", "width", "num_heads", "vocabulary", "sequence_length")


def main() -> None:
    """Measure, print what was found, and write it where asked; exit with 1 if something failed."""
    defaults = Sizes()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write everything to this file, after each")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name in _SIZES:
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=int, default=getattr(defaults, name))
    dtypes = ("bfloat16", "float16", "float32")
    parser.add_argument("--dtype", default=defaults.dtype, choices=dtypes)
    parser.add_argument("--num-steps", type=int, default=NUM_STEPS)
    parser.add_argument("--batches", default="", help="sequences, such as 48,144; or chosen")
    parser.add_argument("--largest-batch", type=int, default=None)
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="for all of it")
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
        keep=lambda report: None if given.json is None else write(report, given.json),
    )
    for line in summary(report):
        print(line)
    if failed := list(failures(report)):
        raise SystemExit("FAILED: " + "; ".join(failed))


if __name__ == "__main__":
    main()
