"""`offload-adam bench kernel` and `bench step`: this package and its peers, on this CPU."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Annotated

import typer

EXIT_FAILED = 1
EXIT_DOES_NOT_FIT = 3
LEAST_PAIRS = 7

bench_app = typer.Typer(
    help="Compare this package with other Adam implementations on this machine.",
    no_args_is_help=True,
)

Numel = Annotated[int, typer.Option("--numel", min=1, help="Number of parameters.")]
Threads = Annotated[
    int | None,
    typer.Option("--threads", min=1, help="Number of threads; default: all allowed cores."),
]
Pairs = Annotated[
    int, typer.Option("--pairs", min=LEAST_PAIRS, help="Timed rounds; each runs all contenders.")
]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the full report here.")]


@bench_app.command("kernel")
def bench_kernel(
    numel: Numel = 64_000_000,
    threads: Threads = None,
    pairs: Pairs = LEAST_PAIRS,
    json_file: JsonFile = None,
) -> None:
    """Compare the Adam update alone, in fp32.

    Exit codes: 0 done, 2 a wrong option, 3 not enough memory, 1 anything else.
    """
    _compare("kernel", numel, threads, pairs, json_file)


@bench_app.command("step")
def bench_step(
    numel: Numel = 64_000_000,
    threads: Threads = None,
    pairs: Pairs = LEAST_PAIRS,
    json_file: JsonFile = None,
) -> None:
    """Compare whole steps on the CPU: bf16 gradient, clipping, AdamW, bf16 parameter.

    Exit codes: 0 done, 2 a wrong option, 3 not enough memory, 1 anything else.
    """
    _compare("step", numel, threads, pairs, json_file)


def _compare(
    work: str, numel: int, threads: int | None, pairs: int, json_file: Path | None
) -> None:
    """Check the options that typer cannot check, measure, print the table and write the file."""
    from offload_adam.kernels.threads import allowed_cores

    cores = allowed_cores()
    num_threads = cores if threads is None else threads
    if num_threads > cores:
        raise typer.BadParameter(
            f"{num_threads} is more than the {cores} core(s) that this process may use",
            param_hint="--threads",
        )
    if json_file is not None:
        require_writable(json_file)
    # A peer with its own OpenMP runtime reads this variable when it is loaded, and has no other
    # setting.
    os.environ["OMP_NUM_THREADS"] = str(num_threads)
    from offload_adam.bench import kernel, step
    from offload_adam.bench.report import comparison, write_json
    from offload_adam.errors import HostMemoryError

    measure = kernel.measure_kernel if work == "kernel" else step.measure_step
    try:
        with warnings.catch_warnings():
            # One line each, without the place in the source.
            warnings.showwarning = lambda message, *_, **__: typer.echo(
                f"warning: {message}", err=True
            )
            report = measure(numel, num_threads, pairs)
    except HostMemoryError as error:
        typer.echo(f"offload-adam: {error}", err=True)
        raise typer.Exit(EXIT_DOES_NOT_FIT) from None
    for line in comparison(report):
        typer.echo(line)
    if json_file is not None:
        write_json(report, json_file)
        typer.echo(f"Wrote {json_file}")


def require_writable(path: Path) -> None:
    """Reject a file that cannot be written, before minutes of measuring."""
    folder = path.parent
    if not folder.is_dir():
        raise typer.BadParameter(f"there is no folder {folder}", param_hint="--json")
    if path.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise typer.BadParameter(f"{path} cannot be written", param_hint="--json")
