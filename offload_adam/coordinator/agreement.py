"""The one small all-reduce of a step: norm, finiteness, presence, and errors of any rank.

The float64 message is a table with one row for each rank, and one number for each parameter:

    rank 0   squares  non_finite  found_inf  ...  ahead  unfrozen   filled by rank 0, else 0
    rank 1   squares  non_finite  found_inf  ...  ahead  unfrozen   filled by rank 1, else 0
    counts   present[0]  present[1]  ...                            1 from each rank with a gradient
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from offload_adam.coordinator.ranks import RankGroup

(
    _SQUARES,
    _NON_FINITE,
    _FOUND_INF,
    _GRAD_SCALE,
    _CHANGES,
    _FAILED,
    _LATE,
    _SETTINGS,
    _STEP,
    _STOP,
    _SAVED,
    _UNSEEN,
    _AHEAD,
    _UNFROZEN,
) = range(14)
_NUM_FINDINGS = 14


@dataclass(frozen=True, slots=True)
class Notice:
    """Requests and reports that do not concern the gradients of a step.

    stop: the training loop asks to end after this step. All ranks end if any rank asks for it.
    saved: number of background checkpoints that this rank has written, failed ones included. The
        agreement has the smallest number of any rank.
    """

    stop: bool = False
    saved: int = 0


@dataclass(frozen=True, slots=True)
class Findings:
    """What one rank contributes to the agreement on a step.

    sum_of_squares: of this rank's shard of the reduced gradients, before unscaling.
    non_finite: this rank's shard holds a NaN or an infinity.
    found_inf: as set by a GradScaler; any value but 0 skips the step.
    grad_scale: as set by a GradScaler, 1 without one.
    changes: checksum below 2**53 of the parameters modified outside the optimizer, 0 for none.
    unseen: parameters differ from their masters, but no version counter changed.
    failed: this rank raises an error after the all-reduce.
    late: gradients were set by hand after their bucket's reduction had started.
    ahead: this rank has reduced several backwards, and other ranks may have reduced fewer. Its sum
        of squares is not known yet.
    unfrozen: a parameter without state, frozen so far, has a gradient.
    settings: checksum below 2**53 of this rank's hyperparameters.
    step: the number of this step, from 1 on.
    present: (num_parameters,) bool, which parameters have a gradient on this rank.
    """

    sum_of_squares: float
    non_finite: bool
    found_inf: float
    grad_scale: float
    changes: int
    unseen: bool
    failed: bool
    late: bool
    ahead: bool
    unfrozen: bool
    settings: int
    step: int
    notice: Notice
    present: torch.Tensor


@dataclass(frozen=True, slots=True)
class Agreement:
    """Result of `agree`, identical on all ranks: the fields of `Findings`, combined over the ranks.

    A bool is True if any rank's is. A tuple has one value for each rank, in rank order.

    sum_of_squares: over all ranks, NaN if `non_finite`.
    failed_ranks: the ranks that raise an error after the all-reduce.
    present_counts: (num_parameters,) int64, on how many ranks each parameter has a gradient.
    """

    sum_of_squares: float
    non_finite: bool
    found_inf: bool
    grad_scales: tuple[float, ...]
    changes: tuple[int, ...]
    unseen: bool
    failed_ranks: tuple[int, ...]
    late: bool
    ahead: bool
    unfrozen: bool
    settings: tuple[int, ...]
    steps: tuple[int, ...]
    notice: Notice
    present_counts: torch.Tensor


def agree(ranks: RankGroup, findings: Findings) -> Agreement:
    """Exchange findings in one all-reduce: 14 float64 per rank and 1 per parameter. Collective."""
    world_size = ranks.world_size
    message = torch.zeros(
        world_size * _NUM_FINDINGS + findings.present.numel(), dtype=torch.float64, device="cpu"
    )
    # Each rank adds to rows of zeros, so the all-reduce changes no value. `_read` then sums over
    # ranks in rank order, and the result does not depend on the collective's order of additions.
    # Checksums and counters are integers below 2**53, which float64 holds exactly.
    table = message[: world_size * _NUM_FINDINGS].view(world_size, _NUM_FINDINGS)
    own = [0.0] * _NUM_FINDINGS
    # If any rank is non-finite, `_read` ignores all sums, so no NaN or infinity need be sent.
    own[_SQUARES] = 0.0 if findings.non_finite else findings.sum_of_squares
    own[_NON_FINITE] = float(findings.non_finite)
    own[_FOUND_INF] = float(findings.found_inf != 0.0)
    own[_GRAD_SCALE] = findings.grad_scale
    own[_CHANGES] = float(findings.changes)
    own[_UNSEEN] = float(findings.unseen)
    own[_FAILED] = float(findings.failed)
    own[_LATE] = float(findings.late)
    own[_AHEAD] = float(findings.ahead)
    own[_UNFROZEN] = float(findings.unfrozen)
    own[_SETTINGS] = float(findings.settings)
    own[_STEP] = float(findings.step)
    own[_STOP] = float(findings.notice.stop)
    own[_SAVED] = float(findings.notice.saved)
    table[ranks.rank] = torch.tensor(own, dtype=torch.float64, device="cpu")
    message[world_size * _NUM_FINDINGS :] = findings.present
    ranks.all_reduce(message)
    return _read(table, message[world_size * _NUM_FINDINGS :])


def _read(table: torch.Tensor, present: torch.Tensor) -> Agreement:
    """Return the agreement from the reduced table (world_size, 14)."""
    rows = table.tolist()
    non_finite = any(row[_NON_FINITE] for row in rows)
    return Agreement(
        sum_of_squares=float("nan") if non_finite else sum(row[_SQUARES] for row in rows),
        non_finite=non_finite,
        found_inf=any(row[_FOUND_INF] for row in rows),
        grad_scales=tuple(row[_GRAD_SCALE] for row in rows),
        changes=tuple(int(row[_CHANGES]) for row in rows),
        unseen=any(row[_UNSEEN] for row in rows),
        failed_ranks=tuple(rank for rank, row in enumerate(rows) if row[_FAILED]),
        late=any(row[_LATE] for row in rows),
        ahead=any(row[_AHEAD] for row in rows),
        unfrozen=any(row[_UNFROZEN] for row in rows),
        settings=tuple(int(row[_SETTINGS]) for row in rows),
        steps=tuple(int(row[_STEP]) for row in rows),
        notice=Notice(
            stop=any(row[_STOP] for row in rows), saved=min(int(row[_SAVED]) for row in rows)
        ),
        present_counts=present.to(torch.int64),
    )


def flags_on_any_rank(ranks: RankGroup, flags: torch.Tensor) -> torch.Tensor:
    """Return the elementwise OR of a bool tensor over all ranks. Collective."""
    counts = flags.to(torch.int32)
    ranks.all_reduce(counts)
    return counts > 0


def largest_on_any_rank(ranks: RankGroup, value: int) -> int:
    """Return the largest of all ranks' values. Collective."""
    largest = torch.tensor([value], dtype=torch.int64, device="cpu")
    ranks.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)
