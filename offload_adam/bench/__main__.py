"""`offload-adam bench`, or `python -m offload_adam.bench` on machines without typer."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from offload_adam.bench.fsdp2 import DTYPES, Fsdp2BenchmarkError, measure_fsdp2, sizes_of
from offload_adam.bench.kernel import measure_kernel
from offload_adam.bench.report import comparison, partial_path, write_json
from offload_adam.bench.step import measure_step
from offload_adam.bench.training.contenders import CONTENDERS
from offload_adam.bench.training.model import add_size_options, read_sizes
from offload_adam.bench.training.results import failures, markdown
from offload_adam.bench.training.run import (
    NUM_STEPS,
    ModelTooLargeError,
    TrainBenchmarkError,
    measure_train,
)
from offload_adam.errors import HostMemoryError
from offload_adam.kernels.threads import ThreadSettingsError, allowed_cores
from offload_adam.options import StateFormat
from offload_adam.printable import printable

EXIT_DOES_NOT_FIT = 3
LEAST_PAIRS = 7
MOST = 10**15
MAX_SHOWN = 200
NUM_CPU_RANKS = 2
KERNEL = "Compare the Adam update alone, in fp32."
STEP = "Compare whole steps on the CPU: bf16 gradient, clipping, AdamW, bf16 parameter."
FSDP2 = "Compare clipping and the step on a model that FSDP2 shards into host memory."
TRAIN = "Compare training steps of this package, plain AdamW and other offload optimizers."
CHOICE = (
    "Without --batches, chooses batches whose forward takes 0.25 to 4 times as long as the "
    f"optimizer's update. Contenders: {', '.join(CONTENDERS)}."
)
ROUNDS = "timed rounds, each with all contenders; default: %(default)s"
EXIT_CODES = (
    "Exit codes: 0 done, 2 a wrong option, 3 not enough memory, 1 anything else, such as a "
    "contender that failed or had no time."
)


def main(
    arguments: Sequence[str] | None = None, prog: str = "python -m offload_adam.bench"
) -> None:
    """Run a benchmark, print its table and write its report."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Compare this package with other Adam implementations on this machine.",
        epilog=EXIT_CODES,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, text in (("kernel", KERNEL), ("step", STEP)):
        command = commands.add_parser(name, help=text, description=text, epilog=EXIT_CODES)
        command.set_defaults(run=_compare, work=name, parser=command)
        _add_numel_option(command)
        _add_compare_options(command)
        if name == "step":
            stored = "format of this package's state; default: %(default)s"
            formats = get_args(StateFormat)
            command.add_argument("--state-format", choices=formats, default="fp32", help=stored)
            kept = "also time a step whose state outlives the process (memory.keep: shared)"
            command.add_argument("--keep", action="store_true", help=kept)
    command = commands.add_parser("fsdp2", help=FSDP2, description=FSDP2, epilog=EXIT_CODES)
    command.set_defaults(run=_fsdp2, parser=command)
    _add_fsdp2_options(command)
    command = commands.add_parser(
        "train", help=TRAIN, description=f"{TRAIN} {CHOICE}", epilog=EXIT_CODES
    )
    command.set_defaults(run=_train, parser=command)
    _add_train_options(command)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    try:
        options.run(options)
    except (argparse.ArgumentTypeError, ThreadSettingsError) as error:
        options.parser.error(str(error))


def _add_numel_option(parser: argparse.ArgumentParser) -> None:
    number = "number of parameters; default: %(default)s"
    parser.add_argument("--numel", type=at_least(1), default=64_000_000, help=number)


def _add_compare_options(parser: argparse.ArgumentParser) -> None:
    add, cores = parser.add_argument, allowed_cores()
    threads = "threads of every contender; default: all allowed cores"
    add("--threads", type=at_least(1), default=cores, help=threads)
    add("--pairs", type=at_least(LEAST_PAIRS), default=LEAST_PAIRS, help=ROUNDS)
    add("--json", type=writable, help="write the full report here")


def _add_fsdp2_options(parser: argparse.ArgumentParser) -> None:
    add, num_gpus = parser.add_argument, torch.cuda.device_count()
    _add_numel_option(parser)
    add("--num-layers", type=at_least(1), default=8, help="number of blocks; default: %(default)s")
    shards = "dtype of the shards, and of the state of torch's AdamW; default: %(default)s"
    add("--dtype", choices=tuple(DTYPES), default="bf16", help=shards)
    ranks = "processes, one for each GPU if there are any; default: %(default)s"
    add("--ranks", type=at_least(1), default=num_gpus or NUM_CPU_RANKS, help=ranks)
    threads = "threads of each rank; default: the allowed cores divided by the ranks"
    add("--threads", type=at_least(1), help=threads)
    add("--repeats", type=at_least(LEAST_PAIRS), default=LEAST_PAIRS, help=ROUNDS)
    add("--json", type=writable, help="write the full report here")


def _add_train_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_size_options(parser)
    timed = "steps to time; default: %(default)s"
    add("--num-steps", type=at_least(1), default=NUM_STEPS, help=timed)
    chosen = "numbers of sequences, such as 48,144; default: chosen as above"
    add("--batches", type=whole_numbers, default=(), help=chosen)
    add("--largest-batch", type=at_least(1), help="most sequences to choose; default: no limit")
    names = "names from the list above, with commas; default: all"
    add("--contenders", type=contender_names, default=tuple(CONTENDERS), help=names)
    limit = "for all contenders together; default: none"
    add("--time-limit", type=float, metavar="SECONDS", help=limit)
    add("--json", type=writable, help="write the report here after each contender")


def at_least(least: int) -> Callable[[str], int]:
    """Return a function that reads a whole number from `least` to MOST."""

    def read(text: str) -> int:
        is_short = text.strip().isdecimal() and len(text) <= len(str(MOST))
        if not is_short or not least <= int(text) <= MOST:
            raise argparse.ArgumentTypeError(
                f"must be a number of at least {least} and at most {MOST:,}, not "
                f"{printable(text, MAX_SHOWN)}"
            )
        return int(text)

    return read


def whole_numbers(text: str) -> tuple[int, ...]:
    """Return numbers of at least 1 that are separated by commas; empty for an empty text."""
    return tuple(at_least(1)(word) for word in text.split(",") if word.strip())


def contender_names(text: str) -> tuple[str, ...]:
    """Return names of CONTENDERS that are separated by commas."""
    names = [word.strip() for word in text.split(",") if word.strip()]
    unknown = [name for name in names if name not in CONTENDERS]
    if unknown or not names:
        raise argparse.ArgumentTypeError(
            f"unknown contenders: {', '.join(unknown) or 'none given'}; choose from "
            + ", ".join(CONTENDERS)
        )
    return tuple(names)


def writable(text: str) -> Path:
    """Reject a file that cannot be written, before minutes of measuring.

    Only a regular file may exist already: `write_json` replaces it, which would destroy a device.
    """
    path = Path(text)
    if not os.path.isdir(path.parent):
        raise argparse.ArgumentTypeError(
            f"there is no folder {printable(str(path.parent), MAX_SHOWN)}"
        )
    try:
        if path.exists() and not (path.is_file() and os.access(path, os.W_OK)):
            raise argparse.ArgumentTypeError(f"{path} cannot be written")
        # Only a try shows whether the file system accepts the name.
        partial_path(path).touch()
        partial_path(path).unlink()
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"{printable(text, MAX_SHOWN)} cannot be written: {error.strerror}"
        ) from error
    return path


def _write(report: Mapping[str, Any], path: Path | None) -> None:
    """Write the report if a file is given for it."""
    if path is None:
        return
    try:
        write_json(report, path)
    except OSError as error:
        sys.exit(f"offload-adam: {path} cannot be written: {error.strerror}. Free space there.")


def _reject_threads(num_threads: int) -> None:
    if num_threads > (cores := allowed_cores()):
        raise argparse.ArgumentTypeError(
            f"--threads: {num_threads} is more than the {cores} core(s) that this process may use"
        )


def _compare(options: argparse.Namespace) -> None:
    """Run `bench kernel` or `bench step`."""
    _reject_threads(options.threads)
    # A peer with its own OpenMP runtime reads this variable when it is loaded, and has no other
    # setting.
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    sizes = options.numel, options.threads, options.pairs
    if options.work == "kernel":
        _show(lambda: measure_kernel(*sizes), options.json)
    else:
        keeps = options.keep
        _show(lambda: measure_step(*sizes, options.state_format, keeps=keeps), options.json)


def _fsdp2(options: argparse.Namespace) -> None:
    """Run `bench fsdp2`."""
    if 0 < (num_gpus := torch.cuda.device_count()) < options.ranks:
        raise argparse.ArgumentTypeError(f"--ranks: there are only {num_gpus} GPU(s)")
    sizes = sizes_of(options.numel, options.num_layers, options.dtype)
    num_threads = options.threads or max(1, allowed_cores() // options.ranks)
    _reject_threads(num_threads)
    try:
        _show(
            lambda: measure_fsdp2(sizes, options.ranks, num_threads, options.repeats), options.json
        )
    except Fsdp2BenchmarkError as error:
        sys.exit(f"offload-adam: {error}")


def _show(measure: Callable[[], dict[str, Any]], path: Path | None) -> None:
    """Measure, print the table, and write the report to `path` if it is given."""
    try:
        report = measure()
    except HostMemoryError as error:
        print(f"offload-adam: {error}", file=sys.stderr)
        sys.exit(EXIT_DOES_NOT_FIT)
    print("\n".join(comparison(report)))
    _write(report, path)
    if path is not None:
        print(f"Wrote {path}")


def _train(options: argparse.Namespace) -> None:
    """Run `bench train`."""
    try:
        report = measure_train(
            read_sizes(options),
            "cuda" if torch.cuda.is_available() else "cpu",
            num_steps=options.num_steps,
            batches=options.batches,
            largest_batch=options.largest_batch,
            contenders=options.contenders,
            time_limit_s=options.time_limit,
            keep=lambda report: _write(report, options.json),
        )
    except ModelTooLargeError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    except TrainBenchmarkError as error:
        sys.exit(f"offload-adam: {error}")
    print(markdown(report))
    if failed := list(failures(report)):
        sys.exit("offload-adam: " + "; ".join(failed))


if __name__ == "__main__":
    main()
