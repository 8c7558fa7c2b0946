"""`offload-adam plan`: the memory and the time of a run, without starting it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from offload_adam.cli.output import (
    EXIT_BAD_CONFIGURATION,
    fail,
    require_folder_of,
    write_text,
)
from offload_adam.cli.quantities import parse_count, parse_nbytes, parse_share, parse_speed
from offload_adam.cli.train import EXIT_DOES_NOT_FIT, OverridesArgument, load_arguments
from offload_adam.printable import show

if TYPE_CHECKING:
    from offload_adam.layout.flat import ParameterSpec
    from offload_adam.options import StateFormat
    from offload_adam.plan.inputs import Machine
    from offload_adam.plan.setup import Setup

# GB/s or TFLOPS: far beyond all hardware, so that no predicted time overflows.
_LEAST_SPEED, _MOST_SPEED = 1e-6, 10**9
_ITEMSIZES = {"fp32": 4, "bf16": 2, "fp16": 2}
_SEQUENCE_LENGTH = 4096


def plan(
    config: Annotated[
        str | None,
        typer.Argument(metavar="CONFIG", help="A YAML file. Or give --model or --params."),
    ] = None,
    overrides: OverridesArgument = None,
    model: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="A Hugging Face config.json, or the folder with it. Nothing is downloaded.",
        ),
    ] = None,
    params: Annotated[
        str | None, typer.Option(metavar="N", help="Number of parameters, such as 7B or 350M.")
    ] = None,
    param_dtype: Annotated[
        str, typer.Option(help="With --model or --params, their dtype: fp32, bf16 or fp16.")
    ] = "bf16",
    trainable: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE",
            help="With --model or --params, the trained share, such as 1%. The rest is frozen.",
        ),
    ] = None,
    world_size: Annotated[int, typer.Option(help="Number of ranks, one for each GPU.")] = 1,
    local_world_size: Annotated[
        int | None, typer.Option(help="Number of ranks on a node. By default all ranks.")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(metavar="NAME", help="The GPU, such as H100 or RTX-4090.")
    ] = None,
    gpu_memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Instead of --gpu, usable memory of one, such as 79GiB."),
    ] = None,
    host_memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Memory of one node. By default that available here."),
    ] = None,
    state_format: Annotated[
        str | None,
        typer.Option(
            help="Format of the state: fp32, bf16, mixed or int8. By default as in CONFIG, or fp32."
        ),
    ] = None,
    fit: Annotated[
        bool, typer.Option("--fit", help="Plan with the most exact state format that fits.")
    ] = False,
    fsdp2: Annotated[
        bool,
        typer.Option("--fsdp2", help="FSDP2 shards the parameters. In CONFIG: section parallel."),
    ] = False,
    replicate: Annotated[
        int | None, typer.Option(help="With --fsdp2, number of copies of the parameters (HSDP).")
    ] = None,
    offload_weights: Annotated[
        bool,
        typer.Option("--offload-weights", help="With --fsdp2, its CPUOffloadPolicy."),
    ] = False,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Sequences of a rank in one forward. By default as in CONFIG, or 1."),
    ] = None,
    sequence_length: Annotated[
        int | None,
        typer.Option(
            help=f"Tokens of a sequence. By default as in CONFIG, or {_SEQUENCE_LENGTH:,}."
        ),
    ] = None,
    checkpointing: Annotated[
        bool,
        typer.Option("--checkpointing", help="Layers are recomputed (activation checkpointing)."),
    ] = False,
    offload_fraction: Annotated[
        float | None,
        typer.Option(help="Share of the state on the host. By default as in CONFIG, or all."),
    ] = None,
    host_bandwidth: Annotated[
        str | None,
        typer.Option(metavar="SPEED", help="Of a node's memory in a step, such as 300GB/s."),
    ] = None,
    bus_bandwidth: Annotated[
        str | None,
        typer.Option(metavar="SPEED", help="Of one GPU's copies in one direction, as 25GB/s."),
    ] = None,
    network_bandwidth: Annotated[
        str | None,
        typer.Option(metavar="SPEED", help="At which a rank sends in collectives, as 400Gbit/s."),
    ] = None,
    tera_flops: Annotated[
        float | None,
        typer.Option("--tflops", help="Speed of a rank's forward and backward, in TFLOPS."),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Tokens of a rank in one step, for --tflops. By default as in CONFIG."
        ),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure the bandwidths of this machine.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the plan to this file as JSON.")
    ] = None,
    timeline_file: Annotated[
        Path | None,
        typer.Option("--timeline", help="Draw the timeline of a step to this file, as text."),
    ] = None,
) -> None:
    """Say whether a model fits, what would make it fit, and how long a step takes.

    Nothing is allocated. The parameters of CONFIG are on a GPU with --gpu or --gpu-memory or if
    this machine has a GPU, those of --model and --params always.

    The time is predicted from bandwidths: `offload-adam doctor` has saved those of this machine,
    --measure measures them now, and options override both. With --tflops, the time includes forward
    and backward, and the plan shows how much of the optimizer's time they do not hide.

    Exit codes: 0 it fits, 2 wrong option or configuration, 3 it does not fit, 1 any other error.
    """
    from rich.console import Console

    from offload_adam.config import ConfigError
    from offload_adam.config.declared import MAX_NBYTES
    from offload_adam.errors import MissingExtraError
    from offload_adam.options import MAX_STEP_COUNT, STATE_FORMAT
    from offload_adam.plan.advice import fits_on_host, most_exact_fit
    from offload_adam.plan.tables import plan_run
    from offload_adam.plan.timing import predict_overlap

    require_folder_of(json_file, "--json")
    require_folder_of(timeline_file, "--timeline")
    try:
        speeds = {
            option: None if text is None else parse_speed(option, text)
            for option, text in (
                ("--host-bandwidth", host_bandwidth),
                ("--bus-bandwidth", bus_bandwidth),
                ("--network-bandwidth", network_bandwidth),
            )
        }
        speeds["--tflops"] = tera_flops
        for option, value, least, most in (
            ("--world-size", world_size, 1, MAX_STEP_COUNT),
            ("--local-world-size", local_world_size, 1, MAX_STEP_COUNT),
            ("--replicate", replicate, 1, MAX_STEP_COUNT),
            ("--tokens", tokens, 1, MAX_NBYTES),
            ("--batch-size", batch_size, 1, MAX_STEP_COUNT),
            ("--sequence-length", sequence_length, 1, MAX_STEP_COUNT),
            *((option, speed, _LEAST_SPEED, _MOST_SPEED) for option, speed in speeds.items()),
        ):
            if value is not None and not least <= value <= most:  # also if it is NaN
                raise ValueError(
                    f"{option} must be at least {least:,} and at most {most:,}, not {show(value)}"
                )
        if [config, model, params].count(None) != 2:
            raise ValueError("give one of CONFIG, --model and --params")
        memory = _Memory.of(gpu, gpu_memory, host_memory)
        subject = ""
        if config is not None:
            if trainable is not None or fsdp2 or replicate is not None or offload_weights:
                raise ValueError(
                    "--trainable, --fsdp2, --replicate and --offload-weights are for --model and "
                    "--params: set them in CONFIG, in its section parallel"
                )
            setup = _setup_of_config(config, overrides or [], memory, world_size)
        else:
            subject, setup = _setup_of_model(model, params, param_dtype)
            setup = _with_trainable(setup, trainable)
            setup = replace(
                setup, fsdp2=_fsdp2(is_on=fsdp2, replicate=replicate, on_host=offload_weights)
            )
        training = setup.training
        shape = training.shape
        if shape is not None and not shape.saved_numel and checkpointing:
            raise ValueError(
                "the activations of this model cannot be estimated, because it does not consist of "
                "layers of matrices that read tokens: leave out --checkpointing"
            )
        training = replace(
            training,
            world_size=world_size,
            local_world_size=world_size if local_world_size is None else local_world_size,
            num_tokens=tokens or training.num_tokens,
            batch_size=batch_size or training.batch_size,
            sequence_length=sequence_length or training.sequence_length,
            checkpointing=checkpointing,
        )
        if offload_fraction is not None:
            training = training.with_offload(offload_fraction=offload_fraction)
        if state_format is not None:
            if fit:
                raise ValueError("give either --state-format or --fit")
            STATE_FORMAT.check("--state-format", state_format)
            training = replace(training, state_format=cast("StateFormat", state_format))
        if tera_flops is not None and training.num_tokens is None:
            raise ValueError("--tflops needs --tokens, the tokens of a rank in one step")
        setup = replace(setup, training=training)
        if fit:
            setup = most_exact_fit(setup, _machine(setup, speeds, memory, measure=False))
        machine = _machine(setup, speeds, memory, measure=measure)
        timeline = predict_overlap(*setup.resolve(), machine)
        if timeline_file is not None and timeline is None:
            raise ValueError(
                "--timeline needs an overlapped step: parameters on a GPU, and gradients that the "
                "optimizer streams and averages. It also needs all speeds: --tflops with --tokens, "
                "--host-bandwidth, --bus-bandwidth, and for several ranks --network-bandwidth"
            )
    except (ConfigError, MissingExtraError, ValueError) as error:
        fail(error, EXIT_BAD_CONFIGURATION)
    if timeline_file is not None and timeline is not None:
        write_text(timeline_file, timeline.draw(), "--timeline")
    values, parts = plan_run(setup, machine, timeline, subject=subject)
    console = Console()
    if fit:
        chosen = f"Planning with state_format {setup.training.state_format!r}"
        if fits_on_host(setup, machine):
            console.print(f"{chosen}, the most exact format that fits into host memory.")
        else:
            console.print(f"No state format fits into host memory. {chosen}, the smallest.")
    for part in parts:
        console.print(part)
    if json_file is not None:
        write_text(json_file, json.dumps(values, indent=2) + "\n", "--json")
    if not values["fits"]:
        raise typer.Exit(EXIT_DOES_NOT_FIT)


@dataclass(frozen=True)
class _Memory:
    """The memory of a GPU and of a node, None where it is not given."""

    device_nbytes: int | None
    host_nbytes: int | None

    @property
    def is_given(self) -> bool:
        """Whether the plan is for another machine than this."""
        return self.device_nbytes is not None or self.host_nbytes is not None

    @classmethod
    def of(cls, gpu: str | None, gpu_memory: str | None, host_memory: str | None) -> _Memory:
        """Return what the options say."""
        from offload_adam.plan.cards import find_card

        if gpu is not None and gpu_memory is not None:
            raise ValueError("give either --gpu or --gpu-memory")
        device = None if gpu_memory is None else parse_nbytes("--gpu-memory", gpu_memory)
        if gpu is not None:
            _, device = find_card(gpu)
        host = None if host_memory is None else parse_nbytes("--host-memory", host_memory)
        return cls(device, host)


def _setup_of_config(config: str, overrides: list[str], memory: _Memory, world_size: int) -> Setup:
    """Return the setup of a configuration file."""
    from offload_adam.plan.setup import Setup
    from offload_adam.train.plan import planner_inputs_of

    specs, training = planner_inputs_of(
        load_arguments([config, *overrides]),
        on_device=memory.device_nbytes is not None,
        world_size=world_size,
    )
    return Setup(specs, training)


def _setup_of_model(model: Path | None, params: str | None, param_dtype: str) -> tuple[str, Setup]:
    """Return the name and the setup of --model or --params."""
    from offload_adam.plan.inputs import MOST_NUMEL, Training, typical_specs
    from offload_adam.plan.setup import Setup
    from offload_adam.plan.shape import ModelShape

    if param_dtype not in _ITEMSIZES:
        raise ValueError(f"--param-dtype must be fp32, bf16 or fp16, not {show(param_dtype)}")
    specs: list[ParameterSpec]
    if model is None:
        numel = parse_count("--params", str(params))
        if not 1 <= numel <= MOST_NUMEL:
            raise ValueError(
                f"--params must be at least 1 and at most {MOST_NUMEL:,}, not {show(numel)}"
            )
        is_bfloat16 = param_dtype == "bf16"
        specs = typical_specs(numel, _ITEMSIZES[param_dtype], is_bfloat16=is_bfloat16)
        shape = ModelShape.typical(numel, _ITEMSIZES[param_dtype])
        name, rows, frozen = "", None, 0
    else:
        import torch

        from offload_adam.integrations.model_config import build_on_meta, sizes_of
        from offload_adam.train.plan import frozen_nbytes, rows_of, shape_of, specs_of

        dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        built = build_on_meta(model, dtypes[param_dtype])
        specs = specs_of(built)
        rows = rows_of(built)
        shape, frozen = shape_of(built, sizes_of(built)), frozen_nbytes(built)
        name = type(built).__name__
    training = Training(
        saves=True, shape=shape, sequence_length=_SEQUENCE_LENGTH, frozen_nbytes=frozen
    )
    return name, Setup(specs, training, rows=rows)


def _with_trainable(setup: Setup, trainable: str | None) -> Setup:
    """Return the setup with this share of each parameter, and the rest frozen."""
    if trainable is None:
        return setup
    share = parse_share("--trainable", trainable)
    specs = [replace(spec, numel=max(1, round(spec.numel * share))) for spec in setup.specs]
    nbytes = [sum(spec.numel * spec.itemsize for spec in some) for some in (setup.specs, specs)]
    return replace(setup, specs=specs).with_training(
        frozen_nbytes=setup.training.frozen_nbytes + nbytes[0] - nbytes[1]
    )


def _fsdp2(*, is_on: bool, replicate: int | None, on_host: bool) -> Any:
    """Return how FSDP2 shards the parameters, None if it does not."""
    from offload_adam.plan.setup import Fsdp2

    if not is_on and (replicate is not None or on_host):
        raise ValueError("--replicate and --offload-weights need --fsdp2")
    return Fsdp2(replicate or 1, on_host) if is_on else None


def _machine(
    setup: Setup, given: Mapping[str, float | None], memory: _Memory, *, measure: bool
) -> Machine:
    """Return the machine: another one if its memory is given, otherwise this one.

    Speeds that are given replace known ones.

    Args:
        given: speeds by option, None where the option is absent.
    """
    from offload_adam.layout.ring import RingSpeed
    from offload_adam.plan.inputs import Machine, Source

    if measure and memory.is_given:
        raise ValueError(
            "--measure measures this machine: leave out --gpu, --gpu-memory and --host-memory, "
            "which describe another"
        )
    # What imports torch is imported only where it is needed: it takes a second.
    machine = Machine()
    device_nbytes, host_nbytes = memory.device_nbytes, memory.host_nbytes
    _, training = setup.resolve()
    if not memory.is_given:
        from offload_adam.train.speeds import gpu_nbytes, known_speeds, measured_speeds

        machine = measured_speeds(training) if measure else known_speeds(training)
        device_nbytes = gpu_nbytes()
    if host_nbytes is None:
        from offload_adam.coordinator.node_memory import available_memory

        host_nbytes, _ = available_memory()
    host, bus = given["--host-bandwidth"], given["--bus-bandwidth"]
    network, tera_flops = given["--network-bandwidth"], given["--tflops"]
    by_resource = {"update": host, "bus": bus, "network": network}
    named = {name: Source.GIVEN for name, value in by_resource.items() if value is not None}
    return replace(
        machine,
        host_nbytes=host_nbytes,
        device_nbytes=device_nbytes,
        host_gb_per_s=machine.host_gb_per_s if host is None else host,
        bus_gb_per_s=machine.bus_gb_per_s if bus is None else bus,
        network=machine.network if network is None else RingSpeed.uniform(network),
        tera_flops=tera_flops,
        sources={**machine.sources, **named},
    )
