"""Whether a plan fits, which changes make it fit, and the largest model that fits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, get_args

from offload_adam.layout.budget import Category
from offload_adam.layout.state_plan import resolve_bucket_nbytes
from offload_adam.options import StateFormat
from offload_adam.plan.inputs import (
    MOST_NUMEL,
    Machine,
    Training,
    synthetic_specs,
    typical_specs,
)
from offload_adam.plan.prediction import Prediction, predict
from offload_adam.plan.setup import Fsdp2, Setup
from offload_adam.plan.shape import ModelShape

_PROBE_NUMEL = 10**10
# Share of a GPU that an advised change leaves: activations are an estimate, and torch's allocator
# leaves gaps.
_MARGIN = 0.05
_LEAST_GAIN = 0.99  # share of the missing bytes that may be left for a change to be worth its cost
_LEAST_BUCKET_NBYTES = 2**20
_IN_BUCKETS = (Category.GRADIENTS, Category.SLOTS, Category.STAGING, Category.BLOCK_SUMS)

DEVICE = "memory of a GPU"
HOST = "host memory of a node"
_ALL = Counter({DEVICE: 1, HOST: 1})
"""As missing bytes: for changes of any memory."""


class Need(NamedTuple):
    """Bytes that a run needs of one memory, and those that it may use; None if unknown."""

    memory: str
    needed_nbytes: int
    available_nbytes: int | None

    @property
    def is_met(self) -> bool:
        """Whether the run fits into this memory, as far as its size is known."""
        return self.missing_nbytes <= 0

    @property
    def missing_nbytes(self) -> int:
        """Bytes that are missing; negative or 0 if the run fits, 0 if the size is unknown."""
        return 0 if self.available_nbytes is None else self.needed_nbytes - self.available_nbytes


def needs(plan: Prediction, training: Training, machine: Machine) -> list[Need]:
    """Return the needs of all ranks of a node on the host, and of one rank on its GPU."""
    on_node = plan.host_nbytes * training.local_world_size
    found = [Need(HOST, on_node, machine.host_nbytes)]
    if training.uses_device:
        found.insert(0, Need(DEVICE, plan.device_nbytes, machine.device_nbytes))
    return found


def needs_of(setup: Setup, machine: Machine) -> list[Need]:
    """Return the needs of a setup."""
    return needs(setup.predict(), setup.training, machine)


def fits(setup: Setup, machine: Machine) -> bool:
    """Return whether a setup fits, as far as the machine is known."""
    return all(need.is_met for need in needs_of(setup, machine))


def fits_on_host(setup: Setup, machine: Machine) -> bool:
    """Return whether a setup fits into host memory, as far as that is known."""
    return all(need.is_met for need in needs_of(setup, machine) if need.memory == HOST)


def largest_model(
    itemsize: int, training: Training, machine: Machine, *, is_bfloat16: bool | None = None
) -> int | None:
    """Return about how many parameters fit, None if no memory is known.

    The result is below the limit by at most 0.1%, or by one parameter. Activations, frozen
    parameters and layers that FSDP2 gathers are those of `training`, whatever the size.

    Args:
        itemsize: bytes of an element of the parameters.
        is_bfloat16: see `synthetic_specs`.
    """

    def needs_of(numel: int) -> list[Need]:
        specs_of, resized = synthetic_specs, training
        if training.shape is not None and training.shape.is_typical:
            specs_of = typical_specs
            resized = replace(training, shape=ModelShape.typical(numel, itemsize))
        specs = specs_of(numel, itemsize, is_bfloat16=is_bfloat16)
        return needs(predict(specs, resized), training, machine)

    def fits(numel: int) -> bool:
        return all(need.is_met for need in needs_of(numel))

    probe = needs_of(_PROBE_NUMEL)
    if all(need.available_nbytes is None for need in probe):
        return None
    # Bytes are nearly proportional to parameters. Starting near the result saves predictions, which
    # take up to 0.2 s each.
    proportional = [
        _PROBE_NUMEL * need.available_nbytes // need.needed_nbytes
        for need in probe
        if need.available_nbytes is not None and need.needed_nbytes > 0
    ]
    low = min([*proportional, MOST_NUMEL])
    high = low * 101 // 100 + 1
    # Find a `low` that fits and a `high` that does not, then bisect.
    while low > 0 and not fits(low):
        low, high = low // 2, low
    while high <= MOST_NUMEL and fits(high):
        low, high = high, 2 * high
    high = min(high, MOST_NUMEL + 1)
    while high - low > max(1, low // 1000):
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low


def most_exact_fit(setup: Setup, machine: Machine) -> Setup:
    """Return the setup with the most exact state format that fits into host memory.

    If none fits, it is the smallest one. A format changes host memory alone.
    """
    _, training = setup.resolve()
    allows = training.allows_low_precision and setup.training.allows_low_precision
    formats = get_args(StateFormat) if allows else ("fp32",)
    for state_format in formats:
        chosen = setup.with_training(state_format=state_format)
        if fits_on_host(chosen, machine):
            break
    return chosen


@dataclass(frozen=True, slots=True)
class Advice:
    """Changes that together make a setup fit, and the bytes that it then needs.

    changes: each as a setting with its value.
    costs: what each of them costs.
    """

    changes: tuple[str, ...]
    costs: tuple[str, ...]
    host_nbytes_of_node: int
    device_nbytes: int


class _Change(NamedTuple):
    """A changed setup, what was changed, and what this costs."""

    name: str
    cost: str
    setup: Setup


_Changes = Callable[[Setup, Counter[str]], Iterator[_Change]]
"""Yields changes of one setting, the cheapest first, given the missing bytes of each memory.

A prediction takes up to 0.1 s, so those that cannot help are not yielded.
"""


def advise(setup: Setup, machine: Machine) -> list[Advice]:
    """Return what makes a setup fit, the cheapest first; empty if it fits or nothing does.

    These are changes of single settings. If none but more nodes suffices, the first one is a list
    of changes that suffice together, of which none can be left out.
    """
    if fits(setup, machine):
        return []
    if machine.device_nbytes is not None and setup.training.shape is not None:
        machine = replace(machine, device_nbytes=int((1 - _MARGIN) * machine.device_nbytes))
    # With weights in host memory, or without: they fill it while they relieve the GPU.
    most = [_everything(setup), _everything(setup, but=_fsdp2)]
    enough = [one for one in most if one and fits(list(one.values())[-1].setup, machine)]
    if not enough:
        return []  # at once, since a prediction for 1e12 parameters takes 40 ms
    missing = _missing_nbytes(setup, machine)
    found = list(_helpful(setup, missing, machine, _CHANGES))
    single = [(changes, _advice([change])) for changes, change, missing in found if not missing]
    advice = [one for _, one in single]
    if any(changes is not _more_nodes for changes, _ in single):
        return advice
    # Several changes cost less than more nodes.
    on_these = _everything(setup, but=_more_nodes)
    chosen = _combine(setup, missing, machine, but=_more_nodes)
    if not chosen and on_these and fits(list(on_these.values())[-1].setup, machine):
        chosen = on_these
    if not chosen and not single:
        chosen = _combine(setup, missing, machine) or enough[0]
    if chosen:
        advice.insert(0, _advice(_without_needless(setup, chosen, machine)))
    return advice


def _combine(
    setup: Setup, missing: Counter[str], machine: Machine, *, but: _Changes | None = None
) -> dict[_Changes, _Change]:
    """Return the cheapest changes that help, one after the other; empty if it never fits.

    Changes of the setting `but` are left out.

    After each one the cheapest are tried again: they may help only now, as a smaller state format
    does once the weights are in host memory, too.
    """
    chosen: dict[_Changes, _Change] = {}
    while missing:
        others = [one for one in _CHANGES if one not in chosen and one is not but]
        found = next(_helpful(setup, missing, machine, others), None)
        if found is None:
            return {}
        changes, change, missing = found
        chosen[changes] = change
        setup = change.setup
    return chosen


def _everything(setup: Setup, *, but: _Changes | None = None) -> dict[_Changes, _Change]:
    """Return the change of each setting that saves most, of all settings but one.

    Alone, some of them fill one memory as much as they relieve the other.
    """
    chosen: dict[_Changes, _Change] = {}
    for changes in _CHANGES:
        *_, last = [None, *changes(setup, _ALL)] if changes is not but else [None]
        if last is not None:
            chosen[changes] = last
            setup = last.setup
    return chosen


def lacking(setup: Setup, machine: Machine) -> set[str]:
    """Return the memories into which a setup does not fit, whatever is changed."""
    chosen = _everything(setup)
    return set(_missing_nbytes(list(chosen.values())[-1].setup if chosen else setup, machine))


def _helpful(
    setup: Setup, missing: Counter[str], machine: Machine, settings: Sequence[_Changes]
) -> Iterator[tuple[_Changes, _Change, Counter[str]]]:
    """Yield the cheapest changes of single settings that help most, and what is then missing."""
    for changes in settings:
        best, least = None, missing
        for change in changes(setup, missing):
            then = _missing_nbytes(change.setup, machine)
            if then.total() < _LEAST_GAIN * least.total():
                best, least = change, then
            if not then:
                break
        if best is not None:
            yield changes, best, least


def _without_needless(
    setup: Setup, chosen: dict[_Changes, _Change], machine: Machine
) -> list[_Change]:
    """Return the chosen changes, each as small as suffices with the others, or left out."""
    for changes in list(chosen):
        names = {one: change.name for one, change in chosen.items()}
        smaller: list[str | None] = [None]  # first without it
        before = list(chosen.values())[: list(chosen).index(changes)]
        for one in changes(before[-1].setup if before else setup, _ALL):
            if one.name == names[changes]:
                break
            smaller.append(one.name)
        for name in smaller:
            tried = {one: name if one is changes else names[one] for one in names}
            fewer = _apply(setup, [(one, to) for one, to in tried.items() if to is not None])
            if fewer and fits(list(fewer.values())[-1].setup, machine):
                chosen = fewer
                break
    return list(chosen.values())


def _apply(setup: Setup, names: Sequence[tuple[_Changes, str]]) -> dict[_Changes, _Change]:
    """Return changes by name, each made after the one before it; empty if one is not possible."""
    applied: dict[_Changes, _Change] = {}
    for changes, name in names:
        found = (one for one in changes(setup, _ALL) if one.name == name)
        change = next(found, None)
        if change is None:
            return {}
        applied[changes] = change
        setup = change.setup
    return applied


def _missing_nbytes(setup: Setup, machine: Machine) -> Counter[str]:
    """Return the missing bytes of the memories into which a setup does not fit."""
    return +Counter({need.memory: need.missing_nbytes for need in needs_of(setup, machine)})


def _advice(changes: Sequence[_Change]) -> Advice:
    last = changes[-1].setup
    plan = last.predict()
    return Advice(
        tuple(change.name for change in changes),
        tuple(change.cost for change in changes),
        plan.host_nbytes * last.training.local_world_size,
        plan.device_nbytes,
    )


def _with_offload(setup: Setup, **options: Any) -> Setup:
    return replace(setup, training=setup.training.with_offload(**options))


def _smaller_buckets(setup: Setup, missing: Counter[str]) -> Iterator[_Change]:
    plan = setup.predict()
    held = Counter(plan.host) + Counter(plan.device)
    if missing.total() > sum(held[category] for category in _IN_BUCKETS):
        return
    specs, training = setup.resolve()
    nbytes = resolve_bucket_nbytes(specs, training.policy)
    while (nbytes := nbytes // 2) >= _LEAST_BUCKET_NBYTES:
        cost = "more copies and collectives"
        yield _Change(f"bucket_nbytes={nbytes}", cost, _with_offload(setup, bucket_nbytes=nbytes))


def _no_snapshot_buffer(setup: Setup, missing: Counter[str]) -> Iterator[_Change]:
    if setup.training.offload.snapshot_buffer_nbytes and HOST in missing:
        cost = "updates wait for checkpoints in the background"
        without = _with_offload(setup, snapshot_buffer_nbytes=0)
        yield _Change("snapshot_buffer_nbytes=0", cost, without)


def _simpler_gradients(setup: Setup, missing: Counter[str]) -> Iterator[_Change]:
    training = setup.training
    if not training.streams:
        cost = "clip by max_grad_norm; .grad is empty after the backward"
        yield _Change("module=model (streaming)", cost, setup.with_training(streams=True))
    if training.accumulates:
        cost = "gradients add up in .grad"
        yield _Change('accumulate="auto"', cost, setup.with_training(accumulates=False))
    if training.reduce_fp32:
        cost = "gradients are averaged in 16 bits"
        yield _Change("reduce_dtype=None", cost, setup.with_training(reduce_fp32=False))


def _smaller_microbatches(setup: Setup, missing: Counter[str]) -> Iterator[_Change]:
    batch_size = setup.training.batch_size
    while setup.training.activation_nbytes > 0 and (batch_size := batch_size // 2) >= 1:
        cost = "more backwards in a step, with accumulation"
        yield _Change(
            f"microbatches of {batch_size}", cost, setup.with_training(batch_size=batch_size)
        )


def _checkpointing(setup: Setup, missing: Counter[str]) -> Iterator[_Change]:
    if setup.training.activation_nbytes > 0 and not setup.training.checkpointing:
        cost = "a second forward, a third more compute"
        yield _Change("activation checkpointing", cost, setup.with_training(checkpointing=True))


def _all_on_host(setup: Setup, missing: Counter[str]) -> Iterator[_Change]:
    if setup.training.offload.offload_fraction < 1.0:
        cost = "the GPU updates no part"
        yield _Change("offload_fraction=1", cost, _with_offload(setup, offload_fraction=1.0))
    if setup.training.replicated and not setup.training.amsgrad:  # which excludes it
        cost = "the host updates; not with use_lazy"
        yield _Change("use_offload=True", cost, setup.with_training(replicated=False))


_FORMAT_COSTS = {
    "bf16": "moments are rounded to 16 bits",
    "mixed": "moments in 16 and 8 bits, master weights in 24",
    "int8": "moments in 8 bits, master weights in 24",
}


def _smaller_formats(setup: Setup, missing: Counter[str]) -> Iterator[_Change]:
    _, training = setup.resolve()
    formats = get_args(StateFormat)
    allows = training.allows_low_precision and setup.training.allows_low_precision
    if not allows or HOST not in missing:
        return
    for state_format in formats[formats.index(training.state_format) + 1 :]:
        smaller = setup.with_training(state_format=state_format)
        yield _Change(f'state_format="{state_format}"', _FORMAT_COSTS[state_format], smaller)


def _not_kept(setup: Setup, missing: Counter[str]) -> Iterator[_Change]:
    if setup.training.offload.keep != "none":
        cost = "a killed run restarts from its checkpoint"
        yield _Change('keep="none"', cost, _with_offload(setup, keep="none"))


def _without_amsgrad(setup: Setup, missing: Counter[str]) -> Iterator[_Change]:
    if setup.training.amsgrad:
        yield _Change("amsgrad=False", "another algorithm", setup.with_training(amsgrad=False))


def _bf16_model(setup: Setup, missing: Counter[str]) -> Iterator[_Change]:
    if any(spec.itemsize == 4 for spec in setup.specs):
        halves = [
            replace(spec, itemsize=2, bucket_key=f"{spec.bucket_key} halved", is_bfloat16=True)
            for spec in setup.specs
        ]
        cost = "the model computes in 16 bits"
        changed = replace(setup, specs=halves)
        if setup.training.shape is not None:
            changed = changed.with_training(shape=replace(setup.training.shape, itemsize=2))
        yield _Change("a bf16 model", cost, changed)


def _fsdp2(setup: Setup, missing: Counter[str]) -> Iterator[_Change]:
    training = setup.training
    # Of a model that is sharded already, only the parts of one rank are known.
    if training.sharded or training.replicated or not training.on_device:
        return
    # FSDP2 averages gradients, in the dtype of its own policy, and adds them up in shards.
    setup = setup.with_training(reduce_fp32=False, accumulates=False)
    if setup.fsdp2 is None and training.world_size > 1:
        cost = "layers are gathered in forward and backward"
        yield _Change("FSDP2 (fully_shard)", cost, replace(setup, fsdp2=Fsdp2()))
    if setup.fsdp2 is None or not setup.fsdp2.offload_weights:
        on_host = replace(setup.fsdp2 or Fsdp2(), offload_weights=True)
        cost = "weights cross the bus in forward and backward"
        yield _Change("FSDP2's CPUOffloadPolicy", cost, replace(setup, fsdp2=on_host))


def _more_nodes(setup: Setup, missing: Counter[str]) -> Iterator[_Change]:
    training = setup.training
    if training.sharded or training.replicated or (setup.fsdp2 is None and HOST not in missing):
        return
    num_nodes = training.world_size // training.local_world_size
    for factor in (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64):
        world_size = factor * training.world_size
        name = f"{factor * num_nodes} nodes ({world_size} ranks)"
        yield _Change(name, "more machines", setup.with_training(world_size=world_size))


_CHANGES: tuple[_Changes, ...] = (
    _smaller_buckets,
    _no_snapshot_buffer,
    _simpler_gradients,
    _smaller_microbatches,
    _all_on_host,
    _smaller_formats,
    _checkpointing,
    _not_kept,
    _bf16_model,
    _fsdp2,
    _without_amsgrad,
    _more_nodes,
)
"""All settings that change the memory, the cheapest to change first."""
