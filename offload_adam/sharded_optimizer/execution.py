"""How an optimizer holds its state and takes its steps, whatever its formula."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata

import torch
import torch.distributed as dist

from offload_adam.coordinator.admission import Field
from offload_adam.coordinator.watchdog import DEAD_AFTER_S, STUCK_AFTER_S, Patience
from offload_adam.memory.pinning import Pin
from offload_adam.parameters.options import (
    check_accumulate,
    check_max_norm,
    check_options,
    check_overlap,
    check_room,
    resolve_reduction,
)
from offload_adam.version import __version__

DEFAULT_BUCKET_NBYTES = 32 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """How an optimizer holds its state and takes its steps, whatever its formula.

    Each field is the argument of the same name of `OffloadAdam`, but for two:

    beside: state lies beside its parameter, whole on every rank; `module` then gives names only.
    takes_rows: gradients may be sparse.
    """

    module: torch.nn.Module | None = None
    process_group: dist.ProcessGroup | None = None
    gradient_reduction: str | None = None
    reduce_dtype: torch.dtype | None = None
    bucket_nbytes: int = DEFAULT_BUCKET_NBYTES
    state_dtype: torch.dtype = torch.float32
    num_threads: int | None = None
    accumulate: str | None = None
    pin: Pin = "all"
    offload_fraction: float = 1.0
    dead_after: float = DEAD_AFTER_S
    stuck_after: float = STUCK_AFTER_S
    checkpoint_room_nbytes: int = 0
    allow_overcommit: bool = False
    max_grad_norm: float | None = None
    overlap: bool | None = None
    units: Sequence[torch.nn.Module] | None = None
    beside: bool = False
    takes_rows: bool = False

    @property
    def streamed_module(self) -> torch.nn.Module | None:
        """The module whose gradients leave during backward, if any does."""
        return None if self.beside else self.module

    def check(self) -> str:
        """Refuse what cannot be right, and return who averages gradients.

        Raises:
            TypeError, ValueError: naming the argument.
            RuntimeError: WORLD_SIZE > 1 and no process group is initialised.
        """
        check_options(
            self.reduce_dtype,
            self.state_dtype,
            self.bucket_nbytes,
            self.num_threads,
            self.accumulate,
            self.pin,
            self.offload_fraction,
        )
        check_room(self.checkpoint_room_nbytes)
        check_max_norm("max_grad_norm", self.max_grad_norm)
        Patience(self.dead_after, self.stuck_after)
        kind = resolve_reduction(self.gradient_reduction, self.module, self.process_group)
        check_accumulate(self.accumulate, self.streamed_module, kind)
        check_overlap(self.overlap, self.units, self.streamed_module)
        return kind

    def overlaps(self, kind: str, parameters: Iterable[torch.Tensor], *, offloads: bool) -> bool:
        """Tell whether updates run beside the next forward.

        Gradients that others have averaged stay in `.grad`, where the next backward may write: out
        of host memory they would be read too late.

        Args:
            kind: who averages gradients.
            offloads: parameters in host memory are treated as if they were on a device.
        """
        if self.streamed_module is None or self.overlap is False:
            return False
        on_device = all(parameter.is_cuda for parameter in parameters)
        if self.overlap is None:
            return on_device
        if kind == "external" and not (on_device or offloads):
            warnings.warn(
                "overlap=True has no effect where gradients in host memory are averaged by others: "
                "let this optimizer do it (gradient_reduction='optimizer')",
                RuntimeWarning,
                stacklevel=4,
            )
            return False
        return True

    def warn_without_effect(self, parameters: Iterable[torch.Tensor], *, offloads: bool) -> None:
        """Warn where offload_fraction is given and no parameter's state could stay on a GPU."""
        if self.offload_fraction == 1.0:
            return
        on_device = offloads or any(parameter.is_cuda for parameter in parameters)
        if self.beside or not on_device:
            why = "all of it stays there" if on_device else "no parameter is on one"
            warnings.warn(
                f"offload_fraction={self.offload_fraction} has no effect: it says how much state "
                f"leaves the GPU, and {why}",
                UserWarning,
                stacklevel=4,
            )

    def patience(self) -> Patience:
        """Return the patience with peers; the default's in place of one that `check` refuses."""
        try:
            return Patience(self.dead_after, self.stuck_after)
        except (TypeError, ValueError):
            return Patience()

    def fields(self, kind: str) -> list[Field]:
        """Return what must be the same on every rank; the versions are those that give its bits."""
        return [
            ("the version of offload_adam", __version__),
            ("the version of torch", str(torch.__version__)),
            ("the version of numba", metadata.version("numba")),
            ("gradient_reduction", kind),
            ("reduce_dtype", str(self.reduce_dtype)),
            ("bucket_nbytes", str(self.bucket_nbytes)),
            ("accumulate", str(self.accumulate)),
            ("max_grad_norm", str(self.max_grad_norm)),
            ("streaming", str(self.streamed_module is not None and kind == "optimizer")),
            ("state beside the parameters", str(self.beside)),
            ("offload_fraction", str(self.offload_fraction)),
        ]
