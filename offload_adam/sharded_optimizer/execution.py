"""Check an optimizer's options, and decide from them once how it runs."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from importlib import metadata
from typing import NamedTuple

import torch

from offload_adam.coordinator.admission import Field
from offload_adam.coordinator.ranks import world_size_of
from offload_adam.layout.state_plan import StatePolicy
from offload_adam.options import (
    ExecutionOptions,
    FailurePolicy,
    OffloadPolicy,
    check_options,
    check_policy,
    options_of,
    resolve_overlap,
)
from offload_adam.version import __version__


class Execution(NamedTuple):
    """How an optimizer stores its state and takes its steps.

    policy: decides where each bucket's state is stored. `policy.reduces` is the resolved
        `gradient_reduction`: True for "optimizer", False for "external".
    streams: gradients leave `.grad` during backward.
    overlaps: updates run while the next forward does.
    """

    policy: StatePolicy
    streams: bool
    overlaps: bool


def decide_execution(
    options: ExecutionOptions, *, replicated: bool = False, on_device: Sequence[bool]
) -> Execution:
    """Check the options, and decide how the optimizer runs.

    Args:
        replicated: state is stored with its parameter, whole on every rank; `module` then gives
            names only.
        on_device: for each parameter, whether it is on a device.

    Raises:
        TypeError, ValueError: naming the option.
        RuntimeError: WORLD_SIZE > 1 and no process group is initialised.
    """
    check_options(options)
    check_policy("offload", options.offload, OffloadPolicy)
    check_policy("failures", options.failures, FailurePolicy)
    world_size = world_size_of(options.process_group)
    reduces = _resolve_reduction(options, world_size) == "optimizer"
    hooked = options.module is not None and not replicated
    streams = hooked and reduces
    _check_needs_of_hooks(options, hooked=hooked, streams=streams)
    policy = StatePolicy.from_options(
        options.offload,
        world_size=world_size,
        reduces=reduces,
        accumulates=options.accumulate is not None,
        reduces_in_fp32=options.reduce_dtype is not None,
        streams=streams,
        replicated=replicated,
    )
    _warn_of_fraction_without_effect(policy, any(on_device))
    overlaps = resolve_overlap(
        options.overlap, hooked=hooked, reduces=reduces, on_device=all(on_device)
    )
    if options.overlap and not overlaps:
        warnings.warn(
            "overlap=True has no effect where gradients in host memory are averaged by others: "
            "let this optimizer do it (gradient_reduction='optimizer')",
            RuntimeWarning,
            stacklevel=4,
        )
    return Execution(policy, streams, overlaps)


def shared_fields(options: ExecutionOptions, execution: Execution) -> list[Field]:
    """Return what must be equal on all ranks; the bits of a step depend on the versions, too."""
    return [
        ("the version of offload_adam", __version__),
        ("the version of torch", str(torch.__version__)),
        ("the version of numba", metadata.version("numba")),
        ("gradient_reduction", "optimizer" if execution.policy.reduces else "external"),
        ("streaming", str(execution.streams)),
        ("replicated state", str(execution.policy.replicated)),
        *(
            (shared.name, str(getattr(declaring, shared.name)))
            for declaring in (options, options.offload)
            for shared in options_of(declaring)
            if shared.shared
        ),
    ]


def usable_failures(failures: object) -> FailurePolicy:
    """Return `failures` if it is valid, else the default; `decide_execution` rejects it later.

    Ranks must have met before they can reject an argument together.
    """
    try:
        check_policy("failures", failures, FailurePolicy)
    except (TypeError, ValueError):
        return FailurePolicy()
    assert isinstance(failures, FailurePolicy)
    return failures


def check_module(module: object) -> None:
    """Check that `module` is an nn.Module or None."""
    if module is not None and not isinstance(module, torch.nn.Module):
        raise TypeError(f"module must be a torch.nn.Module or None, not {module!r}")


def _resolve_reduction(options: ExecutionOptions, world_size: int) -> str:
    """Return who averages the gradients over the ranks: "optimizer" or "external".

    Raises:
        ValueError: the given one conflicts with DDP, or one must be given.
    """
    given, module = options.gradient_reduction, options.module
    has_ddp = module is not None and any(
        isinstance(part, torch.nn.parallel.DistributedDataParallel) for part in module.modules()
    )
    if given == "optimizer" and has_ddp:
        raise ValueError(
            "gradient_reduction='optimizer' with a DistributedDataParallel module would take "
            "gradients away from DDP: pass 'external', or the module without DDP"
        )
    if given is not None:
        return given
    if module is None and world_size > 1:
        raise ValueError(
            "with more than one rank and no module=, gradient_reduction must be given: 'optimizer' "
            "if this optimizer is to average the gradients, 'external' if DDP or your own code has"
        )
    return "external" if has_ddp else "optimizer"


def _check_needs_of_hooks(options: ExecutionOptions, *, hooked: bool, streams: bool) -> None:
    """Check that a model has hooks where an option relies on them.

    Args:
        hooked: the forward of `module` may wait for its parameters.
        streams: gradients leave `.grad` during backward.
    """
    if options.accumulate is not None and not streams:
        raise ValueError(
            "accumulate='host' adds gradients that leave during backward: it needs module= and "
            "gradient_reduction='optimizer'. Without them .grad accumulates as always"
        )
    units = options.offload.units
    if not hooked and (options.overlap or units is not None):
        name = "overlap=True" if options.overlap else "units="
        raise ValueError(
            f"{name} lets the parts of a model wait for their own parameters: it needs module= and "
            "state in host memory"
        )
    for unit in units or ():
        if not isinstance(unit, torch.nn.Module):
            raise TypeError(f"units must be modules of module=, not {unit!r}")


def _warn_of_fraction_without_effect(policy: StatePolicy, on_device: bool) -> None:
    """Warn where offload_fraction is given and no parameter's state could stay on a GPU.

    Args:
        on_device: some parameter is on a device.
    """
    if policy.offload_fraction < 1.0 and (policy.replicated or not on_device):
        why = "all of it stays there" if on_device else "no parameter is on one"
        warnings.warn(
            f"offload_fraction={policy.offload_fraction} has no effect: it says how much state "
            f"leaves the GPU, and {why}",
            UserWarning,
            stacklevel=5,
        )
