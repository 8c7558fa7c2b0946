"""An optimizer around its core: what of the core callers may see and ask for."""

from __future__ import annotations

import threading
import weakref
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Never, SupportsIndex

import torch

from offload_adam.coordinator.progress import PROGRESS
from offload_adam.coordinator.ranks import RankGroup
from offload_adam.sharded_optimizer.locking import serialized
from offload_adam.step.ledger import LedgerEntry
from offload_adam.step.parameter_shard import ParameterShard, shards_of
from offload_adam.step.read_gate import ReadGate
from offload_adam.step.sharded_adam import ShardedAdam


class CoreOptimizer(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` over a `ShardedAdam`, once that has been made.

    Lifecycle: `_core` is None before construction is over, and after `close`.
    Threads: calls of several threads run one after the other, each as a whole.
    """

    _core: ShardedAdam | None
    _module: torch.nn.Module | None
    _indices: dict[torch.nn.Parameter, int]
    _ranks: RankGroup
    _release: weakref.finalize[Any, Any]
    _lock: threading.RLock

    @abstractmethod
    def _check_group(self, group: dict[str, Any]) -> None:
        """Refuse a completed group's hyperparameters, naming the argument."""

    def __reduce_ex__(self, protocol: SupportsIndex) -> Never:
        """Refuse `copy.copy`, `copy.deepcopy` and pickling.

        Raises:
            TypeError: naming what copies and saves the state.
        """
        raise TypeError(
            f"{type(self).__name__} cannot be copied or pickled: it is tied to its model's "
            "parameters, hooks, process groups and memory of its own. Save full_state_dict() "
            "(whole, on rank 0), local_state_dict() (this rank's part) or a checkpoint "
            "(offload_adam.save_checkpoint), and load that into an optimizer that is made anew; "
            "copy the model without it"
        )

    @abstractmethod
    def _take_written_state(self, core: ShardedAdam) -> None:
        """Load tensors that users put into `optimizer.state`, and show the optimizer's own again.

        Raises:
            TypeError, ValueError: a value that cannot be state, or an entry that is gone.
        """

    def _further_state(self) -> dict[str, Any]:
        """Return what a saved state holds besides torch's entries."""
        return {}

    def _plan_further_state(
        self, further: Mapping[str, Any], entries: Mapping[int, Mapping[str, Any]]
    ) -> Callable[[], None]:
        """Check what `_further_state` saved, and return what loads it and cannot fail.

        Args:
            further: empty where another optimizer saved the state.
            entries: the saved state of each parameter, by index.
        """
        return lambda: None

    @serialized
    def synchronize(self) -> None:
        """Return when all parameters and all state hold the result of the last step.

        For whatever reads parameters in another way than through the model's forward or a state
        dict: on a device the current stream waits, so that what it is given from now on sees them.
        Collective where `step()` leaves updates running.

        Raises:
            Exception: what an update has raised beside this thread.
        """
        self._settled()

    def long_running(self, what: str) -> AbstractContextManager[None]:
        """Exempt the body from `stuck_after`, for example an evaluation on one rank alone.

        Args:
            what: name of the work, for error messages.
        """
        return PROGRESS.at(what, long_running=True)

    @serialized
    def refresh_master(self) -> None:
        """Let master weights follow parameters written through `.data` or NumPy.

        No version counter sees such writes. `step()` compares values, in later steps only a sample
        of them. Call this on every rank, after the same write on every rank.
        """
        with torch.no_grad():
            self._settled().outside_writes.follow_all()

    @property
    def num_steps(self) -> int:
        """Calls of `step()` so far, skipped ones included; set it where a saved run goes on."""
        return self._alive().num_steps

    @num_steps.setter
    def num_steps(self, num_steps: int) -> None:
        self._alive().num_steps = num_steps

    @property
    def host_nbytes(self) -> Mapping[str, int]:
        """Host bytes that this rank's optimizer holds, by what they are for."""
        return dict(self._alive().host_nbytes)

    @property
    def pinned_nbytes(self) -> int:
        """Host bytes that are page-locked, exactly; 0 where no parameter is on a GPU."""
        return self._alive().pinned_nbytes

    @property
    def ranks(self) -> RankGroup:
        """The ranks that share this optimizer."""
        return self._ranks

    @property
    def is_sharded(self) -> bool:
        """Whether each rank holds a part of the state, or all of it."""
        return self._alive().is_sharded

    def holds(self, parameter: torch.nn.Parameter) -> bool:
        """Tell whether this optimizer, not closed yet, has state for this parameter."""
        return self._release.alive and parameter in self._indices

    def shards(self) -> Iterator[ParameterShard]:
        """Yield this rank's range of every trained parameter and its state."""
        for state in self._settled().states:
            yield from shards_of(state)

    @property
    def is_being_read(self) -> bool:
        """Whether a checkpoint is being written in the background, or waits to be committed."""
        return self._alive().gate.is_open

    @property
    def checkpoint_rooms(self) -> Sequence[torch.Tensor]:
        """Host memory for what a checkpoint in the background copies, uint8."""
        return self._alive().gate.rooms

    @serialized
    def begin_reading(self, buckets: Iterable[int]) -> ReadGate:
        """Keep updates off buckets that a thread is about to read, and return who lets them go."""
        return self._alive().outside_writes.begin_reading(buckets)

    @serialized
    def finish_reading(self) -> None:
        """Return when no thread reads the state any more: it is about to be written."""
        self._alive().outside_writes.finish_reading()

    def memory_ledger(self) -> list[LedgerEntry]:
        """Return who holds which bytes of this rank now, on the host and on devices."""
        return self._alive().ledger()

    def _share(self) -> tuple[int, int]:
        """Return this rank's place among those that the state is divided over."""
        return self._alive().share

    def _settled(self) -> ShardedAdam:
        """Return the core, when nothing of it is under way."""
        core = self._alive()
        core.synchronize()
        self._take_written_state(core)
        return core

    def _alive(self) -> ShardedAdam:
        """Return the core of an optimizer that has not been closed."""
        if self._core is None or not self._release.alive:
            raise RuntimeError("this optimizer has been closed: make a new one to go on training")
        return self._core
