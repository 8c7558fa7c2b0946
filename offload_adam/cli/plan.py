"""`offload-adam plan`: the memory and the time of a run, without starting it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from offload_adam.cli.output import (
    EXIT_BAD_CONFIGURATION,
    fail,
    require_folder_of,
    write_text,
)
from offload_adam.cli.train import EXIT_DOES_NOT_FIT, OverridesArgument, load_arguments
from offload_adam.printable import show

if TYPE_CHECKING:
    from offload_adam.layout.flat import ParameterSpec
    from offload_adam.options import StateFormat
    from offload_adam.plan.inputs import Machine, Training

# GB/s or TFLOPS: far beyond all hardware, so that no predicted time overflows.
_LEAST_SPEED, _MOST_SPEED = 1e-6, 10**9
_ITEMSIZES = {"fp32": 4, "bf16": 2, "fp16": 2}


def plan(
    config: Annotated[
        str | None, typer.Argument(metavar="CONFIG", help="A YAML file. Or give --params.")
    ] = None,
    overrides: OverridesArgument = None,
    params: Annotated[
        float | None, typer.Option(help="Number of parameters, such as 7e9, instead of CONFIG.")
    ] = None,
    param_dtype: Annotated[
        str, typer.Option(help="With --params, their dtype: fp32, bf16 or fp16.")
    ] = "bf16",
    world_size: Annotated[int, typer.Option(help="Number of ranks.")] = 1,
    local_world_size: Annotated[
        int | None, typer.Option(help="Number of ranks on a node. By default all ranks.")
    ] = None,
    gpu_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory of one GPU, such as 80GiB.")
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
    offload_fraction: Annotated[
        float | None,
        typer.Option(help="Share of the state on the host. By default as in CONFIG, or all."),
    ] = None,
    host_bandwidth: Annotated[
        float | None, typer.Option(metavar="GB/s", help="Bandwidth of a node's memory in a step.")
    ] = None,
    bus_bandwidth: Annotated[
        float | None,
        typer.Option(metavar="GB/s", help="Bandwidth of one GPU's copies in one direction."),
    ] = None,
    network_bandwidth: Annotated[
        float | None,
        typer.Option(metavar="GB/s", help="Bandwidth at which a rank sends in collectives."),
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
    """Predict the memory of each rank, whether it fits, and the time of a step.

    Nothing is allocated. The parameters of CONFIG are on a GPU with --gpu-memory or if this machine
    has a GPU, those of --params always.

    The time is predicted from bandwidths: `offload-adam doctor` has saved those of this machine,
    --measure measures them now, and options override both. With --tflops, the time includes forward
    and backward, and the plan shows how much of the optimizer's time they do not hide.

    Exit codes: 0 it fits, 2 wrong option or configuration, 3 it does not fit, 1 any other error.
    """
    from rich.console import Console

    from offload_adam.config import ConfigError
    from offload_adam.config.declared import MAX_NBYTES
    from offload_adam.options import MAX_STEP_COUNT, STATE_FORMAT
    from offload_adam.plan.advice import most_exact_fit
    from offload_adam.plan.inputs import MOST_NUMEL
    from offload_adam.plan.tables import plan_run
    from offload_adam.plan.timing import predict_overlap

    speeds = {
        "--host-bandwidth": host_bandwidth,
        "--bus-bandwidth": bus_bandwidth,
        "--network-bandwidth": network_bandwidth,
        "--tflops": tera_flops,
    }
    require_folder_of(json_file, "--json")
    require_folder_of(timeline_file, "--timeline")
    try:
        for option, value, least, most in (
            ("--params", params, 1, MOST_NUMEL),
            ("--world-size", world_size, 1, MAX_STEP_COUNT),
            ("--local-world-size", local_world_size, 1, MAX_STEP_COUNT),
            ("--tokens", tokens, 1, MAX_NBYTES),
            *((option, speed, _LEAST_SPEED, _MOST_SPEED) for option, speed in speeds.items()),
        ):
            if value is not None and not least <= value <= most:  # also if it is NaN
                raise ValueError(
                    f"{option} must be at least {least:,} and at most {most:,}, not {show(value)}"
                )
        specs, training = _subject(
            config, overrides or [], params, param_dtype, gpu_memory, world_size
        )
        training = replace(
            training,
            world_size=world_size,
            local_world_size=world_size if local_world_size is None else local_world_size,
            num_tokens=tokens or training.num_tokens,
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
        if fit:
            memory = _machine(training, speeds, gpu_memory, host_memory, measure=False)
            training = most_exact_fit(specs, training, memory)
        machine = _machine(training, speeds, gpu_memory, host_memory, measure=measure)
        timeline = predict_overlap(specs, training, machine)
        if timeline_file is not None and timeline is None:
            raise ValueError(
                "--timeline needs an overlapped step: parameters on a GPU, and gradients that the "
                "optimizer streams and averages. It also needs all speeds: --tflops with --tokens, "
                "--host-bandwidth, --bus-bandwidth, and for several ranks --network-bandwidth"
            )
    except (ConfigError, ValueError) as error:
        fail(error, EXIT_BAD_CONFIGURATION)
    if timeline_file is not None and timeline is not None:
        write_text(timeline_file, timeline.draw(), "--timeline")
    values, parts = plan_run(specs, training, machine, timeline)
    console = Console()
    if fit:
        chosen = f"Planning with state_format {training.state_format!r}"
        fits = f"{chosen}, the most exact format that fits."
        console.print(fits if values["fits"] else f"No state format fits. {chosen}, the smallest.")
    for part in parts:
        console.print(part)
    if json_file is not None:
        write_text(json_file, json.dumps(values, indent=2) + "\n", "--json")
    if not values["fits"]:
        raise typer.Exit(EXIT_DOES_NOT_FIT)


def _subject(
    config: str | None,
    overrides: list[str],
    params: float | None,
    param_dtype: str,
    gpu_memory: str | None,
    world_size: int,
) -> tuple[list[ParameterSpec], Training]:
    """Return the parameters and how they are trained, from CONFIG or from --params."""
    from offload_adam.plan.inputs import Training, synthetic_specs

    if (config is None) == (params is None):
        raise ValueError("give either CONFIG or --params")
    if params is None:
        from offload_adam.train.plan import planner_inputs_of

        return planner_inputs_of(
            load_arguments([str(config), *overrides]),
            on_device=gpu_memory is not None,
            world_size=world_size,
        )
    if param_dtype not in _ITEMSIZES:
        raise ValueError(f"--param-dtype must be fp32, bf16 or fp16, not {show(param_dtype)}")
    itemsize, is_bfloat16 = _ITEMSIZES[param_dtype], param_dtype == "bf16"
    specs = synthetic_specs(int(params), itemsize, is_bfloat16=is_bfloat16)
    return specs, Training(saves=True)


def _machine(
    training: Training,
    given: Mapping[str, float | None],
    gpu_memory: str | None,
    host_memory: str | None,
    *,
    measure: bool,
) -> Machine:
    """Return the machine: another one if its memory is given, otherwise this one.

    Speeds that are given replace known ones.

    Args:
        given: speeds by option, None where the option is absent.

    Raises:
        ValueError: a size is impossible.
    """
    from offload_adam.layout.ring import RingSpeed
    from offload_adam.plan.inputs import Machine, Source

    is_other = gpu_memory is not None or host_memory is not None
    if measure and is_other:
        raise ValueError(
            "--measure measures this machine: leave out --gpu-memory and --host-memory, which "
            "describe another"
        )
    # What imports torch is imported only where it is needed: it takes a second.
    machine = Machine()
    if not is_other:
        from offload_adam.train.speeds import known_speeds, measured_speeds

        machine = measured_speeds(training) if measure else known_speeds(training)
    if host_memory is None:
        from offload_adam.coordinator.node_memory import available_memory

        host_nbytes, _ = available_memory()
    else:
        host_nbytes = parse_nbytes(host_memory)
    host, bus = given["--host-bandwidth"], given["--bus-bandwidth"]
    network, tera_flops = given["--network-bandwidth"], given["--tflops"]
    by_resource = {"update": host, "bus": bus, "network": network}
    named = {name: Source.GIVEN for name, value in by_resource.items() if value is not None}
    return replace(
        machine,
        host_nbytes=host_nbytes,
        device_nbytes=None if gpu_memory is None else parse_nbytes(gpu_memory),
        host_gb_per_s=machine.host_gb_per_s if host is None else host,
        bus_gb_per_s=machine.bus_gb_per_s if bus is None else bus,
        network=machine.network if network is None else RingSpeed.uniform(network),
        tera_flops=tera_flops,
        sources={**machine.sources, **named},
    )


def parse_nbytes(text: str) -> int:
    """Return the bytes of a size such as '80GiB', '512 GB' or '1e9'.

    Raises:
        ValueError: the text is not a number of at least 0 with a unit that pydantic knows, or none;
            or it has more than 63 bits.
    """
    from pydantic import ByteSize, TypeAdapter

    from offload_adam.config.declared import MAX_NBYTES

    try:
        try:
            nbytes = float(text)
        except ValueError:
            nbytes = float(TypeAdapter(ByteSize).validate_python(text))
        if not 0 <= nbytes <= MAX_NBYTES:
            raise ValueError
    except ValueError:
        raise ValueError(
            f"{show(text)} is not a size below 2**63 bytes: give a number and a unit, such as "
            "80GiB or 512GB"
        ) from None
    return int(nbytes)
