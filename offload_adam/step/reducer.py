"""Average gradients over the ranks, bucket by bucket, in the same order on every rank."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from itertools import groupby
from operator import attrgetter, is_, itemgetter

import numpy as np
import torch

from offload_adam.coordinator.agreement import largest_on_any_rank
from offload_adam.coordinator.ranks import RankGroup
from offload_adam.gradients.gradient_transfer import GradientCopy, GradientTransfer
from offload_adam.gradients.reader import GradientReader, LocalGradients
from offload_adam.gradients.row_exchange import RowExchange
from offload_adam.gradients.segments import BucketGradients
from offload_adam.gradients.stand_in import (
    StreamedGradients,
    gradient_of,
    local_gradient_of,
)
from offload_adam.layout.state_plan import StateLocation, StatePolicy
from offload_adam.params.bucket import BucketState
from offload_adam.step.accumulators import Accumulators
from offload_adam.step.executor import Executor
from offload_adam.step.kept_steps import KeptSteps
from offload_adam.transfer.stream_waits import StreamWaits

_grad = attrgetter("grad")

_EMPTIED = (
    "The .grad of parameter {!r} was set to None, but its gradient has already left .grad in this "
    "step's backward. Drop the gradients of all parameters with optimizer.zero_grad(), or "
    "construct the optimizer without module= to keep them in .grad."
)


class GradientReduction:
    """Averages each bucket's gradients over the ranks, and moves them to its gradient shard.

    To send a bucket is to read its gradients from `.grad` and to start their reduction, or their
    copy if nothing is reduced. All ranks send all buckets in the same order.

    If gradients stream (`streamed` is set), hooks call `gradients_ready` during backward. A bucket
    is sent as soon as all of its gradients are ready and all earlier buckets are sent. At the end
    of the backward the remaining buckets are sent, with zeros for missing gradients. Without hooks,
    `finish` sends all buckets inside `step()`.

    A round sends each bucket once, and each reduced backward of a step is a round. A further
    backward is added in fp32: to the gradient shard with `policy.accumulates`, else to memory that
    `accumulators` takes then. Gradients that the user sets too late for their bucket are another
    round, too.

    Ranks may run different numbers of backwards. A rank that runs several for the first time is
    `is_ahead` until the agreement has told the other ranks: only then do they send zeros for the
    missing rounds. From then on all ranks exchange their numbers of rounds in each step.

    Owns: this step's `BucketGradients`.
    Lifecycle: `reset` after each step, and from `zero_grad`.

    Args:
        policy: says whether gradients are averaged here (if not, those in `.grad` are final), and
            whether the gradient shards are planned for the sums of several backwards.
        states: all buckets; this list grows with `add_param_group`.
        stream_waits: orders the streams on which gradients are written.
        transfer: packs and reduces a bucket's gradients.
        executor: copies the reduced gradients to the gradient shard.
        accumulators: takes memory for such sums later. None: a second backward is an error, unless
            the shards are planned for it.
        accepts_sparse: gradients may be sparse.
        streamed: lets torch's functions work on the stand-ins that `.grad` holds after a gradient
            has left during backward. None: gradients stay in `.grad` until the step.
    """

    def __init__(
        self,
        ranks: RankGroup,
        policy: StatePolicy,
        states: Sequence[BucketState],
        stream_waits: StreamWaits,
        transfer: GradientTransfer,
        executor: Executor,
        *,
        accumulators: Accumulators | None = None,
        accepts_sparse: bool = False,
        streamed: StreamedGradients | None = None,
    ) -> None:
        self.kept: KeptSteps | None = None  # records that new gradients may make invalid
        self._streamed = streamed
        self._ranks = ranks
        self._averages = policy.averages
        self.streams = streamed is not None
        self._plans_sums = policy.accumulates
        # State that is kept is allocated at construction, so "auto" allows no sums.
        self._remedy = "host" if policy.keeps else "auto"
        self._accumulators = accumulators
        self._rows = RowExchange(ranks) if accepts_sparse and self._averages else None
        # Whether all ranks compare their numbers of rounds in each step, a small collective. With
        # sparse gradients they do so from the start: the exchange of rows needs all rounds.
        self._compares_rounds = self._averages and (
            policy.accumulates or (accumulators is not None and self._rows is not None)
        )
        self.is_ahead = False  # this rank has run several rounds, which other ranks may not know
        self._accepts_sparse = accepts_sparse
        self._states = states
        self._stream_waits = stream_waits
        self._transfer = transfer
        self._executor = executor
        self._readers: list[GradientReader] = []
        # By `id(parameter)`: its bucket and its position there.
        self._place_of: dict[int, tuple[int, int]] = {}
        self._next = 0  # the next bucket to send
        self._num_rounds = 0  # further rounds of this step: 0 in its first one
        self._begun = False  # hooks have delivered gradients in this step
        self._shows_stand_ins = False  # some `.grad` may hold a stand-in
        self._hidden = False  # a further backward has hidden the stand-ins of earlier ones
        self._missing: list[set[int]] = []  # by bucket: positions without a gradient in this round
        self.gradients: list[BucketGradients] = []

    @property
    def has_gradients(self) -> bool:
        """Whether a gradient has left `.grad` since the last step or `reset`."""
        return self._begun or self._next > 0

    def extend(self, states: Sequence[BucketState]) -> None:
        """Append new buckets, already in `states`, to the order in which buckets are sent."""
        for state in states:
            accepts_sparse = self._accepts_sparse and not state.layout.amsgrad
            reader = GradientReader(state.names, state.parameters, accepts_sparse=accepts_sparse)
            if self.streams:
                reader.make_stand_ins(self._streamed, state.indices.tolist())
            self._readers.append(reader)
            self._missing.append(set(range(len(state.parameters))))
            self.gradients.append(BucketGradients(state))
            for position, parameter in enumerate(state.parameters):
                self._place_of[id(parameter)] = (state.layout.index, position)

    def gradients_ready(self, parameters: Sequence[torch.Tensor], stream: Hashable = None) -> None:
        """Take gradients out of `.grad`, and send every bucket that is complete.

        Args:
            parameters: those with a new gradient, in order of arrival.
            stream: the stream that wrote the gradients, None in host memory.

        Raises:
            ValueError: a second reduced backward (or a parameter shared by reentrant checkpoints)
                with `accumulate="error"`.
            HostMemoryError: host memory is short for the sums of several backwards.
        """
        if not self._begun:
            # Wait for the previous step: its updates may still read the gradient shards that this
            # backward writes, and H2D copies of parameters that no forward has read may still run.
            # Because of this wait, `layout.schedule` needs no waits from one step to the next.
            self._executor.finish_updates()
            self._hide_from_backward()
        self._begun = True
        places = [self._place_of[id(parameter)] for parameter in parameters]
        numbers, all_positions = zip(*places, strict=True)
        if numbers.count(numbers[0]) == len(numbers):  # the usual case; grouping is slow
            groups: Iterable[tuple[int, Sequence[int]]] = [(numbers[0], all_positions)]
        else:
            groups = (
                (number, [position for _, position in members])
                for number, members in groupby(places, key=itemgetter(0))
            )
        for number, positions in groups:
            if number < self._next:
                self._add_round(number, positions[0])
            if stream is not None:
                self._note_stream(number, positions, stream)
            self._readers[number].take(positions)
            self._missing[number].difference_update(positions)
            while self._next < len(self._states) and not self._missing[self._next]:
                self._send_next()

    def _hide_from_backward(self) -> None:
        """Empty every `.grad` that holds a stand-in, all at once, for the running backward.

        Otherwise autograd adds to each stand-in, which then has to be replaced one by one.
        """
        # With parameters on several devices, other threads of autograd may write `.grad` right now.
        if len({state.device for state in self._states}) == 1:
            self.hide_stand_ins()
            # In a further round, gradients of this step have left, and `.grad` is now empty: only
            # this flag tells `backward_began` that the user did not empty it. In the first round,
            # each gradient that leaves is replaced by a stand-in.
            self._hidden = self._num_rounds > 0

    def zero_grad(self, *, set_to_none: bool) -> None:
        """Forget this step's gradients, as `reset` does. The caller then clears every `.grad`.

        Args:
            set_to_none: the caller sets every `.grad` to None, also those with stand-ins.
        """
        self.reset()
        if not set_to_none:
            self.hide_stand_ins()
        self._shows_stand_ins = False

    def hide_stand_ins(self) -> None:
        """Set every `.grad` that holds a stand-in to None."""
        if self._shows_stand_ins:
            for reader in self._readers:
                reader.hide_stand_ins()
        self._shows_stand_ins = False

    def backward_began(self) -> None:
        """Raise an error if `.grad` was set to None before a further backward of this step.

        For example, `model.zero_grad()` sets it. But it cannot drop the gradient that has already
        left `.grad`, to which the further backward would add.

        Raises:
            ValueError: naming a parameter.
        """
        # If `_hidden`, this is a nested backward, and this package has emptied `.grad`.
        if not self.has_gradients or self._hidden:
            return
        for reader, gradients in zip(self._readers, self.gradients, strict=True):
            name = reader.emptied(gradients.dense.tolist())
            if name is not None:
                raise ValueError(_EMPTIED.format(name))

    def backward_ended(self) -> None:
        """Send the incomplete buckets too, so that all ranks issue the same collectives."""
        while self._next < len(self._states):
            self._send_next()
        self._hidden = False

    def finish(self) -> Exception | None:
        """Send the remaining buckets, finish all copies, and return this rank's first error.

        Collective. After an error, this rank still issues all collectives, or the other ranks would
        hang. The caller must report the error to them.
        """
        failure: Exception | None = None
        if self._rows is not None and not self.streams:
            failure = self._rows.read_ahead(self._states, self._readers)
        failure = self._send_rest() or failure
        if self.is_ahead:
            # Do not wait: other ranks may send their part of these rounds only after the agreement.
            return failure
        if self._compares_rounds:
            # Ranks may have run different numbers of backwards. Those with fewer send zeros, since
            # their peers wait for every bucket of every round.
            most = largest_on_any_rank(self._ranks, self._num_rounds)
            if self._num_rounds < most:
                failure = failure or self._try_to_allocate()
            while self._num_rounds < most:
                self._open_round()
                failure = self._send_rest() or failure
        self._executor.finish_copies(wait=True)
        rows_failure = self._finish_rows()
        return failure or rows_failure

    def catch_up(self) -> Exception | None:
        """Finish a step in which some rank `is_ahead`; return this rank's first error.

        Collective: all ranks call this after the agreement has told them.
        """
        self._compares_rounds, self.is_ahead = True, False
        return self.finish()

    def _try_to_allocate(self) -> Exception | None:
        """Take the memory for sums of several backwards, or return the error.

        After an error this rank still sends its rounds, which its peers wait for.
        """
        try:
            if self._accumulators is not None:
                self._accumulators.allocate()
        except Exception as error:
            return error
        return None

    def _finish_rows(self) -> Exception | None:
        """Average sparse gradients, unless the user has done so; return this rank's first error."""
        failure: Exception | None = None
        for state, gradients in zip(self._states, self.gradients, strict=True):
            try:
                gradients.reject_mixed(state)
            except ValueError as error:
                failure = failure or error
            if self._rows is None:
                gradients.accept_local_rows()
        if self._rows is not None:
            failure = self._rows.finish(self._states, self.gradients) or failure
        for state, gradients in zip(self._states, self.gradients, strict=True):
            if state.plan.location.is_host:
                gradients.copy_rows_to_host()
        return failure

    def has_late_gradients(self) -> bool:
        """Return whether the user set a `.grad` after its bucket was sent.

        Raises:
            ValueError: `.grad` was set, or emptied, though the parameter's gradient has left it.
        """
        if not self.streams:
            return False
        late = False
        for state in self._states[: self._next]:
            gradients = self.gradients[state.layout.index]
            expected: Sequence[torch.Tensor | None] = self._readers[state.layout.index].stand_ins
            left = gradients.dense.tolist()
            if not all(left):
                pairs = zip(expected, left, strict=True)
                expected = [stand_in if has_left else None for stand_in, has_left in pairs]
            # The usual case, without a loop in Python: every `.grad` is as this package left it.
            reader = self._readers[state.layout.index]
            if all(map(is_, map(_grad, state.parameters), expected)) and not reader.has_added:
                continue
            present = gradients.present
            for position, parameter in enumerate(state.parameters):
                if gradient_of(parameter) is not None:
                    if present[position]:
                        raise ValueError(
                            f"Parameter {state.names[position]!r} has a .grad at step(), but its "
                            "gradient has already left .grad in this step's backward. Modify "
                            "gradients in tensor hooks, or construct the optimizer without module= "
                            "to keep them in .grad."
                        )
                    late = True
                elif parameter.grad is None and left[position]:
                    raise ValueError(_EMPTIED.format(state.names[position]))
        return late

    def take_late_gradients(self) -> Exception | None:
        """Send all buckets again, with the gradients that the user set after their bucket was sent.

        Collective: all ranks call this if any rank has such gradients. Each is added to the sum of
        the gradients that other ranks sent before, or to zeros, which is exact in any dtype.
        """
        self._open_round()
        return self.finish()

    def reset(self) -> None:
        """Forget this step's gradients."""
        self._executor.drop_lost_copies()
        unfinished = self._next < len(self._states) and self.has_gradients
        if unfinished:
            # The backward may have raised on this rank alone: its peers wait for all buckets.
            self._send_rest()
        self._executor.finish_copies(wait=True)
        for reader in self._readers:
            reader.forget()
        self._stream_waits.forget_gradients()
        self._begun = self._hidden = False
        self.is_ahead = False
        self._next = 0
        self._num_rounds = 0
        if self._streamed is not None:
            self._streamed.forget()
        self.gradients = [BucketGradients(state) for state in self._states]
        if self._rows is not None:
            self._rows.forget()
        self._start_counting()

    def _start_counting(self) -> None:
        if self.streams:
            self._missing = [set(range(len(state.parameters))) for state in self._states]

    def _open_round(self) -> None:
        """Begin again with the first bucket; its gradients are added to the gradient shards."""
        self._num_rounds += 1
        self._next = 0
        self._start_counting()

    def _add_round(self, number: int, position: int) -> None:
        """Open another round for a gradient whose bucket was already sent in this one.

        Raises:
            ValueError: with `accumulate="error"`.
            HostMemoryError: host memory is short for the sums.
        """
        if self._accumulators is not None:
            self._accumulators.allocate()
        elif not self._plans_sums:
            name = self._states[number].names[position]
            raise ValueError(
                f"The gradient of parameter {name!r} has already been reduced in this step, and "
                "this backward produced another one. Run all but the last backward of a step "
                f"inside no_sync(), or construct the optimizer with accumulate={self._remedy!r}."
            )
        self.backward_ended()
        self._open_round()
        self.is_ahead = self._averages and not self._compares_rounds
        self._hide_from_backward()

    def _send_rest(self) -> Exception | None:
        """Send every bucket that was not sent yet, and return this rank's first error."""
        failure: Exception | None = None
        while self._next < len(self._states):
            try:
                self._send_next()
            except (TypeError, ValueError) as error:
                failure = failure or error
            # Wait for each bucket's copy in two cases. 1. The host adds a late gradient to its
            # shard, but a slot of a ring may be reused before the host has read it. 2. A gradient
            # that stays in `.grad` is in memory twice while a slot holds it, so fill one slot at a
            # time.
            late = self._num_rounds > 0 and not self._can_add
            self._executor.finish_copies(wait=late or not self.streams)
        return failure

    @property
    def _can_add(self) -> bool:
        """Whether there is memory for the sums of several backwards."""
        if self._accumulators is not None:
            return self._accumulators.are_allocated
        return self._plans_sums

    def _accumulator(self, number: int) -> torch.Tensor | None:
        """Return the accumulator of a bucket in a further round, None to use its shard."""
        if self._num_rounds == 0 or self._accumulators is None:
            return None
        return self._accumulators.tensors.get(number)

    @torch.no_grad()
    def _send_next(self) -> None:
        """Take the next bucket's gradients out of `.grad`, and start their reduction or copy."""
        if self.kept is not None:
            self.kept.before_gradients()
        number = self._next
        self._next = number + 1
        self._shows_stand_ins = self.streams
        state = self._states[number]
        self._wait_for_gradients(number)
        try:
            found = self._read(state)
        except (TypeError, ValueError):
            # Do not skip the bucket: peers wait for its collective, and the next user of its slot
            # waits for its event.
            if self._averages:
                self._start_reduction(state, [None] * len(state.parameters))
            elif state.plan.packs:
                self._transfer.skip_pack(state)
            raise
        gradients = self.gradients[number]
        gradients.add_rows(found)
        if self._streamed is not None and (found.dtypes or found.rows):
            self._streamed.gradients_moved()
        if self._averages:
            self._start_reduction(state, found.tensors)
        elif self._stays_local(state, found):
            gradients.add_local(found, target=state.planes.gradient_shard)
            self._executor.sum_local(number, gradients)
        else:
            self._copy_alone(state, found.tensors)
        # `read` leaves stand-ins only for the gradients of this round. Earlier rounds may have sent
        # gradients of other parameters.
        if self._num_rounds > 0:
            self._readers[number].show_stand_ins(
                [*np.flatnonzero(gradients.dense), *gradients.local_rows]
            )

    def _stays_local(self, state: BucketState, found: LocalGradients) -> bool:
        """Return whether gradients stay in autograd's tensors until their norm is computed.

        If there is a shard, the norm's pass copies them to it.
        """
        shard = state.planes.gradient_shard
        if shard is None:
            return self._accumulator(state.layout.index) is None
        is_same = self._num_rounds == 0 and found.dtypes == [shard.dtype]
        return is_same and state.plan.location is StateLocation.HOST

    def _note_stream(self, number: int, positions: Sequence[int], stream: Hashable) -> None:
        self._stream_waits.gradients_written(number, stream)
        if not self._missing[number].issuperset(positions):
            # A gradient arrived again: `take` adds it to the first one, on the current stream.
            self._wait_for_gradients(number)
            current = self._stream_waits.current_stream(self._states[number].device)
            self._stream_waits.gradients_written(number, current)

    def _wait_for_gradients(self, number: int) -> None:
        gradients = map(local_gradient_of, self._states[number].parameters)
        self._stream_waits.wait_for_gradients(number, gradients)

    def _read(self, state: BucketState) -> LocalGradients:
        found = None if self._rows is None else self._rows.take(state.layout.index)
        return found or self._readers[state.layout.index].read(keep=not self.streams)

    def _start_reduction(self, state: BucketState, gradients: list[torch.Tensor | None]) -> None:
        """Pack a bucket, zeros for missing gradients, and start to average it over the ranks."""
        number = state.layout.index
        present = np.array([gradient is not None for gradient in gradients], dtype=np.bool_)
        idle = self._rows is not None and self._rows.is_without_dense(state)
        self.gradients[number].mark_present(present)
        if state.layout.numel == 0 or idle:
            self._transfer.skip_pack(state)
            return
        copy = self._transfer.pack(
            state,
            gradients,
            self.gradients[number],
            adds=self._num_rounds > 0,
            accumulator=self._accumulator(number),
        )
        self._executor.start_copy(copy)

    def _copy_alone(self, state: BucketState, gradients: list[torch.Tensor | None]) -> None:
        """Copy (or add) this rank's segments of gradients that need no reduction."""
        given = self.gradients[state.layout.index]
        present = np.array([gradient is not None for gradient in gradients], dtype=np.bool_)
        # Packing writes zeros for missing gradients. In a later round they would be added to shard
        # segments that still hold the gradients of an earlier step.
        packs = state.plan.packs and self._num_rounds == 0
        if packs and present.any():
            copy: GradientCopy | None = self._transfer.pack(state, gradients, given, adds=False)
        else:
            accumulator = self._accumulator(state.layout.index)
            copy = self._transfer.take_segments(state, gradients, given, accumulator=accumulator)
        given.mark_present(present)
        if copy is not None:
            self._executor.start_copy(copy)
        elif packs:
            self._transfer.skip_pack(state)
