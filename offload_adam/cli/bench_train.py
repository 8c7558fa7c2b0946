"""`offload-adam bench train`, `bench predict` and `bench table`: training with each optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from offload_adam.cli.bench import EXIT_DISTURBED, JsonFile, require_dtype, require_writable

if TYPE_CHECKING:
    from offload_adam.bench.training.model import Sizes

NumLayers = Annotated[int, typer.Option(min=1, help="Blocks of the model.")]
Width = Annotated[int, typer.Option(min=1, help="Of the residual stream.")]
NumHeads = Annotated[int, typer.Option(min=1, help="They divide the width.")]
Vocabulary = Annotated[int, typer.Option(min=1, help="Rows of the embedding and of the head.")]
SequenceLength = Annotated[int, typer.Option(min=1, help="Tokens of a sequence.")]
Dtype = Annotated[str, typer.Option("--dtype", help="bfloat16, float16 or float32.")]


def bench_train(
    num_layers: NumLayers = 8,
    width: Width = 1536,
    num_heads: NumHeads = 12,
    vocabulary: Vocabulary = 1024,
    sequence_length: SequenceLength = 512,
    dtype: Dtype = "bfloat16",
    num_steps: Annotated[int, typer.Option(min=1, help="Steps that are timed.")] = 5,
    batches: Annotated[
        str, typer.Option(help="Sequences, such as 48,144; chosen by F/U by default.")
    ] = "",
    largest_batch: Annotated[
        int | None, typer.Option(min=1, help="Most sequences to choose; no limit by default.")
    ] = None,
    contenders: Annotated[
        str | None, typer.Option(help="Names separated by commas; all by default.")
    ] = None,
    time_limit: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="For all of it; none by default.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Measure training steps beside plain AdamW and other offload optimizers, and judge them.

    On the GPU where there is one. Unless given, batches are chosen so that the forward takes from a
    quarter of the update's time to four times that. The file is written after each contender.

    Exit codes: 0 done, 2 a wrong option, 1 a contender failed or had no time.
    """
    sizes = _sizes(num_layers, width, num_heads, vocabulary, sequence_length, dtype)
    if json_file is not None:
        require_writable(json_file)
    import torch

    from offload_adam.bench.training.choices import parse_batches, parse_contenders
    from offload_adam.bench.training.contenders import CONTENDERS
    from offload_adam.bench.training.process import TrainBenchmarkError
    from offload_adam.bench.training.report import summary, write
    from offload_adam.bench.training.run import failures, measure_train

    try:
        chosen = parse_batches(batches)
        names = tuple(CONTENDERS) if contenders is None else parse_contenders(contenders)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    try:
        report = measure_train(
            sizes,
            "cuda" if torch.cuda.is_available() else "cpu",
            num_steps=num_steps,
            batches=chosen,
            largest_batch=largest_batch,
            contenders=names,
            time_limit_s=time_limit,
            keep=lambda report: None if json_file is None else write(report, json_file),
        )
    except TrainBenchmarkError as error:
        typer.echo(f"offload-adam: {error}", err=True)
        raise typer.Exit(EXIT_DISTURBED) from None
    for line in summary(report):
        typer.echo(line)
    failed = list(failures(report))
    for line in failed:
        typer.echo(f"offload-adam: {line}", err=True)
    if failed:
        raise typer.Exit(EXIT_DISTURBED)


def _sizes(
    num_layers: int, width: int, num_heads: int, vocabulary: int, sequence_length: int, dtype: str
) -> Sizes:
    require_dtype(dtype)
    from offload_adam.bench.training.model import Sizes

    try:
        return Sizes(
            num_layers=num_layers,
            width=width,
            num_heads=num_heads,
            vocabulary=vocabulary,
            sequence_length=sequence_length,
            dtype=dtype,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--num-heads") from None


def bench_predict(
    batches: Annotated[str, typer.Option(help="Sequences, such as 48,144.")],
    host_bandwidths: Annotated[
        str, typer.Option(metavar="GB/S", help="Of host memory; several, such as 60,100,150.")
    ],
    bus_bandwidth: Annotated[
        float, typer.Option(metavar="GB/S", min=1e-3, help="Of copies in one direction.")
    ],
    device_bandwidth: Annotated[
        float, typer.Option(metavar="GB/S", min=1e-3, help="Of GPU memory.")
    ],
    tera_flops: Annotated[
        float, typer.Option("--tflops", min=1e-3, help="Of forward and backward, 1e12 a second.")
    ],
    json_file: Annotated[Path, typer.Option("--json", help="The file to write.")],
    num_layers: NumLayers = 8,
    width: Width = 1536,
    num_heads: NumHeads = 12,
    vocabulary: Vocabulary = 1024,
    sequence_length: SequenceLength = 512,
    dtype: Dtype = "bfloat16",
) -> None:
    """Predict the rows of `bench train` for a machine that is described, for `bench table`.

    Exit codes: 0 done, 2 a wrong option, 1 anything else.
    """
    sizes = _sizes(num_layers, width, num_heads, vocabulary, sequence_length, dtype)
    require_writable(json_file)
    from offload_adam.bench.training.choices import parse_batches
    from offload_adam.bench.training.predict import predict_train
    from offload_adam.bench.training.report import write

    try:
        found = predict_train(
            sizes,
            parse_batches(batches),
            host_gb_per_s=[float(word) for word in host_bandwidths.split(",")],
            bus_gb_per_s=bus_bandwidth,
            device_gb_per_s=device_bandwidth,
            tera_flops=tera_flops,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    write(found, json_file)
    typer.echo(f"wrote {json_file}")


def bench_table(
    files: Annotated[list[Path], typer.Argument(help="Result files of `bench train --json`.")],
    predictions: Annotated[
        list[Path] | None, typer.Option(help="Files of `bench predict`; repeat for several.")
    ] = None,
    markdown_file: Annotated[
        Path | None, typer.Option("--markdown", help="Write the table here, not to the terminal.")
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw the step times here, as SVG.")] = None,
) -> None:
    """Make the documentation's table and picture from result files of `bench train`.

    Exit codes: 0 done, 2 a wrong option or file, 1 anything else.
    """
    for file in (markdown_file, picture):
        if file is not None:
            require_writable(file)
    from offload_adam.bench.training.picture import svg
    from offload_adam.bench.training.table import markdown, read

    try:
        reports = [read(file, "train") for file in files]
        expected = [read(file, "predict") for file in predictions or ()]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    text = markdown(reports, expected)
    if markdown_file is None:
        typer.echo(text)
    else:
        markdown_file.write_text(text, encoding="utf-8")
        typer.echo(f"wrote {markdown_file}")
    if picture is not None:
        picture.write_text(svg(reports), encoding="utf-8")
        typer.echo(f"wrote {picture}")
