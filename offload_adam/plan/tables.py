"""The plan of a run, as JSON and as the tables and sentences that `offload-adam plan` prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from offload_adam.layout.flat import ParameterSpec
from offload_adam.layout.timeline import Timeline
from offload_adam.plan.advice import Need, largest_model, needs, options
from offload_adam.plan.inputs import Machine, Training, total_numel
from offload_adam.plan.prediction import Prediction, predict
from offload_adam.plan.timing import StepTime, predict_time
from offload_adam.units import format_nbytes


def plan_run(
    specs: Sequence[ParameterSpec], training: Training, machine: Machine, timeline: Timeline | None
) -> tuple[dict[str, Any], list[Table | str]]:
    """Return the plan of a run: a JSON object, and what is printed of it, in order."""
    plan = predict(specs, training)
    timing = predict_time(specs, training, machine)
    changes = list(options(specs, training))
    largest = largest_model(max(spec.itemsize for spec in specs), training, machine)
    memories = needs(plan, training, machine)
    fits = all(need.is_met for need in memories)
    values: dict[str, Any] = {
        "num_parameters": total_numel(specs),
        "training": asdict(training),
        "machine": asdict(machine),
        "bytes_per_rank": asdict(plan),
        "bytes_per_node": {
            place: {name: nbytes * training.local_world_size for name, nbytes in held.items()}
            for place, held in (("host", plan.host), ("device", plan.device))
        },
        "seconds_at_least": None if timing is None else timing.least_s,
        "seconds_at_most": None if timing is None else timing.total_s,
        "seconds_overlapped": None if timeline is None else timeline.end_s,
        "seconds_exposed": None if timeline is None else timeline.exposed_s,
        "seconds": None if timing is None else timing.seconds,
        "bound": None if timing is None else timing.bound,
        "rough": None if timing is None else timing.doubts,
        "options": [asdict(option) for option in changes],
        "largest_model": largest,
        "fits": fits,
    }
    parts: list[Table | str] = [_bytes(plan, training, machine), _verdict(memories, training)]
    if largest is not None:
        parts.append(
            f"With these settings, the largest model that fits has {largest:.2e} parameters."
        )
    if timing is None:
        parts.append(
            "The time of a step is not known: give --host-bandwidth, --bus-bandwidth and "
            "--network-bandwidth in GB/s, or run offload-adam doctor on the training machine, "
            "alone and under torchrun."
        )
    else:
        parts.append(_times(timing, timeline, machine))
        parts += [f"rough: {doubt}" for doubt in timing.doubts]
    if changes:
        rows = [(one.setting, _signed(one.host), _signed(one.device)) for one in changes]
        columns = ("setting", "host of a rank", "device of a rank")
        parts.append(_table("Settings that would change the memory", columns, rows))
    return values, parts


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Return a table with all columns but the first aligned to the right."""
    table = Table(*columns, title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    return table


def _bytes(plan: Prediction, training: Training, machine: Machine) -> Table:
    local = training.local_world_size
    nodes = training.world_size // local

    def row(name: str, host: int, device: int) -> list[str]:
        nbytes = (host, host * local, device, device * local)
        return [name, *(format_nbytes(n) if n else "" for n in nbytes)]

    names = dict.fromkeys([*plan.host, *plan.device])
    table = _table(
        f"{training.world_size} rank(s) on {nodes} node(s), {plan.num_buckets} bucket(s)",
        ("", "host: rank", "host: node", "device: rank", "devices: node"),
        [row(name, plan.host.get(name, 0), plan.device.get(name, 0)) for name in names],
    )
    table.add_section()
    table.add_row(*row("total", plan.host_nbytes, plan.device_nbytes))
    available = machine.host_nbytes, machine.device_nbytes
    known = ["?" if nbytes is None else format_nbytes(nbytes) for nbytes in available]
    table.add_row("available", "", known[0], known[1] if training.on_device else "")
    return table


def _verdict(memories: Sequence[Need], training: Training) -> str:
    """Return whether the run fits, with the numbers if it does not."""
    exceeded = [
        f"it needs {format_nbytes(need.needed_nbytes)} of {need.memory}, and "
        f"{format_nbytes(need.available_nbytes)} are available"
        for need in memories
        if need.available_nbytes is not None and not need.is_met
    ]
    if exceeded:
        return f"It does not fit: {'; '.join(exceeded)}."
    unknown = [need.memory for need in memories if need.available_nbytes is None]
    if unknown:
        named = " and ".join(unknown)
        return f"It fits as far as is known, but the available {named} is not known."
    own = " and the memory that CUDA itself uses" if training.on_device else ""
    return f"It fits, without counting activations{own}."


def _times(timing: StepTime, timeline: Timeline | None, machine: Machine) -> Table:
    has_model = "compute" in timing.seconds
    title = "A step" if has_model else "A step, without forward and backward"
    table = Table("", "seconds", "speed", title=title)
    table.columns[1].justify = "right"
    for name, seconds in timing.seconds.items():
        marked = f"{name} (slowest)" if name == timing.bound else name
        speed = f"{_speed(name, machine)}, {machine.source_of(name)}"
        table.add_row(marked, f"{seconds:.4g}", speed)
    table.add_section()
    table.add_row("at least, with perfect overlap", f"{timing.least_s:.4g}")
    if timeline is not None:
        table.add_row("overlapped as scheduled", f"{timeline.end_s:.4g}")
        table.add_row("exposed part of the optimizer", f"{timeline.exposed_s:.4g}")
    table.add_row("without overlap", f"{timing.total_s:.4g}")
    return table


def _speed(resource: str, machine: Machine) -> str:
    """Return the speed of a resource."""
    network = machine.network
    if resource == "compute":
        return f"{machine.tera_flops:g} TFLOPS"
    if resource != "network" or network is None:
        speed = machine.host_gb_per_s if resource == "update" else machine.bus_gb_per_s
        return f"{speed:.4g} GB/s"
    mean, wide, gather = network.mean_16bit, network.mean_32bit, network.gather
    if mean == wide == gather:
        return f"{gather:.3g} GB/s"
    return f"{mean:.3g} (bf16) and {wide:.3g} (fp32) GB/s averaged, {gather:.3g} gathered"


def _signed(nbytes: int) -> str:
    sign = "+" if nbytes > 0 else "-"
    return sign + format_nbytes(abs(nbytes)) if nbytes else ""
