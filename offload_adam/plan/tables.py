"""The plan of a run, as JSON and as the tables and sentences that `offload-adam plan` prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from offload_adam.layout.budget import Category
from offload_adam.layout.flat import ParameterSpec
from offload_adam.layout.timeline import Timeline
from offload_adam.options import CODED_FORMATS
from offload_adam.plan.advice import Need, largest_model, needs, options
from offload_adam.plan.inputs import Machine, Training, total_numel
from offload_adam.plan.prediction import Prediction, predict
from offload_adam.plan.timing import StepTime, predict_time
from offload_adam.units import format_nbytes

_LABELS = {
    Category.GRADIENTS: "gradients (.grad)",
    Category.SLOTS: "slots (packed gradients)",
    Category.STAGING: "staging (copy buffers)",
    Category.BLOCK_SUMS: "block_sums (of norm)",
    "exponents": "exponents (of 8-bit codes)",
    "compute": "compute: forward and backward",
    "update": "update: norm and update on host",
    "bus": "bus: copies between host and GPU",
    "network": "network: collectives",
}
"""Rows that need an explanation. JSON contains the keys."""

_NOISE = (
    "At learning rates below 1e-5, prefer state_format 'bf16': {!r} rounds master weights to 24 "
    "bits. At 1e-6, the noise of this rounding is about 11% of the distance that weights move."
)


def plan_run(
    specs: Sequence[ParameterSpec], training: Training, machine: Machine, timeline: Timeline | None
) -> tuple[dict[str, Any], list[Table | str]]:
    """Return the plan of a run as a JSON object, and as the tables and sentences to print."""
    plan = predict(specs, training)
    timing = predict_time(specs, training, machine)
    changes = list(options(specs, training))
    largest = None  # of sharded parameters, only the parts of one rank are known here
    if not training.sharded:
        widest = max(specs, key=lambda spec: spec.itemsize)
        largest = largest_model(widest.itemsize, training, machine, is_bfloat16=widest.is_bfloat16)
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
    parts: list[Table | str] = [_memory(plan, training, machine), _verdict(memories, training)]
    if largest is not None:
        parts.append(
            f"With these settings, the largest model that fits has {largest:.2e} parameters."
        )
    is_split = any(spec.follows_state_format and spec.is_bfloat16 for spec in specs)
    if training.state_format in CODED_FORMATS and is_split:
        parts.append(_NOISE.format(training.state_format))
    if timing is None:
        parts.append(
            "The time of a step is not known: give --host-bandwidth, --bus-bandwidth and "
            "--network-bandwidth in GB/s. Or run offload-adam doctor on the training machine, "
            "alone and under torchrun."
        )
    else:
        parts.append(_times(timing, timeline, machine))
        if timing.doubts:
            parts.append("These times are rough:")
        parts += [f"- {doubt}" for doubt in timing.doubts]
    if changes:
        rows = [(one.setting, _signed(one.host), _signed(one.device)) for one in changes]
        columns = ("setting", "host, per rank", "GPU, per rank")
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


def _memory(plan: Prediction, training: Training, machine: Machine) -> Table:
    """Return the bytes of each category, their sum, and the available memory."""
    local = training.local_world_size
    num_nodes = training.world_size // local

    def row(label: str, host: int, device: int) -> list[str]:
        nbytes = (host, host * local, device, device * local)
        return [label, *(format_nbytes(n) if n else "" for n in nbytes)]

    table = _table(
        f"Memory of {training.world_size} rank(s) on {num_nodes} node(s), with "
        f"{plan.num_buckets} bucket(s)",
        ("", "host,\nper rank", "host,\nper node", "GPU,\nper rank", "GPUs,\nper node"),
        [
            row(_LABELS.get(name, name), plan.host.get(name, 0), plan.device.get(name, 0))
            for name in dict.fromkeys([*plan.host, *plan.device])
        ],
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
    # The command always knows the host's memory, so only the GPU's can be unknown.
    if any(need.available_nbytes is None for need in memories):
        return "It fits as far as is known, but the memory per GPU is not known: give --gpu-memory."
    own = " and the memory that CUDA itself uses" if training.on_device else ""
    return f"It fits, without counting activations{own}."


def _times(timing: StepTime, timeline: Timeline | None, machine: Machine) -> Table:
    """Return the seconds and the speed of each resource, and the seconds of a step."""
    title = "Predicted time of a step"
    if "compute" not in timing.seconds:
        title += ", without forward and backward"
    table = Table("", "seconds", "speed", title=title)
    table.columns[1].justify = "right"
    for name, seconds in timing.seconds.items():
        speed = f"{_speed(name, machine)}, {machine.source_of(name)}"
        table.add_row(_LABELS[name], f"{seconds:.4g}", speed)
    if len(timing.seconds) == 1:
        return table  # the rows below would repeat its time
    table.add_section()
    least = f"{timing.least_s:.4g}", f"the time of {timing.bound}"
    table.add_row("at least, with perfect overlap", *least)
    if timeline is not None:
        table.add_row("overlapped as scheduled", f"{timeline.end_s:.4g}")
        table.add_row("  exposed, on top of compute", f"{timeline.exposed_s:.4g}")
    table.add_row("at most, without overlap", f"{timing.total_s:.4g}")
    return table


def _speed(resource: str, machine: Machine) -> str:
    """Return the known speed of a resource."""
    match resource:
        case "compute":
            return f"{machine.tera_flops:g} TFLOPS"
        case "update":
            return f"{machine.host_gb_per_s:.4g} GB/s"
        case "bus":
            return f"{machine.bus_gb_per_s:.4g} GB/s"
    network = machine.network
    assert network is not None
    mean16, mean32, gather = network.mean_16bit, network.mean_32bit, network.gather
    if mean16 == mean32 == gather:
        return f"{gather:.3g} GB/s"
    return f"averaging {mean16:.3g} (bf16) or {mean32:.3g} (fp32), gathering {gather:.3g} GB/s"


def _signed(nbytes: int) -> str:
    sign = "+" if nbytes > 0 else "-"
    return sign + format_nbytes(abs(nbytes)) if nbytes else ""
