"""The tables and sentences that `offload-adam plan` prints."""

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
    yield _fits(fit, training, machine)
    if largest is not None:
        yield f"With these settings, the largest model that fits has {largest:.2e} parameters."
    if timing is None:
        yield (
            "The time of a step is not known: give --host-bandwidth, --bus-bandwidth and "
            "--network-bandwidth in GB/s, or run offload-adam doctor on the training machine, "
            "alone and under torchrun."
        )
    else:
        yield _times(timing, timeline, machine)
        yield from (f"rough: {doubt}" for doubt in timing.doubts)
    if changes:
        rows = [(one.setting, _signed(one.host), _signed(one.device)) for one in changes]
        columns = ("setting", "host of a rank", "device of a rank")
        yield _table("Settings that would change the memory", columns, rows)


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


def _fits(fit: bool, training: Training, machine: Machine) -> str:
    """Return whether it fits, and which memory was not compared."""
    if not fit:
        return "It does not fit."
    unknown = ["host"] if machine.host_nbytes is None else []
    if training.on_device and machine.device_nbytes is None:
        unknown.append("GPU")
    if unknown:
        named = " and the ".join(unknown)
        return f"It fits as far as is known, but the memory of the {named} is not known."
    own = " and the memory that CUDA itself uses" if training.on_device else ""
    return f"It fits, without counting activations{own}."


def _times(timing: StepTime, timeline: Timeline | None, machine: Machine) -> Table:
    has_model = "compute" in timing.seconds
    title = "A step" if has_model else "A step, without forward and backward"
    table = Table("", "seconds", "speed", title=title)
    table.columns[1].justify = "right"
    for name, seconds in timing.seconds.items():
        marked = f"{name} (slowest)" if name == timing.bound else name
        table.add_row(marked, f"{seconds:.4g}", _speed(name, machine))
    table.add_section()
    table.add_row("at least, with perfect overlap", f"{timing.least_s:.4g}")
    if timeline is not None:
        table.add_row("overlapped as scheduled", f"{timeline.end_s:.4g}")
        table.add_row("exposed part of the optimizer", f"{timeline.exposed_s:.4g}")
    table.add_row("without overlap", f"{timing.total_s:.4g}")
    return table


def _speed(resource: str, machine: Machine) -> str:
    """Return the speed of a resource, and where it comes from."""
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


def _signed(nbytes: int) -> str:
    if nbytes == 0:
        return ""
    return ("+" if nbytes > 0 else "-") + format_nbytes(abs(nbytes))
