"""`offload-adam bench train`, `bench predict` and `bench table`: training with each optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from offload_adam.cli.bench import EXIT_FAILED, JsonFile, require_writable

if TYPE_CHECKING:
    from offload_adam.bench.training.model import Sizes

NumLayers = Annotated[int, typer.Option(min=1, help="Blocks of the model.")]
Width = Annotated[int, typer.Option(min=1, help="Width of the residual stream.")]
NumHeads = Annotated[int, typer.Option(min=1, help="Attention heads; must divide the width.")]
Vocabulary = Annotated[int, typer.Option(min=1, help="Rows of the embedding and of the head.")]
SequenceLength = Annotated[int, typer.Option(min=1, help="Tokens of a sequence.")]
Dtype = Annotated[
    str, typer.Option("--dtype", help="Dtype of the parameters: bfloat16, float16 or float32.")
]


def bench_train(
    num_layers: NumLayers = 8,
    width: Width = 1536,
    num_heads: NumHeads = 12,
    vocabulary: Vocabulary = 1024,
    sequence_length: SequenceLength = 512,
    dtype: Dtype = "bfloat16",
    num_steps: Annotated[int, typer.Option(min=1, help="Steps to time.")] = 5,
    batches: Annotated[
        str, typer.Option(help="Numbers of sequences, such as 48,144; default: chosen as above.")
    ] = "",
    largest_batch: Annotated[
        int | None, typer.Option(min=1, help="Most sequences to choose; default: no limit.")
    ] = None,
    contenders: Annotated[
        str | None, typer.Option(help="Names from the list above, with commas; default: all.")
    ] = None,
    time_limit: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="Limit for all contenders together; default: none."),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Compare training steps of this package, plain AdamW and other offload optimizers.

    Runs on the GPU if there is one. Without --batches, chooses batches whose forward takes 0.25 to
    4 times as long as the optimizer's update. Writes the file after each contender.

    Contenders: offload_adam, torch_fused, offload_adam_sequential, fsdp2_cpu_offload,
    torchao_cpu_offload, deepspeed_zero_offload.

    Exit codes: 0 done, 2 a wrong option, 1 a contender failed or had no time.
    """
    sizes = _sizes(num_layers, width, num_heads, vocabulary, sequence_length, dtype)
    if json_file is not None:
        require_writable(json_file)
    import torch

    from offload_adam.bench.report import write_json
    from offload_adam.bench.training.batches import parse_batches
    from offload_adam.bench.training.contenders import CONTENDERS, parse_contenders
    from offload_adam.bench.training.process import TrainBenchmarkError
    from offload_adam.bench.training.run import failures, measure_train
    from offload_adam.bench.training.table import markdown

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
            keep=lambda report: None if json_file is None else write_json(report, json_file),
        )
    except TrainBenchmarkError as error:
        typer.echo(f"offload-adam: {error}", err=True)
        raise typer.Exit(EXIT_FAILED) from None
    typer.echo(markdown([report]))
    failed = list(failures(report))
    for line in failed:
        typer.echo(f"offload-adam: {line}", err=True)
    if failed:
        raise typer.Exit(EXIT_FAILED)


def _sizes(
    num_layers: int, width: int, num_heads: int, vocabulary: int, sequence_length: int, dtype: str
) -> Sizes:
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
        raise typer.BadParameter(str(error)) from None


def bench_predict(
    batches: Annotated[str, typer.Option(help="Numbers of sequences, such as 48,144.")],
    host_bandwidths: Annotated[
        str, typer.Option(metavar="GB/S", help="Bandwidths of host memory, such as 60,100,150.")
    ],
    bus_bandwidth: Annotated[
        float, typer.Option(metavar="GB/S", min=1e-3, help="Bandwidth of copies in one direction.")
    ],
    device_bandwidth: Annotated[
        float, typer.Option(metavar="GB/S", min=1e-3, help="Bandwidth of GPU memory.")
    ],
    tera_flops: Annotated[
        float,
        typer.Option("--tflops", min=1e-3, help="Speed of forward and backward, in TFLOP/s."),
    ],
    json_file: Annotated[Path, typer.Option("--json", help="Write the predictions here.")],
    num_layers: NumLayers = 8,
    width: Width = 1536,
    num_heads: NumHeads = 12,
    vocabulary: Vocabulary = 1024,
    sequence_length: SequenceLength = 512,
    dtype: Dtype = "bfloat16",
) -> None:
    """Predict the times of `bench train` on a machine with the given speeds.

    Show the predictions with `bench table --predictions`.

    Exit codes: 0 done, 2 a wrong option, 1 anything else.
    """
    sizes = _sizes(num_layers, width, num_heads, vocabulary, sequence_length, dtype)
    require_writable(json_file)
    from offload_adam.bench.report import write_json
    from offload_adam.bench.training.batches import parse_batches
    from offload_adam.bench.training.predict import predict_train

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
    write_json(found, json_file)
    typer.echo(f"Wrote {json_file}")


def bench_table(
    files: Annotated[list[Path], typer.Argument(help="Reports of `bench train --json`.")],
    predictions: Annotated[
        list[Path] | None, typer.Option(help="A file of `bench predict`; repeat for several.")
    ] = None,
    markdown_file: Annotated[
        Path | None, typer.Option("--markdown", help="Write the table here instead of printing it.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Draw the step times as bars here, in SVG.")
    ] = None,
) -> None:
    """Show results of `bench train` as a Markdown table and as a picture.

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
        typer.echo(f"Wrote {markdown_file}")
    if picture is not None:
        picture.write_text(svg(reports), encoding="utf-8")
        typer.echo(f"Wrote {picture}")
