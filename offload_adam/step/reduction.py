"""Bring gradients to where the update reads them, bucket by bucket, in one order on every rank."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from itertools import groupby
from operator import attrgetter, itemgetter
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from offload_adam.coordinator.agreement import largest_on_any_rank
from offload_adam.coordinator.membership import Membership
from offload_adam.observe.place import HERE
from offload_adam.observe.spans import span
from offload_adam.parameters.gradients import GradientsInPlace, in_memory_order
from offload_adam.step.bucket_state import BucketState
from offload_adam.step.gradients import BucketGradients
from offload_adam.step.row_exchange import RowExchange
from offload_adam.transfer.collectives import PendingCollective, mean_over_ranks
from offload_adam.transfer.slots import SlotPool
from offload_adam.transfer.staging import wait_for_device

_grad = attrgetter("grad")


class _InFlight(NamedTuple):
    """A bucket on its way; `adds` to what an earlier backward of this step has landed."""

    state: BucketState
    pending: PendingCollective
    present: npt.NDArray[np.bool_]
    adds: bool


class _Arrivals:
    """Which gradients of one bucket a backward has brought so far."""

    __slots__ = ("num_missing", "ready")

    def __init__(self, num_parameters: int) -> None:
        self.ready = [False] * num_parameters
        self.num_missing = num_parameters

    def count(self, positions: Sequence[int]) -> None:
        """Count gradients in; one that comes again counts once."""
        ready = self.ready
        for position in positions:
            if not ready[position]:
                ready[position] = True
                self.num_missing -= 1

    def start_over(self) -> None:
        """Wait for every gradient again."""
        self.num_missing = len(self.ready)
        self.ready[:] = [False] * self.num_missing


class GradientReduction:
    """Moves each bucket's gradients out of `.grad`: reduced over the ranks, landed on the host.

    During a streaming backward, hooks call `gradients_ready` and buckets leave in their fixed order
    as soon as all their gradients are there; what is missing at the end of the backward counts
    zeros. Without hooks, `finish` does all of it inside `step()`. One reduced backward a step is
    the rule; with `accumulates` a further one adds in fp32 to what has landed.

    Owns: the slots in which buckets are reduced, and this step's `BucketGradients`.
    Lifecycle: `reset` after each step, and from `zero_grad`.

    Args:
        reduces: ranks' gradients are averaged here; otherwise `.grad` is final as it stands.
        streams: gradients leave `.grad`, which is None afterwards.
        accumulates: landed gradients are fp32 and later backwards add to them.
        reduce_dtype: dtype of the reduction, None for each bucket's own.
        takes_rows: gradients may be sparse.
    """

    def __init__(
        self,
        membership: Membership,
        *,
        reduces: bool,
        streams: bool,
        accumulates: bool,
        reduce_dtype: torch.dtype | None,
        takes_rows: bool = False,
    ) -> None:
        self._membership = membership
        self._reduces = reduces and membership.world_size > 1
        self.streams = streams
        self._accumulates = accumulates
        self._reduce_dtype = reduce_dtype
        self._rows = RowExchange(membership) if takes_rows and self._reduces else None
        self._slots = SlotPool()
        self._states: list[BucketState] = []
        self._place_of: dict[int, tuple[int, int]] = {}
        self._in_flight: deque[_InFlight] = deque()
        self._next = 0
        self._num_rounds = 0
        self._begun = False
        self._arrivals: list[_Arrivals] = []
        self.gradients: list[BucketGradients] = []

    @property
    def slot_nbytes(self) -> Mapping[torch.device, int]:
        """Bytes of the slots in which buckets are reduced, by device."""
        return self._slots.nbytes

    def landed_dtype(self, dtype: torch.dtype, offloaded: bool) -> torch.dtype | None:
        """Return the dtype in which gradients of such parameters land, None where they stay put."""
        if self._accumulates:
            return torch.float32
        if self._reduces:
            return self._reduce_dtype or dtype
        return dtype if offloaded else None

    def extend(self, states: Sequence[BucketState]) -> None:
        """Take further buckets into the order, after those that are known or have left already."""
        for state in states:
            self._states.append(state)
            self._arrivals.append(_Arrivals(len(state.parameters)))
            self.gradients.append(BucketGradients(state))
            for position, parameter in enumerate(state.parameters):
                self._place_of[id(parameter)] = (state.layout.index, position)
            if self._reduces:
                dtype = self._reduce_dtype or state.dtype
                self._slots.reserve(state.layout.numel, dtype, state.device)

    def gradients_ready(self, parameters: Sequence[torch.Tensor]) -> None:
        """Take gradients in the order of their arrival, and send off every bucket that is complete.

        Raises:
            ValueError: a second reduced backward (or a parameter shared by reentrant checkpoints),
                and no room was reserved to add to what has left.
        """
        self._begun = True
        places = [self._place_of[id(parameter)] for parameter in parameters]
        for number, members in groupby(places, key=itemgetter(0)):
            positions = [position for _, position in members]
            if number < self._next:
                self._add_round(number, positions[0])
            self._states[number].reader.take(positions)
            self._arrivals[number].count(positions)
            self._send_complete()

    def _send_complete(self) -> None:
        while self._next < len(self._states) and self._arrivals[self._next].num_missing == 0:
            self._send_next()

    def backward_ended(self) -> None:
        """Send off what this backward left incomplete, so that every rank issues the same order."""
        while self._next < len(self._states):
            self._send_next()

    def finish(self) -> Exception | None:
        """Send off and land everything for this step, and return the first error of this rank.

        Collective. The order of collectives is kept even after an error, which the caller must
        carry to the other ranks: a rank that left the sequence would leave them waiting.
        """
        failure: Exception | None = None
        if self._rows is not None and not self.streams:
            failure = self._rows.read_ahead(self._states)
        failure = self._send_rest() or failure
        if self._accumulates and self._reduces:
            # Ranks may have run different numbers of backwards; the others wait for every bucket.
            most = largest_on_any_rank(self._membership, self._num_rounds)
            while self._num_rounds < most:
                self._open_round()
                failure = self._send_rest() or failure
        self._land_all()
        rows_failure = self._finish_rows()
        return failure or rows_failure

    def _finish_rows(self) -> Exception | None:
        """Make sparse gradients final, and return this rank's error."""
        failure: Exception | None = None
        for state, gradients in zip(self._states, self.gradients, strict=True):
            try:
                gradients.refuse_both(state)
            except ValueError as error:
                failure = failure or error
            if self._rows is None:
                gradients.settle_rows()
        if self._rows is not None:
            failure = self._rows.finish(self._states, self.gradients) or failure
        return failure

    def has_late_gradients(self) -> bool:
        """Tell whether a `.grad` appeared, on this rank, after its bucket had left.

        Raises:
            ValueError: on a parameter whose gradient has already left.
        """
        if not self.streams:
            return False
        late = False
        for state in self._states[: self._next]:
            if set(map(_grad, state.parameters)) == {None}:
                continue
            present = self.gradients[state.layout.index].present
            for position, parameter in enumerate(state.parameters):
                if parameter.grad is None:
                    continue
                if present[position]:
                    raise ValueError(
                        f"parameter {state.names[position]!r} has a .grad at step(), but its "
                        "gradient has already left in this step's backward: edit gradients with "
                        "tensor hooks, or make the optimizer without module= to keep them in .grad"
                    )
                late = True
        return late

    def take_late_gradients(self) -> Exception | None:
        """Send all buckets once more for gradients that were set by hand after the backward.

        Every rank must do it when any has such gradients. They are added to what other ranks sent
        in time, or else to zeros, which is exact in any dtype.
        """
        self._open_round()
        return self.finish()

    def reset(self) -> None:
        """Forget this step's gradients; a backward that was begun is completed, for the peers.

        It may have raised on this rank alone, and the others wait for all of its buckets.
        """
        unfinished = self._next < len(self._states) and (self._begun or self._next > 0)
        if self._in_flight or unfinished:
            self._send_rest()
            self._land_all()
        self._begun = False
        self._next = 0
        self._num_rounds = 0
        self.gradients = [BucketGradients(state) for state in self._states]
        if self._rows is not None:
            self._rows.forget()
        self._start_counting()

    def _start_counting(self) -> None:
        for arrivals in self._arrivals:
            arrivals.start_over()

    def _open_round(self) -> None:
        """Start over with the first bucket, to add to what has landed."""
        self._num_rounds += 1
        self._next = 0
        self._start_counting()

    def _add_round(self, number: int, position: int) -> None:
        """Make way for a gradient whose bucket has left, where room was reserved to add it."""
        if self._accumulates:
            self.backward_ended()
            self._open_round()
            return
        name = self._states[number].names[position]
        raise ValueError(
            f"the gradient of parameter {name!r} has already been reduced in this step, and this "
            "backward brings another: run all but the last backward of a step inside no_sync(), or "
            "make the optimizer with accumulate='host' to add them on the host"
        )

    def _send_rest(self) -> Exception | None:
        """Send off every bucket that has not left yet, and return the first error of this rank."""
        failure: Exception | None = None
        while self._next < len(self._states):
            try:
                self._send_next()
            except (TypeError, ValueError) as error:
                failure = failure or error
            self._retire(wait=not self.streams)
        return failure

    def _land_all(self) -> None:
        """Wait until everything that was sent has landed."""
        self._retire(wait=True)
        wait_for_device({state.device for state in self._states if state.offloaded})

    def _send_next(self) -> None:
        """Take the next bucket's gradients out of `.grad` and start them on their way."""
        with torch.no_grad():
            self._send(self._next)

    def _send(self, number: int) -> None:
        self._next = number + 1
        state = self._states[number]
        try:
            found = self._read(state)
        except (TypeError, ValueError):
            if self._reduces:
                self._start_reduction(state, [None] * len(state.parameters))
            raise
        self.gradients[number].add_rows(found)
        if self._reduces:
            self._start_reduction(state, found.tensors)
            self._retire(wait=False)
        elif state.planes.landed_gradient is None:
            self.gradients[number].hold(found)
        else:
            self._land_directly(number, found.tensors)

    def _read(self, state: BucketState) -> GradientsInPlace:
        found = None if self._rows is None else self._rows.take(state.layout.index)
        return found or state.reader.read(keep=not self.streams)

    def _start_reduction(self, state: BucketState, gradients: list[torch.Tensor | None]) -> None:
        """Pack a bucket, zeros for what is missing, and start its mean over the ranks."""
        present = np.array([gradient is not None for gradient in gradients], dtype=np.bool_)
        idle = self._rows is not None and self._rows.is_without_dense(state)
        if state.layout.numel == 0 or idle:
            self.gradients[state.layout.index].dense |= present
            return
        dtype = self._reduce_dtype or state.dtype
        with span("pack", state.layout.index):
            slot = self._pack(state, dtype, gradients)
        pending = mean_over_ranks(
            slot,
            self._membership.data_group(state.device),
            state.layout.shard_bounds(state.rank),
        )
        self._in_flight.append(_InFlight(state, pending, present, self._num_rounds > 0))

    def _pack(
        self, state: BucketState, dtype: torch.dtype, gradients: list[torch.Tensor | None]
    ) -> torch.Tensor:
        """Return a slot with a bucket's gradients, zeros for what is missing."""
        slot = self._slots.acquire(state.layout.numel, dtype, state.device)
        sources, targets = [], []
        for placed, gradient in zip(state.layout.placements, gradients, strict=True):
            part = slot[placed.start : placed.end]
            if gradient is None:
                part.zero_()
            elif placed.numel > 0:
                sources.append(in_memory_order(gradient))
                targets.append(part)
        if sources:
            torch._foreach_copy_(targets, sources)
        return slot

    def _retire(self, *, wait: bool) -> None:
        """Land, in order, buckets whose reduction is over; with `wait` all of them."""
        while self._in_flight and (wait or self._in_flight[0].pending.is_completed()):
            state, pending, present, adds = self._in_flight.popleft()
            index = state.layout.index
            with HERE.at("reduce", index), span("reduce", index):
                pending.wait(self._membership)
            landed = state.planes.landed_gradient
            assert landed is not None
            with span("copy down", state.layout.index):
                if adds:
                    landed.add_(pending.shard.to(landed.device))
                else:
                    landed.copy_(pending.shard)
            self.gradients[state.layout.index].land(landed, present, complete=True)
            self._slots.release(pending.buffer)

    def _land_directly(self, number: int, gradients: list[torch.Tensor | None]) -> None:
        """Copy (or add) this rank's segments of gradients that need no reduction."""
        state = self._states[number]
        landed = state.planes.landed_gradient
        assert landed is not None
        arrived = self.gradients[number].dense
        segments = state.segments
        rows = zip(
            segments.positions.tolist(),
            segments.parameter_starts.tolist(),
            segments.shard_starts.tolist(),
            segments.numels.tolist(),
            strict=True,
        )
        for position, parameter_start, shard_start, numel in rows:
            gradient = gradients[position]
            if gradient is None:
                continue
            source = in_memory_order(gradient)[parameter_start : parameter_start + numel]
            target = landed[shard_start : shard_start + numel]
            if arrived[position]:
                target.add_(source.to(target.device))
            else:
                target.copy_(source, non_blocking=True)
        present = np.array([gradient is not None for gradient in gradients], dtype=np.bool_)
        self.gradients[number].land(landed, present, complete=False)
