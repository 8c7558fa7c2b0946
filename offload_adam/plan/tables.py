"""The plan of a run, as JSON and as the tables and sentences that `offload-adam plan` prints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from offload_adam.layout.budget import Category
from offload_adam.layout.timeline import Timeline
from offload_adam.options import CODED_FORMATS
from offload_adam.plan.advice import (
    DEVICE,
    HOST,
    Advice,
    Need,
    advise,
    lacking,
    largest_model,
    needs,
)
from offload_adam.plan.alternatives import Alternative, compare
from offload_adam.plan.inputs import Machine, Training, total_numel
from offload_adam.plan.prediction import Prediction
from offload_adam.plan.setup import Setup
from offload_adam.plan.shape import ModelShape
from offload_adam.plan.timing import StepTime, predict_time
from offload_adam.units import format_count, format_nbytes, format_seconds

_LABELS = {
    Category.GRADIENTS: "gradients (.grad)",
    Category.SLOTS: "slots (packed gradients)",
    Category.STAGING: "staging (copy buffers)",
    Category.BLOCK_SUMS: "block_sums (of norm)",
    "exponents": "exponents (of 8-bit codes)",
    Category.ACTIVATIONS: "activations (estimate)",
    Category.CONTEXT: "CUDA context (estimate)",
    Category.GATHERED: "gathered by FSDP2 (estimate)",
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

_TIGHT = 0.92
"""Share of a memory from which a plan warns that it is tight."""
_TIGHT_REASONS = {
    DEVICE: "activations are an estimate, and torch's allocator leaves gaps",
    HOST: "other processes and the page cache need some of it",
}


def plan_run(
    setup: Setup,
    machine: Machine,
    timeline: Timeline | None,
    *,
    subject: str = "",
) -> tuple[dict[str, Any], list[Table | str]]:
    """Return the plan of a run as a JSON object, and as the tables and sentences to print.

    The answer comes first: whether it fits, and if not, what would make it fit.

    Args:
        subject: the name of the model.
    """
    specs, training = setup.resolve()
    plan = setup.predict()
    timing = predict_time(specs, training, machine)
    memories = needs(plan, training, machine)
    fits = all(need.is_met for need in memories)
    advice = advise(setup, machine)
    others = compare(setup, machine)
    # Of sharded parameters, only the parts of one rank are known here. A larger model would have
    # other layers and other frozen parameters than a model that is known.
    largest, shape = None, training.shape
    if not (training.sharded or training.frozen_nbytes) and (shape is None or shape.is_typical):
        widest = max(specs, key=lambda spec: spec.itemsize)
        largest = largest_model(widest.itemsize, training, machine, is_bfloat16=widest.is_bfloat16)
    values: dict[str, Any] = {
        "model": subject or None,
        "num_parameters": total_numel(setup.specs),
        "training": asdict(training),
        "machine": asdict(machine),
        "fits": fits,
        "needs": [{**need._asdict(), "missing_nbytes": need.missing_nbytes} for need in memories],
        "advice": [asdict(one) for one in advice],
        "alternatives": [asdict(one) for one in others],
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
        "largest_model": largest,
    }
    parts: list[Table | str] = [_headline(setup, subject), *_verdict(memories, training)]
    if fits and others and others[0].fits:
        name = "AdamW with FSDP2" if training.world_size > 1 else "AdamW"
        parts.append(f"torch's own {name} fits on the GPU, too, where it is faster.")
    if advice:
        parts.append(_advice(advice, training))
    elif not fits:
        parts.append(_no_advice(setup, machine))
    if largest:
        parts.append(
            f"With these settings, the largest model that fits has {format_count(largest)} "
            "parameters."
        )
    is_split = any(spec.follows_state_format and spec.is_bfloat16 for spec in specs)
    if training.state_format in CODED_FORMATS and is_split:
        parts.append(_NOISE.format(training.state_format))
    parts.append(_memory(plan, training, machine))
    if shape is not None and shape.saved_numel:
        parts.append(_activations(training, shape))
    if others:
        parts.append(_others(others))
    if timing is None:
        parts.append(_no_times(training))
    else:
        parts.append(_times(timing, timeline, machine))
        if timing.doubts:
            parts.append("These times are rough:")
        parts += [f"- {doubt}" for doubt in timing.doubts]
    return values, parts


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Return a table with all columns but the first aligned to the right."""
    table = Table(*columns, title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    return table


def _headline(setup: Setup, subject: str) -> str:
    """Return what is planned, in one sentence."""
    training = setup.training
    dtypes = {
        ("bf16" if spec.is_bfloat16 else "fp16") if spec.itemsize == 2 else "fp32"
        for spec in setup.specs
    }
    dtype = " and ".join(sorted(dtypes))
    numel = total_numel(setup.specs)
    words = f"{format_count(numel)} parameter{'s' * (numel != 1)}"
    if training.frozen_nbytes:
        frozen = training.frozen_nbytes // max(spec.itemsize for spec in setup.specs)
        words = f"{format_count(numel)} trained of {format_count(numel + frozen)} parameters"
    if training.sharded:
        words += " on each rank,"
    if subject:
        words = f"{subject}: {words}"
    num_ranks = training.world_size
    num_nodes = num_ranks // training.local_world_size
    ranks = f"{num_ranks} rank{'s' * (num_ranks > 1)} on {num_nodes} node{'s' * (num_nodes > 1)}"
    sharded = ""
    if setup.fsdp2 is not None:
        sharded = ", sharded by FSDP2"
        sharded += " into host memory" if setup.fsdp2.offload_weights else ""
    state = f"state in {training.state_format}"
    return f"{words} in {dtype}{sharded}, {state}, {ranks}."


def _verdict(memories: Sequence[Need], training: Training) -> Iterator[str]:
    """Yield whether the run fits, by how much, and what is not known."""
    exceeded = [need for need in memories if not need.is_met]
    unknown = [need for need in memories if need.available_nbytes is None]
    if exceeded:
        missing = "; ".join(
            f"the {need.memory} is {format_nbytes(need.missing_nbytes)} too small: "
            f"{_share(need, ' are needed of ')}"
            for need in exceeded
        )
        yield f"It does not fit: {missing}."
    elif unknown:
        # The command always knows the host's memory, so only the GPU's can be unknown.
        yield (
            "It fits as far as is known, but the memory of a GPU is not known: give --gpu or "
            f"--gpu-memory. {format_nbytes(unknown[0].needed_nbytes)} are needed."
        )
    else:
        known = "; ".join(f"{need.memory}: {_share(need)}" for need in memories)
        counts = training.activation_nbytes > 0
        uncounted = "" if counts else ", without counting activations"
        yield f"It fits{uncounted}. {known[0].upper()}{known[1:]}."
    for need in memories:
        if exceeded or need.available_nbytes is None or training.shape is None:
            continue
        if need.needed_nbytes > _TIGHT * need.available_nbytes:
            yield f"This is tight: {_TIGHT_REASONS[need.memory]}."


def _no_advice(setup: Setup, machine: Machine) -> str:
    """Return what remains to be done if no change of settings makes a run fit."""
    if setup.training.sharded:
        return "More ranks would divide it further: try a larger --world-size."
    remaining = []
    short = lacking(setup, machine)
    if DEVICE in short:
        remaining.append(
            "divide its layers by tensor parallelism, shorten its sequences, or take larger GPUs"
        )
    if HOST in short:
        remaining.append("take nodes with more memory")
    return f"No change of these settings makes it fit: {'; '.join(remaining)}."


def _share(need: Need, of: str = " of ") -> str:
    return f"{format_nbytes(need.needed_nbytes)}{of}{format_nbytes(need.available_nbytes or 0)}"


def _advice(advice: Sequence[Advice], training: Training) -> Table:
    """Return what makes the run fit, with the bytes that it then needs."""
    together = len(advice[0].changes) > 1  # only the first one may be a list of changes
    if together and len(advice) > 1:
        title = "Each of these makes it fit, the first ones together"
    else:
        title = "These changes together make it fit" if together else "Each of these makes it fit"
    table = _table(title, ("change", "what it costs", "GPU", "host of a node"), [])
    table.columns[1].justify = "left"
    for one in advice:
        device = format_nbytes(one.device_nbytes) if one.device_nbytes else ""
        needs = [""] * (len(one.changes) - 1) + ["now"]
        for change, cost, last in zip(one.changes, one.costs, needs, strict=True):
            nbytes = (device, format_nbytes(one.host_nbytes_of_node)) if last else ("", "")
            table.add_row(change, cost, *nbytes)
        if one is advice[0] and together:
            table.add_section()
    if not training.uses_device:
        table.columns.pop(2)
    return table


def _memory(plan: Prediction, training: Training, machine: Machine) -> Table:
    """Return the bytes of each category, their sum, and the available memory."""
    local = training.local_world_size
    columns = {
        "GPU": (plan.device, 1),
        "host": (plan.host, 1),
        "host of a node": (plan.host, local),
    }
    if local == 1:
        del columns["host of a node"]
    else:
        columns["host of a rank"] = columns.pop("host")
        columns["host of a node"] = columns.pop("host of a node")
    if not training.uses_device:
        del columns["GPU"]
    totals = {
        "GPU": (plan.device_nbytes, machine.device_nbytes),
        "host": (plan.host_nbytes, machine.host_nbytes),
        "host of a rank": (plan.host_nbytes, None),
        "host of a node": (plan.host_nbytes * local, machine.host_nbytes),
    }

    def cells(values: Iterable[int | None]) -> list[str]:
        return [format_nbytes(n) if n else "" for n in values]

    names = dict.fromkeys([*plan.device, *plan.host])
    table = _table(
        f"Memory, in {plan.num_buckets} bucket{'s' * (plan.num_buckets != 1)}",
        ("", *columns),
        [
            [_LABELS.get(name, name), *cells(held.get(name, 0) * n for held, n in columns.values())]
            for name in names
        ],
    )
    table.add_section()
    table.add_row("total", *cells(totals[column][0] for column in columns))
    available = cells(totals[column][1] for column in columns)
    for number, column in enumerate(columns):
        if not available[number] and column != "host of a rank":
            available[number] = "?" if totals[column][1] is None else "0 B"
    table.add_row("usable", *available)
    return table


def _activations(training: Training, shape: ModelShape) -> str:
    """Return how the activations were estimated."""
    checkpointing = training.checkpointing
    how = " with activation checkpointing" if checkpointing else ""
    typical = ""
    if shape.is_typical:
        typical = (
            f", for a typical transformer of {shape.num_layers} layers of width {shape.width:,}"
        )
    return (
        f"Activations are an estimate{typical}: {training.batch_size} x "
        f"{training.sequence_length:,} tokens x ({shape.formula(checkpointing=checkpointing)})"
        f"{how}. --batch-size, --sequence-length and --checkpointing change it."
    )


def _others(others: Sequence[Alternative]) -> Table:
    """Return what other optimizers need beside this one."""
    words = {True: "yes", False: "no", None: "?"}
    rows = [
        (
            one.name,
            one.weights,
            one.moments,
            format_nbytes(one.device_nbytes),
            format_nbytes(one.host_nbytes_of_node) if one.host_nbytes_of_node else "",
            words[one.fits],
        )
        for one in others
    ]
    columns = ("optimizer", "weights", "moments", "GPU", "host of a node", "fits")
    table = _table("The same model with other optimizers", columns, rows)
    for column in table.columns[1:3]:
        column.justify = "left"
    return table


def _no_times(training: Training) -> str:
    needed = ["--host-bandwidth"]
    if training.on_device:
        needed.append("--bus-bandwidth")
    if training.world_size > 1:
        needed.append("--network-bandwidth")
    options = " and ".join([", ".join(needed[:-1])] * (len(needed) > 1) + needed[-1:])
    return (
        f"The time of a step is not known: give {options}, such as 100GB/s. Or run offload-adam "
        "doctor on the training machine."
    )


def _times(timing: StepTime, timeline: Timeline | None, machine: Machine) -> Table:
    """Return the seconds and the speed of each resource, and the seconds of a step."""
    title = "Predicted time of a step"
    if "compute" not in timing.seconds:
        title += ", without forward and backward"
    table = _table(title, ("", "time", "speed"), [])
    table.columns[2].justify = "left"
    for name, seconds in timing.seconds.items():
        speed = f"{_speed(name, machine)}, {machine.source_of(name)}"
        table.add_row(_LABELS[name], format_seconds(seconds), speed)
    if len(timing.seconds) == 1:
        return table  # the rows below would repeat its time
    table.add_section()
    least = format_seconds(timing.least_s), f"the time of {timing.bound}"
    table.add_row("at least, with perfect overlap", *least)
    if timeline is not None:
        table.add_row("overlapped as scheduled", format_seconds(timeline.end_s))
        table.add_row("  exposed, on top of compute", format_seconds(timeline.exposed_s))
    table.add_row("at most, without overlap", format_seconds(timing.total_s))
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
