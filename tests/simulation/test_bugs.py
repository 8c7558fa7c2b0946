"""The simulation also finds ordering bugs other than one missing wait of the schedule."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest

from offload_adam import fsdp_private
from offload_adam.layout.schedule import Lane, Operation, Schedule, Task
from offload_adam.spans import Stopwatch
from tests.simulation.backend import SimulatedStreams
from tests.simulation.case import Case, Step, simple_case
from tests.simulation.simulation import Simulation, clean_reference_of

NUM_SEEDS = 6

ALONE = simple_case(4, "bf16")
ALONE_FP32 = simple_case(4, "fp32")  # H2D copies read the master weights themselves
TWO = simple_case(4, "bf16", world_size=2, rank=1)
DEVICE_STATE = simple_case(4, "bf16", world_size=2, offload_fraction=0.0)
POOLED = simple_case(4, "bf16", world_size=2, pin="staging")
# Each bucket has two layers, which run on two streams.
SIDE_LAYERS = (0, 2, 4)
SIDE = simple_case(6, "bf16", bucket_nbytes=1600, side_layers=SIDE_LAYERS)
SIDE_TWO = simple_case(6, "bf16", bucket_nbytes=1600, side_layers=SIDE_LAYERS, world_size=2)
SIDE_DEVICE_STATE = simple_case(
    6, "bf16", bucket_nbytes=1600, side_layers=SIDE_LAYERS, world_size=2, offload_fraction=0.0
)
FSDP2 = simple_case(4, "bf16", world_size=2, sharding="FSDP2")
FSDP2_ALONE = simple_case(4, "bf16", sharding="FSDP2")
HSDP = simple_case(4, "bf16", world_size=2, rank=1, sharding="HSDP")
# The layers run in reverse, so that each one gathers again the one that ran before.
FSDP2_UNUSED = replace(FSDP2, steps=(Step(((3, 2, 1, 0),), True, None, False),) * 3)
# FSDP2 waits for gradients only at the end of a step's last backward. The first one leaves buckets
# incomplete.
FSDP2_ROUNDS = replace(
    FSDP2, steps=(Step(((0, 1), (0, 1, 2, 3)), False, None, False),) * 3, accumulates_later=True
)
# The second step skips the buckets between 0 and 5: only an event for skipped buckets tells when
# their slots are free.
SKIPS_BUCKETS = Case(
    layers=tuple(((300, "bf16"),) for _ in range(6)),
    steps=(Step(((0, 4, 5),), False, None, False), Step(((0, 5),), False, None, False)),
    bucket_nbytes=100,
)

Patch = pytest.MonkeyPatch


def _change(simulation: Simulation, change: Callable[[Schedule], Schedule]) -> None:
    simulation.with_schedule(change(simulation.core.stream_waits.schedule))


def one_staging_slot_for_all(simulation: Simulation, patch: Patch) -> None:
    _change(simulation, lambda s: replace(s, staging_slots=dict.fromkeys(s.staging_slots, 0)))


def one_reduction_slot_for_all(simulation: Simulation, patch: Patch) -> None:
    _change(simulation, lambda s: replace(s, reduce_slots=dict.fromkeys(s.reduce_slots, 0)))


def pooled_slot_released_before_its_copy(simulation: Simulation, patch: Patch) -> None:
    transfer = simulation.core.transfer
    start = transfer.start_direct_copy

    def hasty(gradient_copy: Any) -> None:
        start(gradient_copy)
        transfer.slots.release(gradient_copy.pooled_slot)
        gradient_copy.pooled_slot = None

    patch.setattr(transfer, "start_direct_copy", hasty)


def skipped_bucket_without_an_event(simulation: Simulation, patch: Patch) -> None:
    patch.setattr(simulation.core.tasks, "skip_copy_h2d", lambda number: None)


def gather_before_its_copy_h2d(simulation: Simulation, patch: Patch) -> None:
    _skip_waits_of(simulation, patch, Operation.GATHER)


def _skip_waits_of(simulation: Simulation, patch: Patch, skipped: Operation) -> None:
    stream_waits = simulation.core.stream_waits
    begin = stream_waits.wait_before

    def hasty(operation: Operation, bucket: int) -> None:
        if operation is not skipped:
            begin(operation, bucket)

    patch.setattr(stream_waits, "wait_before", hasty)


def copy_d2h_that_does_not_wait_for_compute(simulation: Simulation, patch: Patch) -> None:
    stream_waits = simulation.core.stream_waits
    start = simulation.machine.record(Lane.COMPUTE)

    record = stream_waits.record

    def early(operation: Operation, bucket: int) -> None:
        record(operation, bucket)
        if operation in (Operation.GRADIENT, Operation.PACK):
            stream_waits._events[Task(operation, bucket)] = start

    patch.setattr(stream_waits, "record", early)


def update_without_a_wait(simulation: Simulation, patch: Patch) -> None:
    stream_waits = simulation.core.stream_waits
    patch.setattr(stream_waits, "wait_for_update", lambda task: None)


def release_at_the_end_of_backward(simulation: Simulation, patch: Patch) -> None:
    tasks, reduction = simulation.core.tasks, simulation.core.reduction
    ended, release = reduction.backward_ended, tasks.record_last_read

    def early() -> None:
        ended()
        release()

    patch.setattr(reduction, "backward_ended", early)
    patch.setattr(tasks, "record_last_read", lambda: None)


def gather_ahead_of_an_unfinished_update(simulation: Simulation, patch: Patch) -> None:
    executor = simulation.core.executor
    stream_waits = simulation.core.stream_waits

    def hasty(stopwatch: Stopwatch) -> None:
        with patch.context() as inner:
            inner.setattr(stream_waits, "wait_for_update", lambda task: None)
            if executor._to_gather:
                executor._gather_next(stopwatch)

    patch.setattr(executor, "_gather_ahead", hasty)


def backward_that_does_not_wait_for_updates(simulation: Simulation, patch: Patch) -> None:
    reduction = simulation.core.reduction
    ready = reduction.gradients_ready

    def hasty(parameters: Any, stream: Any) -> None:
        reduction._begun = True
        ready(parameters, stream)

    patch.setattr(reduction, "gradients_ready", hasty)


def step_that_does_not_wait_for_updates(simulation: Simulation, patch: Patch) -> None:
    backward_that_does_not_wait_for_updates(simulation, patch)
    patch.setattr(simulation.core.executor, "finish_updates", lambda: None)


def gradients_of_other_streams_not_waited_for(simulation: Simulation, patch: Patch) -> None:
    patch.setattr(simulation.core.stream_waits, "wait_for_gradients", lambda *_: None)


def gradients_freed_to_another_stream_before_they_are_read(
    simulation: Simulation, patch: Patch
) -> None:
    # A property of the class, so that an assignment to the instance has no effect.
    never = property(lambda self: False, lambda self, value: None)
    patch.setattr(SimulatedStreams, "_has_several", never, raising=False)


def slot_used_by_two_streams_at_once(simulation: Simulation, patch: Patch) -> None:
    patch.setattr(
        SimulatedStreams,
        "_enter",
        lambda self, lane: self._own.get(lane) or self.current(),
    )


def parameters_not_waited_for_on_other_streams(simulation: Simulation, patch: Patch) -> None:
    patch.setattr(simulation.core.executor, "_wait_on_other_streams", lambda buckets: None)


def load_while_copies_read_the_state(simulation: Simulation, patch: Patch) -> None:
    patch.setattr(simulation.core.stream_waits, "block_until_over", lambda operation: None)


def gathers_that_do_not_wait(simulation: Simulation, patch: Patch) -> None:
    patch.setattr(simulation.core.executor, "wait_for_buckets", lambda buckets: None)


def compute_waits_instead_of_the_copy_in(simulation: Simulation, patch: Patch) -> None:
    patch.setattr(fsdp_private, "_reading_streams", lambda group, async_op: [nullcontext()])


def unused_gathers_not_waited_for(simulation: Simulation, patch: Patch) -> None:
    patch.setattr(simulation.core, "reshard", lambda: None)


def streams_of_gradients_not_recorded(simulation: Simulation, patch: Patch) -> None:
    patch.setattr(simulation.core.stream_waits, "gradients_written", lambda *_: None)


BUGS: list[tuple[Callable[[Simulation, Patch], None], Case]] = [
    (one_staging_slot_for_all, ALONE),
    (one_reduction_slot_for_all, TWO),
    (pooled_slot_released_before_its_copy, POOLED),
    (skipped_bucket_without_an_event, SKIPS_BUCKETS),
    (gather_before_its_copy_h2d, TWO),
    (copy_d2h_that_does_not_wait_for_compute, ALONE),
    (update_without_a_wait, TWO),
    (update_without_a_wait, ALONE),
    (release_at_the_end_of_backward, ALONE),
    (gather_ahead_of_an_unfinished_update, TWO),
    (backward_that_does_not_wait_for_updates, TWO),
    (step_that_does_not_wait_for_updates, ALONE),
    (gradients_of_other_streams_not_waited_for, SIDE),
    (gradients_of_other_streams_not_waited_for, SIDE_TWO),
    (gradients_freed_to_another_stream_before_they_are_read, SIDE_DEVICE_STATE),
    (slot_used_by_two_streams_at_once, replace(SIDE_DEVICE_STATE, bucket_nbytes=100)),
    (parameters_not_waited_for_on_other_streams, SIDE),
    (load_while_copies_read_the_state, ALONE_FP32),
    (gathers_that_do_not_wait, FSDP2),
    (gathers_that_do_not_wait, FSDP2_ALONE),
    (gathers_that_do_not_wait, HSDP),
    (compute_waits_instead_of_the_copy_in, FSDP2),
    (compute_waits_instead_of_the_copy_in, HSDP),
    (unused_gathers_not_waited_for, FSDP2_UNUSED),
    (streams_of_gradients_not_recorded, FSDP2_ROUNDS),
    (gradients_freed_to_another_stream_before_they_are_read, FSDP2),
    (release_at_the_end_of_backward, FSDP2),
    (update_without_a_wait, FSDP2),
]


@pytest.mark.parametrize(("bug", "case"), BUGS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_bug_is_found(bug: Callable[[Simulation, Patch], None], case: Case) -> None:
    reference = clean_reference_of(case, NUM_SEEDS)
    num_found = 0
    for seed in range(NUM_SEEDS):
        with pytest.MonkeyPatch.context() as patch:
            simulation = Simulation(case, reference, seed)
            bug(simulation, patch)
            num_found += simulation.has_race()
    assert num_found >= NUM_SEEDS // 2


def gathers_of_needed_buckets_first(simulation: Simulation, patch: Patch) -> None:
    executor = simulation.core.executor
    wait = executor._wait_for_buckets

    def hasty(buckets: Collection[int]) -> None:
        for number in buckets:
            if number in executor._to_gather:
                executor._to_gather.remove(number)
                executor._to_gather.appendleft(number)
        wait(buckets)

    patch.setattr(executor, "_wait_for_buckets", hasty)


def updates_in_backward_order(simulation: Simulation, patch: Patch) -> None:
    forward_order = simulation.core.stream_waits.schedule.forward_order
    patch.setattr(Schedule, "forward_order", forward_order[::-1])


@pytest.mark.parametrize(
    ("bug", "case"),
    [
        (gathers_of_needed_buckets_first, TWO),
        (updates_in_backward_order, ALONE),
        (updates_in_backward_order, DEVICE_STATE),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_wrong_order_of_tasks_is_found(
    bug: Callable[[Simulation, Patch], None], case: Case
) -> None:
    reference = clean_reference_of(case, NUM_SEEDS)
    for seed in range(NUM_SEEDS):
        with pytest.MonkeyPatch.context() as patch:
            simulation = Simulation(case, reference, seed)
            bug(simulation, patch)
            assert any("is issued after" in text for text in simulation.run())


@pytest.mark.parametrize("case", [ALONE, TWO], ids=["alone", "two"])
def test_a_bug_shows_in_the_bits_too(case: Case) -> None:
    reference = clean_reference_of(case, NUM_SEEDS)
    assert any(_bits_differ(Simulation(case, reference, seed)) for seed in range(NUM_SEEDS))


def _bits_differ(simulation: Simulation) -> bool:
    with pytest.MonkeyPatch.context() as patch:
        one_staging_slot_for_all(simulation, patch)
        return any("read" in text or "sent" in text for text in simulation.run())
