"""`python -m offload_adam.bench.training`: `bench train` where no command line is installed."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

import torch

from offload_adam.bench.training.contenders import CONTENDERS
from offload_adam.bench.training.model import Sizes
from offload_adam.bench.training.report import summary
from offload_adam.bench.training.run import NUM_STEPS, measure_train


def main() -> None:
    """Measure, print what was found, and write it where asked."""
    defaults = Sizes()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=None, help="write everything to this file")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--num-layers", type=int, default=defaults.num_layers)
    parser.add_argument("--width", type=int, default=defaults.width)
    parser.add_argument("--num-heads", type=int, default=defaults.num_heads)
    parser.add_argument("--sequence-length", type=int, default=defaults.sequence_length)
    parser.add_argument(
        "--dtype", default=defaults.dtype, choices=("bfloat16", "float16", "float32")
    )
    parser.add_argument("--num-steps", type=int, default=NUM_STEPS)
    parser.add_argument("--largest-batch", type=int, default=None)
    parser.add_argument("--contenders", nargs="+", default=tuple(CONTENDERS), choices=CONTENDERS)
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    report = measure_train(
        Sizes(
            num_layers=given.num_layers,
            width=given.width,
            num_heads=given.num_heads,
            sequence_length=given.sequence_length,
            dtype=given.dtype,
        ),
        given.device,
        num_steps=given.num_steps,
        largest_batch=given.largest_batch,
        contenders=given.contenders,
    )
    for line in summary(report):
        print(line)
    if given.json is not None:
        given.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
