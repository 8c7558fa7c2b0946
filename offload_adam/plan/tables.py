"""A plan as tables for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.table import Table

from offload_adam.layout.timeline import Timeline
from offload_adam.plan.advice import Option
from offload_adam.plan.inputs import Machine, Training
from offload_adam.plan.prediction import Prediction
from offload_adam.plan.timing import StepTime
from offload_adam.units import format_nbytes


def plan_tables(
    plan: Prediction,
    training: Training,
    machine: Machine,
    timing: StepTime | None,
    timeline: Timeline | None,
    changes: Sequence[Option],
    largest: int | None,
    fit: bool,
) -> Iterator[Table | str]:
    """Yield what is printed, in order."""
    yield _bytes(plan, training, machine)
    yield _fits(fit, machine)
    if largest is not None:
        yield f"The largest model that fits like this has {largest:.2e} parameters."
    if timing is not None:
        yield _times(timing, timeline, machine)
        for doubt in timing.doubts:
            yield f"rough: {doubt}"
    else:
        yield (
            "The time of a step is not known: give --host-bandwidth, --bus-bandwidth and "
            "--network-bandwidth in GB/s, or run offload-adam doctor where it is to train, alone "
            "and under torchrun."
        )
    if changes:
        yield _changes(changes)


def _bytes(plan: Prediction, training: Training, machine: Machine) -> Table:
    nodes = training.world_size // training.local_world_size
    title = f"{training.world_size} rank(s) on {nodes} node(s), {plan.num_buckets} bucket(s)"
    places = ("host: rank", "host: node", "device: rank", "devices: node")
    table = Table("", *places, title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    local = training.local_world_size
    for name in dict.fromkeys([*plan.host, *plan.device]):
        host, device = plan.host.get(name, 0), plan.device.get(name, 0)
        table.add_row(name, *map(_shown, (host, host * local, device, device * local)))
    table.add_section()
    table.add_row(
        "together",
        _shown(plan.host_nbytes),
        _shown(plan.host_nbytes * local),
        _shown(plan.device_nbytes),
        _shown(plan.device_nbytes * local),
    )
    available = machine.host_nbytes, machine.device_nbytes
    known = ["?" if nbytes is None else format_nbytes(nbytes) for nbytes in available]
    table.add_row("there is", "", *known)
    return table


def _fits(fit: bool, machine: Machine) -> str:
    """Say whether it fits, and what was not asked."""
    if not fit:
        return "It does not fit."
    unknown = [
        name
        for name, nbytes in (("host", machine.host_nbytes), ("GPU", machine.device_nbytes))
        if nbytes is None
    ]
    if unknown:
        return f"It fits, as far as is known: the memory of the {' and the '.join(unknown)} is not."
    return "It fits, before activations and what CUDA takes for itself."


def _times(timing: StepTime, timeline: Timeline | None, machine: Machine) -> Table:
    whole = "compute" in timing.seconds
    title = "A step" if whole else "A step, beside forward and backward"
    table = Table("", "seconds", "with", title=title)
    table.columns[1].justify = "right"
    for name, seconds in timing.seconds.items():
        marked = f"{name} (bounds it)" if name == timing.bound else name
        table.add_row(marked, f"{seconds:.4g}", _speed(name, machine))
    table.add_section()
    table.add_row("all at once, at least", f"{timing.least_s:.4g}")
    if timeline is not None:
        table.add_row("overlapped as scheduled", f"{timeline.end_s:.4g}")
        table.add_row("of which the optimizer is exposed", f"{timeline.exposed_s:.4g}")
    table.add_row("one after the other", f"{timing.total_s:.4g}")
    return table


def _speed(resource: str, machine: Machine) -> str:
    """Return how fast a resource is, and where that is known from."""
    match resource:
        case "compute":
            speed = f"{machine.tera_flops:g} TFLOPS"
        case "update":
            speed = f"{machine.host_gb_per_s:.4g} GB/s"
        case "bus":
            speed = f"{machine.bus_gb_per_s:.4g} GB/s"
        case _:
            assert machine.network is not None
            mean, gather = machine.network.mean_16bit, machine.network.gather
            wide = machine.network.mean_32bit
            speed = (
                f"{gather:.3g} GB/s"
                if mean == wide == gather
                else f"{mean:.3g} (bf16) and {wide:.3g} (fp32) GB/s averaged, {gather:.3g} gathered"
            )
    return f"{speed}, {machine.source_of(resource)}"


def _changes(changes: Sequence[Option]) -> Table:
    table = Table("setting", "host of a rank", "device of a rank", title="What would change it")
    for column in table.columns[1:]:
        column.justify = "right"
    for option in changes:
        table.add_row(option.setting, _signed(option.host), _signed(option.device))
    return table


def _shown(nbytes: int) -> str:
    return format_nbytes(nbytes) if nbytes else ""


def _signed(nbytes: int) -> str:
    if nbytes == 0:
        return ""
    return ("+" if nbytes > 0 else "-") + format_nbytes(abs(nbytes))
