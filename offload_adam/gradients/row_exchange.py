"""Average sparse gradients over the ranks, by an all-gather of their entries."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from offload_adam.coordinator.ranks import RankGroup
from offload_adam.errors import RankDisagreementError
from offload_adam.gradients.reader import GradientReader, LocalGradients
from offload_adam.gradients.segments import BucketGradients
from offload_adam.gradients.sparse import GradientRows, width_of
from offload_adam.params.bucket import BucketState
from offload_adam.transfer.collectives import PendingCollective

_NONE, _DENSE, _NO_ENTRIES = 0, -1, 1
"""Codes of one rank's gradient of a parameter: none, dense, or 1 + n for n sparse entries."""


class RowExchange:
    """Gathers the entries of sparse gradients from all ranks. Dense gradients are reduced instead.

    First the ranks exchange the kind of each gradient: none, dense, or sparse with n entries.

    If gradients stay in `.grad` until the step, `read_ahead` reads all of them before the first
    bucket is reduced. Buckets in which no rank has a dense gradient are then not reduced: a large
    table with sparse gradients sends no zeros.

    Lifecycle: `read_ahead` and `finish` once per step, collective; `forget` after the step.
    """

    def __init__(self, ranks: RankGroup) -> None:
        self._ranks = ranks
        self._found: dict[int, LocalGradients] = {}
        self._kinds: npt.NDArray[np.int64] | None = None

    def read_ahead(
        self, states: Sequence[BucketState], readers: Sequence[GradientReader]
    ) -> Exception | None:
        """Read all gradients and exchange their kinds. Return this rank's first error."""
        failure: Exception | None = None
        kinds = _no_kinds(states)
        for state, reader in zip(states, readers, strict=True):
            try:
                found = reader.read(keep=True)
            except (TypeError, ValueError) as error:
                # Do not raise here: the other ranks wait in the exchange below.
                failure = failure or error
                found = LocalGradients([None] * len(state.names), [0] * len(state.names), [], {})
            self._found[state.layout.index] = found
            dense = np.array([tensor is not None for tensor in found.tensors], dtype=np.bool_)
            _note(kinds, state, dense, found.rows)
        self._kinds = self._exchange(kinds)
        return failure

    def take(self, bucket: int) -> LocalGradients | None:
        """Return and drop the gradients of this bucket from `read_ahead`, if any."""
        return self._found.pop(bucket, None)

    def is_without_dense(self, state: BucketState) -> bool:
        """Return whether `read_ahead` found no dense gradient of this bucket on any rank."""
        return self._kinds is not None and not (self._kinds[:, state.indices] == _DENSE).any()

    def finish(
        self, states: Sequence[BucketState], gradients: Sequence[BucketGradients]
    ) -> Exception | None:
        """Replace local sparse gradients by all ranks' entries, divided by the number of ranks.

        Returns:
            None, or an error, the same on every rank, if a parameter's gradients are sparse on some
            ranks and dense on others.
        """
        kinds = self._kinds
        if kinds is None:
            own = _no_kinds(states)
            for state, found in zip(states, gradients, strict=True):
                _note(own, state, found.dense, found.local_rows)
            kinds = self._exchange(own)
        mixed = _mixed(kinds, states, self._ranks)
        if mixed is not None:
            return mixed
        # All ranks have the same kinds, so all issue the same all-gathers in the same order.
        for state, found in zip(states, gradients, strict=True):
            for position in np.flatnonzero((kinds[:, state.indices] > _NONE).any(axis=0)).tolist():
                counts = np.maximum(kinds[:, state.indices[position]] - _NO_ENTRIES, 0)
                self._gather(state, found, position, counts)
        return None

    def forget(self) -> None:
        """Drop the gradients and kinds from `read_ahead`."""
        self._found.clear()
        self._kinds = None

    def _exchange(self, kinds: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return every rank's kinds, int64 (world_size, num_parameters), in rank order."""
        own = torch.from_numpy(kinds)
        return torch.stack(self._ranks.all_gather(own)).numpy()

    def _gather(
        self,
        state: BucketState,
        gradients: BucketGradients,
        position: int,
        counts: npt.NDArray[np.int64],
    ) -> None:
        """Gather the entries of one parameter; `counts` has the number of entries of each rank."""
        own = gradients.local_rows.pop(position, None) or _no_entries(state, position)
        # Divide in fp32: a 16-bit quotient would lose precision before the sum.
        values = own.values.float() / self._ranks.world_size
        entries = GradientRows(
            _all_entries(own.rows, counts, self._ranks),
            _all_entries(values, counts, self._ranks),
        )
        before = gradients.rows.get(position)
        gradients.rows[position] = entries if before is None else before.joined(entries)


def _no_kinds(states: Sequence[BucketState]) -> npt.NDArray[np.int64]:
    return np.zeros(sum(len(state.parameters) for state in states), dtype=np.int64)


def _note(
    kinds: npt.NDArray[np.int64],
    state: BucketState,
    dense: npt.NDArray[np.bool_],
    rows: dict[int, GradientRows],
) -> None:
    kinds[state.indices[dense]] = _DENSE
    for position, entries in rows.items():
        kinds[state.indices[position]] = _NO_ENTRIES + entries.rows.numel()


def _mixed(
    kinds: npt.NDArray[np.int64], states: Sequence[BucketState], ranks: RankGroup
) -> Exception | None:
    """Return the error for a parameter whose gradient is sparse on some ranks, dense on others."""
    mixed = (kinds == _DENSE).any(axis=0) & (kinds > _NONE).any(axis=0)
    for state in states:
        for position in np.flatnonzero(mixed[state.indices]).tolist():
            sparse = np.flatnonzero(kinds[:, state.indices[position]] > _NONE).tolist()
            return RankDisagreementError(
                f"The gradient of parameter {state.names[position]!r} is sparse on rank(s) "
                f"{ranks.to_global(sparse)} and dense on others. Use the layer in the same way on "
                "every rank."
            )
    return None


def _no_entries(state: BucketState, position: int) -> GradientRows:
    parameter = state.parameters[position]
    return GradientRows(
        torch.empty(0, dtype=torch.int64, device=state.device),
        torch.empty(0, width_of(parameter), dtype=parameter.dtype, device=state.device),
    )


def _all_entries(
    own: torch.Tensor, counts: npt.NDArray[np.int64], ranks: RankGroup
) -> torch.Tensor:
    """Return the concatenated entries of all ranks."""
    # An all-gather needs equal sizes: pad to the largest count and cut the padding off again.
    padded = own.new_zeros((int(counts.max()), *own.shape[1:]))
    padded[: own.shape[0]] = own
    gathered = [torch.empty_like(padded) for _ in counts]
    if padded.numel() > 0:
        group = ranks.data_group(own.device)
        work = dist.all_gather(gathered, padded, group=group, async_op=True)
        assert work is not None
        PendingCollective(work, padded, padded).wait(ranks)
    parts = [part[:count] for part, count in zip(gathered, counts.tolist(), strict=True)]
    return torch.cat(parts)
