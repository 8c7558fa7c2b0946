"""`offload-adam plan`: the bytes and the time of a run, without starting it."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from offload_adam.cli.train import EXIT_BAD_CONFIGURATION, EXIT_DOES_NOT_FIT
from offload_adam.units import parse_nbytes

if TYPE_CHECKING:
    from offload_adam.layout.flat import ParameterSpec
    from offload_adam.layout.timeline import Timeline
    from offload_adam.plan.inputs import Machine, Training

_ITEMSIZES = {"fp32": 4, "bf16": 2, "fp16": 2}


def plan(
    config: Annotated[
        str | None, typer.Argument(metavar="[CONFIG]", help="A YAML file; or give --params.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[--section.key=value]", help="What to change of it."),
    ] = None,
    params: Annotated[
        float | None, typer.Option(help="Parameters, such as 7e9, instead of CONFIG.")
    ] = None,
    param_dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16; with --params.")] = "bf16",
    world_size: Annotated[int, typer.Option(help="Ranks.")] = 1,
    local_world_size: Annotated[
        int | None, typer.Option(help="Ranks of a node; all of them by default.")
    ] = None,
    gpu_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Of one GPU, such as 80GiB.")
    ] = None,
    host_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Of one node; what is free here by default.")
    ] = None,
    offload_fraction: Annotated[
        float | None,
        typer.Option(help="Share of the state on the host; CONFIG's own, or all, by default."),
    ] = None,
    host_bandwidth: Annotated[
        float | None, typer.Option(metavar="GB/S", help="Of a node's memory.")
    ] = None,
    bus_bandwidth: Annotated[
        float | None, typer.Option(metavar="GB/S", help="Of one GPU's copies in one direction.")
    ] = None,
    network_bandwidth: Annotated[
        float | None, typer.Option(metavar="GB/S", help="Of a rank's collectives.")
    ] = None,
    tera_flops: Annotated[
        float | None,
        typer.Option("--tflops", help="1e12 operations a second that a rank computes with."),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Of a rank's step, for --tflops; CONFIG's own by default."),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure this machine's bandwidths for the time.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write everything to this file.")
    ] = None,
    timeline_file: Annotated[
        Path | None,
        typer.Option("--timeline", help="Draw a step to this file: who works when, as text."),
    ] = None,
) -> None:
    """Say what each rank would hold, whether it fits, and how long a step would take.

    Nothing is allocated. With --gpu-memory, or where there is CUDA, parameters live on a GPU. The
    time is that of this machine where `offload-adam doctor` has measured it, or with --measure;
    forward and backward are part of it where --tflops says how fast they are, and then so is what
    the optimizer leaves exposed beside them.

    Exit codes: 0 it fits, 2 a wrong option or configuration, 3 it does not fit, 1 anything else.
    """
    from offload_adam.config import ConfigError

    try:
        _require_folder("--json", json_file)
        _require_folder("--timeline", timeline_file)
        specs, training = _subject(config, overrides or [], params, param_dtype, gpu_memory)
        training = _with_world(training, world_size, local_world_size)
        training = replace(training, num_tokens=tokens or training.num_tokens)
        if offload_fraction is not None:
            training = training.with_offload(offload_fraction=offload_fraction)
        if tera_flops is not None and training.num_tokens is None:
            raise ValueError("--tflops needs --tokens, how many a rank trains on in a step")
        described = gpu_memory is not None or host_memory is not None
        speeds = _speeds(training, described=described, measure=measure)
        given = (host_bandwidth, bus_bandwidth, network_bandwidth)
        machine = _with_given(speeds, given, _positive(tera_flops))
        machine = _with_memory(machine, gpu_memory, host_memory)
    except (ConfigError, ValueError) as error:
        _reject(error)
    timeline = _timeline(specs, training, machine, timeline_file)
    if not _report(specs, training, machine, timeline, json_file):
        raise typer.Exit(EXIT_DOES_NOT_FIT)


def _positive(tera_flops: float | None) -> float | None:
    if tera_flops is not None and not 0 < tera_flops < math.inf:
        raise ValueError("--tflops must be above 0, and finite")
    return tera_flops


def _reject(error: Exception) -> NoReturn:
    typer.echo(f"offload-adam: {error}", err=True)
    raise typer.Exit(EXIT_BAD_CONFIGURATION)


def _subject(
    config: str | None,
    overrides: list[str],
    params: float | None,
    param_dtype: str,
    gpu_memory: str | None,
) -> tuple[list[ParameterSpec], Training]:
    """Return the parameters and how they are trained, from a file or from the options alone."""
    from offload_adam.plan.inputs import Training, synthetic_specs

    if (config is None) == (params is None):
        raise ValueError("give either CONFIG or --params")
    if params is None:
        from offload_adam.cli.train import load_arguments
        from offload_adam.train.plan import subject_of

        return subject_of(
            load_arguments([str(config), *overrides]), on_device=gpu_memory is not None
        )
    if param_dtype not in _ITEMSIZES:
        raise ValueError(f"--param-dtype must be fp32, bf16 or fp16, not {param_dtype!r}")
    if not math.isfinite(params):
        raise ValueError(f"--params must be a finite number, not {params}")
    return synthetic_specs(int(params), _ITEMSIZES[param_dtype]), Training(saves=True)


def _with_world(training: Training, world_size: int, local_world_size: int | None) -> Training:
    local = world_size if local_world_size is None else local_world_size
    return replace(training, world_size=world_size, local_world_size=local)


def _speeds(training: Training, *, described: bool, measure: bool) -> Machine:
    """Return what is known of this machine's speeds; nothing where another is described."""
    if measure and described:
        raise ValueError("--measure is of this machine: leave out --gpu-memory and --host-memory")
    from offload_adam.plan.inputs import Machine

    if described:
        return Machine()
    from offload_adam.train.speeds import known_speeds, measured_speeds

    return measured_speeds(training) if measure else known_speeds(training)


def _with_given(
    machine: Machine,
    given: tuple[float | None, float | None, float | None],
    tera_flops: float | None,
) -> Machine:
    """Return a machine with the speeds that options give in place of what is known of them.

    Args:
        given: GB/s of host memory, bus and network.
    """
    from offload_adam.layout.ring import RingSpeed
    from offload_adam.plan.inputs import Source

    if any(value is not None and not 0 < value < math.inf for value in given):
        raise ValueError("a bandwidth must be above 0 GB/s, and finite")
    host, bus, network = given
    names = ("update", "bus", "network")
    told = {n: Source.GIVEN for n, value in zip(names, given, strict=True) if value is not None}
    return replace(
        machine,
        host_gb_per_s=machine.host_gb_per_s if host is None else host,
        bus_gb_per_s=machine.bus_gb_per_s if bus is None else bus,
        network=machine.network if network is None else RingSpeed.uniform(network),
        tera_flops=tera_flops,
        sources={**machine.sources, **told},
    )


def _with_memory(machine: Machine, gpu_memory: str | None, host_memory: str | None) -> Machine:
    """Return a machine with the memory that options give it, and of the host what is free here."""
    return replace(
        machine,
        host_nbytes=_free_here() if host_memory is None else parse_nbytes(host_memory),
        device_nbytes=None if gpu_memory is None else parse_nbytes(gpu_memory),
    )


def _free_here() -> int:
    from offload_adam.coordinator.node_memory import available_memory  # with torch

    return available_memory()[0]


def _require_folder(option: str, file: Path | None) -> None:
    if file is not None and not file.absolute().parent.is_dir():
        raise ValueError(f"{option} {file}: there is no folder {file.absolute().parent}")


def _timeline(
    specs: list[ParameterSpec], training: Training, machine: Machine, file: Path | None
) -> Timeline | None:
    """Return the timeline of a step, drawn to a file where asked; reject a plan without one."""
    from offload_adam.plan.overlap import predict_overlap

    timeline = predict_overlap(specs, training, machine)
    if file is None:
        return timeline
    if timeline is None:
        _reject(
            ValueError(
                "--timeline needs a step that overlaps (parameters on a GPU, gradients streamed "
                "and averaged by the optimizer) and every speed: --tflops and --tokens, "
                "--host-bandwidth, --bus-bandwidth, and with more ranks --network-bandwidth"
            )
        )
    file.write_text(timeline.draw(), encoding="utf-8")
    return timeline


def _report(
    specs: list[ParameterSpec],
    training: Training,
    machine: Machine,
    timeline: Timeline | None,
    json_file: Path | None,
) -> bool:
    """Print the plan, write it where asked, and tell whether it fits."""
    from rich.console import Console

    from offload_adam.plan.advice import fits, largest_model, options
    from offload_adam.plan.inputs import total_numel
    from offload_adam.plan.prediction import predict
    from offload_adam.plan.tables import plan_tables
    from offload_adam.plan.timing import predict_time

    found = predict(specs, training)
    timing = predict_time(specs, training, machine)
    changes = list(options(specs, training))
    largest = largest_model(max(spec.itemsize for spec in specs), training, machine)
    fit = fits(found, training, machine)
    console = Console()
    for part in plan_tables(found, training, machine, timing, timeline, changes, largest, fit):
        console.print(part)
    if json_file is not None:
        values: dict[str, Any] = {
            "num_parameters": total_numel(specs),
            "training": asdict(training),
            "machine": asdict(machine),
            "bytes_per_rank": asdict(found),
            "bytes_per_node": {
                place: {name: nbytes * training.local_world_size for name, nbytes in held.items()}
                for place, held in (("host", found.host), ("device", found.device))
            },
            "seconds_at_least": None if timing is None else timing.least_s,
            "seconds_at_most": None if timing is None else timing.total_s,
            "seconds_overlapped": None if timeline is None else timeline.end_s,
            "seconds_exposed": None if timeline is None else timeline.exposed_s,
            "seconds": None if timing is None else dict(timing.seconds),
            "bound": None if timing is None else timing.bound,
            "rough": None if timing is None else list(timing.doubts),
            "options": [asdict(option) for option in changes],
            "largest_model": largest,
            "fits": fit,
        }
        json_file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return fit
