"""Check an optimizer's options and decide from them how it stores state and takes its steps."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata
from typing import NamedTuple

import torch

from offload_adam.coordinator.rank_checks import Field
from offload_adam.coordinator.ranks import world_size_of
from offload_adam.errors import warn_user
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
from offload_adam.params.local_shard import ShardedModel
from offload_adam.params.selection import NewParameter
from offload_adam.printable import show
from offload_adam.sharded_optimizer.ddp import averaged_by_ddp
from offload_adam.version import __version__


class Execution(NamedTuple):
    """How an optimizer stores its state and takes its steps.

    policy: decides where each bucket's state is stored. `policy.reduces` is the resolved
        `gradient_reduction`: True for "optimizer", False for "external".
    streams: gradients are moved out of `.grad` during backward.
    overlaps: updates run during the next forward.
    """

    policy: StatePolicy
    streams: bool
    overlaps: bool

    @property
    def is_external(self) -> bool:
        """Whether DDP or the caller averages whole gradients over several ranks."""
        policy = self.policy
        return not (policy.reduces or policy.sharded) and policy.world_size > 1

    @property
    def conflicts_with_ddp(self) -> bool:
        """Whether a `DistributedDataParallel` over the parameters needs another execution."""
        # DDP reads gradients from `.grad` even if there is only one rank.
        return (self.policy.averages or self.streams) and not self.policy.sharded


def checked_options(options: ExecutionOptions) -> ExecutionOptions:
    """Check the options and those of both policies, and return them with plain numbers.

    Raises:
        TypeError, ValueError: an option is wrong; the message names it.
    """
    checked: ExecutionOptions = replace(
        check_options(options),
        offload=check_policy("offload", options.offload, OffloadPolicy),
        failures=check_policy("failures", options.failures, FailurePolicy),
    )
    return checked


def decide_execution(
    options: ExecutionOptions,
    *,
    replicated: bool = False,
    sharded: ShardedModel | None = None,
    parameters: Sequence[torch.nn.Parameter] = (),
    on_device: Sequence[bool],
) -> Execution:
    """Decide how the optimizer runs, and reject options that do not fit together.

    Args:
        options: from `checked_options`.
        replicated: state is stored with its parameter, whole on every rank. `module` is then used
            only for the names of parameters, not for hooks.
        sharded: FSDP2 or tensor parallelism has sharded some parameters, and reduces gradients.
            None if neither has.
        parameters: all parameters, to look for a DDP module that averages their gradients.
        on_device: for each parameter, whether it is on a device.

    Raises:
        TypeError, ValueError: the message names the option.
        RuntimeError: WORLD_SIZE > 1 and no process group is initialised.
    """
    world_size = world_size_of(options.process_group)
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    hooked = options.module is not None and not replicated
    # With one rank and gradients in `.grad`, it does not matter whether DDP averages them.
    searches = world_size > 1 or hooked
    can_wait = sharded is None or sharded.can_wait
    if sharded is not None:
        _check_sharded(options, replicated=replicated)
        reduces = False
    else:
        reduces = _resolve_reduction(options, trained, searches=searches) == "optimizer"
    streams = hooked and (reduces or (sharded is not None and can_wait))
    _check_needs_of_hooks(options, hooked=hooked, streams=streams)
    if options.offload.keep != "none" and any(on_device):
        why = f"keep={options.offload.keep!r} keeps only state in host memory"
        _reject_device_state(options, why, "or keep='none'", replicated=replicated)
    if options.state_format != "fp32" and any(on_device):
        why = (
            f"state_format={options.state_format!r} needs state in host memory, where the kernels "
            "update it"
        )
        _reject_device_state(options, why, "or state_format='fp32'", replicated=replicated)
    policy = StatePolicy.from_options(
        options.offload,
        world_size=world_size,
        reduces=reduces,
        accumulates=options.accumulate == "host",
        accumulates_later=options.accumulate in ("auto", None) and streams,
        reduces_in_fp32=options.reduce_dtype is not None,
        streams=streams,
        replicated=replicated,
        sharded=sharded is not None,
    )
    _warn_of_fraction_without_effect(policy, any(on_device))
    overlaps = resolve_overlap(
        options.overlap,
        hooked=hooked and can_wait,
        reduces=streams,
        on_device=all(on_device) or (sharded is not None and sharded.computes_on_device),
    )
    if hooked and not can_wait:
        warn_user(
            f"step() waits for all updates, because torch {torch.__version__} has another FSDP2, "
            "in which nothing can wait before parameters are gathered. Install torch 2.11 or 2.13."
        )
    elif options.overlap and not overlaps:
        warn_user(
            "overlap=True has no effect, because DDP or the caller averages gradients in host "
            "memory. Pass gradient_reduction='optimizer' to let the optimizer average them."
        )
    return Execution(policy, streams, overlaps)


def shared_fields(options: ExecutionOptions, execution: Execution) -> list[Field]:
    """Return the fields that must be equal on all ranks, as (description, value)."""
    # Another version of a library may compute other bits, so that the weights of the ranks diverge.
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
    """Return `failures` with plain numbers if it is valid, else the default.

    The ranks need a valid policy to connect, which they do before they check arguments, so that a
    wrong argument raises on all ranks. `checked_options` then rejects the invalid policy.
    """
    try:
        valid: FailurePolicy = check_policy("failures", failures, FailurePolicy)
    except (TypeError, ValueError):
        return FailurePolicy()
    return valid


def check_module(module: object) -> None:
    """Check that `module` is an nn.Module or None."""
    if module is not None and not isinstance(module, torch.nn.Module):
        raise TypeError(f"module must be a torch.nn.Module or None, not {show(module)}")


def _resolve_reduction(
    options: ExecutionOptions, trained: Sequence[torch.nn.Parameter], *, searches: bool
) -> str:
    """Return who averages the gradients over the ranks: "optimizer" or "external".

    Args:
        searches: look for a DDP module that `module` does not contain.

    Raises:
        ValueError: `gradient_reduction` conflicts with DDP, or DDP averages only some gradients.
    """
    given, module = options.gradient_reduction, options.module
    has_ddp = module is not None and any(
        isinstance(part, torch.nn.parallel.DistributedDataParallel) for part in module.modules()
    )
    if given == "optimizer" and has_ddp:
        raise ValueError(
            "gradient_reduction='optimizer' does not work with a DistributedDataParallel module, "
            "because DDP averages the gradients. Pass 'external', or the module without DDP."
        )
    if given is not None:
        return given
    if not has_ddp and searches:
        has_ddp = averaged_by_ddp(trained)
    return "external" if has_ddp else "optimizer"


def _check_sharded(options: ExecutionOptions, *, replicated: bool) -> None:
    """Reject options that do not apply to parameters that are sharded already."""
    if replicated:
        raise ValueError(
            "Sharded parameters (DTensors) need use_offload=True, or OffloadAdam: each rank then "
            "keeps the state of its own parts in host memory."
        )
    if options.gradient_reduction == "optimizer":
        raise ValueError(
            "gradient_reduction='optimizer' does not work with sharded parameters, because FSDP2 "
            "averages their gradients. Leave gradient_reduction out."
        )
    if options.reduce_dtype is not None:
        raise ValueError(
            "reduce_dtype has no effect on sharded parameters, because FSDP2 averages their "
            "gradients. Pass MixedPrecisionPolicy(reduce_dtype=...) to fully_shard() instead."
        )


def _check_needs_of_hooks(options: ExecutionOptions, *, hooked: bool, streams: bool) -> None:
    """Reject options that need hooks on the model if it has none.

    Args:
        hooked: hooks on the forward of `module` can wait for its parameters.
        streams: gradients are moved out of `.grad` during backward.
    """
    if options.accumulate in ("host", "error") and not streams:
        raise ValueError(
            f"accumulate={options.accumulate!r} needs module= and gradient_reduction='optimizer', "
            "because it applies to gradients that are moved out of .grad during backward. Pass "
            "both (and use_offload=True to Adam), or leave accumulate out: gradients then "
            "accumulate in .grad."
        )
    units = options.offload.units
    if not hooked and (options.overlap or units is not None):
        name = "overlap=True" if options.overlap else "units="
        raise ValueError(
            f"{name} needs module= and state in host memory, because the model's forward waits for "
            "updates there. Pass module=model (and use_offload=True to Adam), or leave "
            f"{name.rstrip('=')} out."
        )
    for unit in units or ():
        if not isinstance(unit, torch.nn.Module):
            raise TypeError(f"units must be submodules of module=, not {show(unit)}")


def _reject_device_state(
    options: ExecutionOptions, why: str, otherwise: str, *, replicated: bool
) -> None:
    """Reject options that would store state on a device.

    Args:
        why, otherwise: parts of the error message: the reason, and another remedy.

    Raises:
        ValueError: the message has the option to change.
    """
    if replicated or options.offload.offload_fraction < 1.0:
        remedy = "use_offload=True" if replicated else "offload_fraction=1"
        raise ValueError(f"{why}. Pass {remedy}, {otherwise}.")


def check_keeps(offload: OffloadPolicy, is_deferred: bool) -> None:
    """Reject options that do not go with state that outlives the process.

    Raises:
        ValueError: the message names the option.
    """
    if offload.keep_path is None:
        raise ValueError(
            f"keep={offload.keep!r} needs keep_path=, a folder of this run, such as "
            "'/dev/shm/my-run' for 'shared' and '/tmp/my-run' for 'keeper'."
        )
    if is_deferred:
        raise ValueError(
            f"keep={offload.keep!r} needs the state at construction. Construct the optimizer after "
            "the model is sharded, without defer=True, or pass keep='none'."
        )
    from offload_adam.kernels.adam_ir import supports_ir  # with Numba, which is slow to import

    if not supports_ir():
        raise ValueError(
            f"keep={offload.keep!r} needs x86-64 or AArch64, not {platform.machine()}: other "
            "kernels write no undo log. Pass keep='none'."
        )


def reject_not_keepable(new: Sequence[NewParameter]) -> None:
    """Reject parameters whose step a later process could not complete.

    Raises:
        ValueError: the message names a parameter.
    """
    for item in new:
        if item.shard is not None and item.shard.is_distinct:
            what = "groups with replicas='distinct', whose gradients are decided on each rank"
        elif item.centralized:
            what = "grad_centralization, which prepares gradients in memory that is not kept"
        else:
            continue
        raise ValueError(
            f"Kept state does not support {what}. Parameter {item.name!r} is in such a group. "
            "Leave one of them out."
        )


def _warn_of_fraction_without_effect(policy: StatePolicy, on_device: bool) -> None:
    """Warn if `offload_fraction` is below 1 but cannot have an effect.

    Args:
        on_device: some parameter is on a device.
    """
    if policy.offload_fraction < 1.0 and (policy.replicated or not on_device):
        why = "all state stays on the GPU" if on_device else "no parameter is on a GPU"
        warn_user(
            f"offload_fraction={policy.offload_fraction} has no effect, because {why}. Leave it "
            "out of OffloadPolicy."
        )
