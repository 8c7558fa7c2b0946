"""How an optimizer holds its state and takes its steps, whatever its formula."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata

import torch
import torch.distributed as dist

from offload_adam.coordinator.admission import Field
from offload_adam.coordinator.ranks import world_size_of
from offload_adam.layout.state_plan import StatePolicy
from offload_adam.options import (
    Dtype,
    ExecutionOptions,
    FailurePolicy,
    OffloadPolicy,
    check_options,
    check_policy,
    option,
    options_of,
)
from offload_adam.version import __version__


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution(ExecutionOptions):
    """How an optimizer holds its state and takes its steps, whatever its formula.

    replicated: state is stored with its parameter, whole on every rank; `module` then gives names
        only.
    takes_rows: gradients may be sparse.
    """

    state_dtype: torch.dtype = option(
        torch.float32, Dtype("float32", "fp32"), "The dtype of the state."
    )
    replicated: bool = False
    takes_rows: bool = False

    @property
    def streamed_module(self) -> torch.nn.Module | None:
        """The module whose gradients leave during backward, if any does."""
        return None if self.replicated else self.module

    def check(self) -> str:
        """Refuse what cannot be right, and return who averages gradients.

        Raises:
            TypeError, ValueError: naming the argument.
            RuntimeError: WORLD_SIZE > 1 and no process group is initialised.
        """
        check_options(self)
        check_policy("offload", self.offload, OffloadPolicy)
        check_policy("failures", self.failures, FailurePolicy)
        reduction = _resolve_reduction(self.gradient_reduction, self.module, self.process_group)
        _check_accumulate(self.accumulate, self.streamed_module, reduction)
        _check_overlap(self.overlap, self.offload.units, self.streamed_module)
        return reduction

    def state_policy(self, kind: str, world_size: int) -> StatePolicy:
        """Return what decides where state is stored.

        Args:
            kind: who averages gradients.
        """
        offload = self.offload
        return StatePolicy(
            world_size=world_size,
            bucket_nbytes=offload.bucket_nbytes,
            reduces=kind == "optimizer",
            accumulates=self.accumulate is not None,
            reduces_in_fp32=self.reduce_dtype is not None,
            replicated=self.replicated,
            offload_fraction=offload.offload_fraction,
            pins_state=offload.pin == "all",
            pins_staging=offload.pin != "none",
        )

    def overlaps(self, kind: str, on_device: bool) -> bool:
        """Tell whether updates run beside the next forward.

        Gradients that others have averaged stay in `.grad`, where the next backward may write: out
        of host memory they would be read too late.

        Args:
            kind: who averages gradients.
            on_device: all parameters are on a device.
        """
        if self.streamed_module is None or self.overlap is False:
            return False
        if self.overlap is None:
            return on_device
        if kind == "external" and not on_device:
            warnings.warn(
                "overlap=True has no effect where gradients in host memory are averaged by others: "
                "let this optimizer do it (gradient_reduction='optimizer')",
                RuntimeWarning,
                stacklevel=4,
            )
            return False
        return True

    def warn_without_effect(self, on_device: bool) -> None:
        """Warn where offload_fraction is given and no parameter's state could stay on a GPU.

        Args:
            on_device: some parameter is on a device.
        """
        fraction = self.offload.offload_fraction
        if fraction == 1.0:
            return
        if self.replicated or not on_device:
            why = "all of it stays there" if on_device else "no parameter is on one"
            warnings.warn(
                f"offload_fraction={fraction} has no effect: it says how much state "
                f"leaves the GPU, and {why}",
                UserWarning,
                stacklevel=4,
            )

    def patience(self) -> FailurePolicy:
        """Return when to give up on peers; the default where `check` rejects what was given."""
        try:
            check_policy("failures", self.failures, FailurePolicy)
        except (TypeError, ValueError):
            return FailurePolicy()
        return self.failures

    def fields(self, kind: str) -> list[Field]:
        """Return what must be the same on every rank; the versions are those that give its bits."""
        return [
            ("the version of offload_adam", __version__),
            ("the version of torch", str(torch.__version__)),
            ("the version of numba", metadata.version("numba")),
            ("gradient_reduction", kind),
            ("streaming", str(self.streamed_module is not None and kind == "optimizer")),
            ("replicated state", str(self.replicated)),
            *(
                (shared.name, str(getattr(options, shared.name)))
                for options in (self, self.offload)
                for shared in options_of(options)
                if shared.shared
            ),
        ]


def check_module(module: object) -> None:
    """Check that `module` is an nn.Module or None."""
    if module is not None and not isinstance(module, torch.nn.Module):
        raise TypeError(f"module must be a torch.nn.Module or None, not {module!r}")


def _resolve_reduction(
    kind: str | None, module: torch.nn.Module | None, process_group: dist.ProcessGroup | None
) -> str:
    """Return who averages the gradients over the ranks: "optimizer" or "external".

    Raises:
        ValueError: it is not possible, or must be given.
        RuntimeError: WORLD_SIZE > 1 and no process group is initialised.
    """
    world_size = world_size_of(process_group)
    has_ddp = module is not None and any(
        isinstance(part, torch.nn.parallel.DistributedDataParallel) for part in module.modules()
    )
    if kind == "optimizer" and has_ddp:
        raise ValueError(
            "gradient_reduction='optimizer' with a DistributedDataParallel module would take "
            "gradients away from DDP: pass 'external', or the module without DDP"
        )
    if kind is not None:
        return kind
    if module is None and world_size > 1:
        raise ValueError(
            "with more than one rank and no module=, gradient_reduction must be given: 'optimizer' "
            "if this optimizer is to average the gradients, 'external' if DDP or your own code has"
        )
    return "external" if has_ddp else "optimizer"


def _check_accumulate(accumulate: str | None, module: torch.nn.Module | None, kind: str) -> None:
    """Check that gradients leave during backward, where they are to be accumulated."""
    if accumulate is not None and (module is None or kind == "external"):
        raise ValueError(
            "accumulate='host' adds gradients that leave during backward: it needs module= and "
            "gradient_reduction='optimizer'. Without them .grad accumulates as always"
        )


def _check_overlap(
    overlap: bool | None,
    units: Sequence[torch.nn.Module] | None,
    module: torch.nn.Module | None,
) -> None:
    """Check that a model with hooks is given, where only its hooks can wait."""
    if module is None and (overlap or units is not None):
        name = "overlap=True" if overlap else "units="
        raise ValueError(
            f"{name} lets the parts of a model wait for their own parameters: it needs module= and "
            "state in host memory"
        )
    for unit in units or ():
        if not isinstance(unit, torch.nn.Module):
            raise TypeError(f"units must be modules of module=, not {unit!r}")
