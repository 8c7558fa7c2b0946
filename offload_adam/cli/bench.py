"""`offload-adam bench`: measure this machine's limit, this package and its peers."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

EXIT_DISTURBED = 1
EXIT_DOES_NOT_FIT = 3
LEAST_PAIRS = 7

bench_app = typer.Typer(
    help="Measure the machine's limit, this package and its peers in one run.",
    no_args_is_help=True,
)

Numel = Annotated[int, typer.Option("--numel", min=1, help="Parameters.")]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, help="Threads; all allowed cores by default.")
]
Pairs = Annotated[
    int, typer.Option("--pairs", min=LEAST_PAIRS, help="Interleaved rounds that are counted.")
]
JsonFile = Annotated[
    Path | None, typer.Option("--json", help="Write everything measured to this file.")
]


@bench_app.command("kernel")
def bench_kernel(
    numel: Numel = 64_000_000,
    threads: Threads = None,
    pairs: Pairs = LEAST_PAIRS,
    json_file: JsonFile = None,
) -> None:
    """Measure the update alone, in fp32.

    Exit codes: 0 done, 2 a wrong option, 3 not enough memory, 1 anything else.
    """
    num_threads = _prepare(threads, json_file)
    from offload_adam.bench.kernel import measure_kernel

    _show(lambda: measure_kernel(numel, num_threads, pairs), json_file)


@bench_app.command("step")
def bench_step(
    numel: Numel = 64_000_000,
    threads: Threads = None,
    pairs: Pairs = LEAST_PAIRS,
    json_file: JsonFile = None,
) -> None:
    """Measure all of a CPU-side step: bf16 gradient in, clip, AdamW, bf16 parameter out.

    Exit codes: 0 done, 2 a wrong option, 3 not enough memory, 1 anything else.
    """
    num_threads = _prepare(threads, json_file)
    from offload_adam.bench.step import measure_step

    _show(lambda: measure_step(numel, num_threads, pairs), json_file)


@bench_app.command("tensors")
def bench_tensors(
    num_tensors: Annotated[
        int, typer.Option("--tensors", min=1, help="How many small tensors.")
    ] = 10_000,
    tensor_numel: Annotated[
        int, typer.Option("--numel", min=1, help="Parameters in each of them.")
    ] = 6_400,
    dtype: Annotated[
        str, typer.Option("--dtype", help="bfloat16, float16 or float32.")
    ] = "bfloat16",
    threads: Threads = None,
    pairs: Pairs = LEAST_PAIRS,
    json_file: JsonFile = None,
) -> None:
    """Measure what many small tensors cost beside one large one, on top of plain backward.

    Exit codes: 0 done, 2 a wrong option, 3 not enough memory, 1 anything else.
    """
    require_dtype(dtype)
    num_threads = _prepare(threads, json_file)
    import torch

    from offload_adam.bench.tensors import measure_tensors

    torch_dtype: torch.dtype = getattr(torch, dtype)
    _show(
        lambda: measure_tensors(num_tensors, tensor_numel, torch_dtype, num_threads, pairs),
        json_file,
    )


@bench_app.command("rows")
def bench_rows(
    num_rows: Annotated[int, typer.Option("--num-rows", min=1, help="Rows of the table.")] = (
        1_000_000
    ),
    width: Annotated[int, typer.Option("--width", min=1, help="Parameters in a row.")] = 64,
    touched: Annotated[int, typer.Option("--touched", min=1, help="Rows with a gradient.")] = 1_000,
    threads: Threads = None,
    pairs: Pairs = LEAST_PAIRS,
    json_file: JsonFile = None,
) -> None:
    """Measure the lazy update of a table's touched rows against the dense update of all rows.

    Exit codes: 0 done, 2 a wrong option, 3 not enough memory, 1 anything else.
    """
    if touched > num_rows:
        raise typer.BadParameter(
            f"{touched} is more than the {num_rows} rows of the table", param_hint="--touched"
        )
    num_threads = _prepare(threads, json_file)
    from offload_adam.bench.rows import measure_rows

    _show(lambda: measure_rows(num_rows, width, touched, num_threads, pairs), json_file)


@bench_app.command("profile")
def bench_profile(
    width: Annotated[int, typer.Option("--width", min=16, help="Of 8 square layers.")] = 512,
    pairs: Pairs = 301,
    json_file: JsonFile = None,
) -> None:
    """Measure steps, on one thread, whose spans and memory are recorded against the same unwatched.

    Exit codes: 0 done, 2 a wrong option, 3 not enough memory, 1 anything else.
    """
    _prepare(1, json_file)
    from offload_adam.bench.profile import measure_profile

    _show(lambda: measure_profile(width, pairs), json_file)


def require_dtype(dtype: str) -> None:
    """Reject a dtype that no model is measured in."""
    if dtype not in ("bfloat16", "float16", "float32"):
        raise typer.BadParameter(
            f"{dtype!r} is not one of bfloat16, float16, float32", param_hint="--dtype"
        )


def _prepare(threads: int | None, json_file: Path | None) -> int:
    """Check what typer cannot, and return the number of threads, before torch is imported."""
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
    # Peers with OpenMP runtimes of their own read it when they are loaded, and know no other way.
    os.environ["OMP_NUM_THREADS"] = str(num_threads)
    return num_threads


def require_writable(path: Path) -> None:
    """Reject a file that could not be written, rather than after minutes of measuring."""
    folder = path.parent
    if not folder.is_dir():
        raise typer.BadParameter(f"there is no folder {folder}", param_hint="--json")
    if path.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise typer.BadParameter(f"{path} cannot be written", param_hint="--json")


def _show(measure: Callable[[], dict[str, Any]], json_file: Path | None) -> None:
    """Measure, print the table and write the file; a refused measurement ends with its reason."""
    from rich.console import Console

    from offload_adam.bench.limit import LimitRefusedError
    from offload_adam.bench.report import print_report, write_json
    from offload_adam.bench.tensors import MeasurementError
    from offload_adam.errors import HostMemoryError

    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            report = measure()
    except (LimitRefusedError, MeasurementError) as error:
        typer.echo(f"offload-adam: {error}", err=True)
        raise typer.Exit(EXIT_DISTURBED) from None
    except HostMemoryError as error:
        typer.echo(f"offload-adam: {error}", err=True)
        raise typer.Exit(EXIT_DOES_NOT_FIT) from None
    print_report(report, Console())
    if json_file is not None:
        write_json(report, json_file)
        typer.echo(f"wrote {json_file}")


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print a warning as one line, without the place in the source that it comes from."""
    typer.echo(f"warning: {message}", err=True)
