"""What is kept with each step besides the state: options of groups, buffers, the loop's values."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from offload_adam.coordinator.rank_checks import raise_on_all_ranks
from offload_adam.encoding import decode, encode
from offload_adam.fsdp_private import is_dtensor
from offload_adam.kept.budget import payload_nbytes
from offload_adam.kept.record import pack, unpack
from offload_adam.params.groups import FIXED_OPTIONS, LOCAL_OPTIONS
from offload_adam.printable import show
from offload_adam.step.kept_steps import DecidedStep
from offload_adam.step.messages import StepReport
from offload_adam.step.resume import complete_last_step
from offload_adam.step.step import ShardedAdam

if TYPE_CHECKING:
    from offload_adam.sharded_optimizer.optimizer import ShardedOptimizer

logger = logging.getLogger(__name__)

MAX_BUFFERS_NBYTES = 64 * 1024 * 1024
"""Limit of the buffers of a model: all of them are copied in each step."""


class ResumedStep(NamedTuple):
    """The step that an earlier process decided last, and that the constructor has completed.

    step: its number, from 1 on, skipped steps included. The next one is `step + 1`.
    extra: `optimizer.kept_extra` as it was when `step()` began.
    report: the step's outcome, also in `optimizer.last_step`; without timings.
    """

    step: int
    extra: dict[str, Any]
    report: StepReport


class KeptValues:
    """Packs these values for the record of a step, and restores them.

    Of the model, these are its persistent buffers and the results of `get_extra_state`.

    Args:
        module: the model; None if the optimizer was constructed without it. Nothing of it is kept
            then.

    Raises:
        ValueError: the buffers are too large, or one is a DTensor. The message names it.
    """

    def __init__(self, module: nn.Module | None) -> None:
        self._owners = {} if module is None else dict(_buffer_owners(module))
        self._with_extra = {
            name: part
            for name, part in ([] if module is None else module.named_modules())
            if type(part).get_extra_state is not nn.Module.get_extra_state
        }
        self._module = module
        self._num_packed = 0
        buffers = dict(self._buffers())
        self._kinds = {name: _kind(buffer) for name, buffer in buffers.items()}
        nbytes = sum(buffer.nbytes for buffer in buffers.values())
        if nbytes > MAX_BUFFERS_NBYTES:
            largest = max(buffers, key=lambda name: buffers[name].nbytes)
            raise ValueError(
                f"Kept state has a copy of the persistent buffers in each step, but they "
                f"have {nbytes:,} bytes, more than {MAX_BUFFERS_NBYTES:,}. The largest is "
                f"{largest!r}. Register buffers that never change with persistent=False."
            )
        for name, buffer in buffers.items():
            expanded = 0 in buffer.stride() and buffer.numel() > 1
            if is_dtensor(buffer) or expanded:
                what = "is expanded: clone it" if expanded else "is a DTensor"
                raise ValueError(
                    f"Kept state does not support the buffer {name!r}, which {what}. Or "
                    "register it with persistent=False, or pass keep='none'."
                )
        self.buffers_nbytes = nbytes

    @property
    def max_nbytes(self) -> int:
        """The most bytes of a result of `pack`."""
        return payload_nbytes(self.buffers_nbytes)

    def _buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, owner in self._owners.items():
            # Looked up in each step: modules may put another tensor in the place of a buffer.
            buffer = getattr(owner, name.rpartition(".")[2])
            if buffer is not None:
                yield name, buffer

    def pack(self, optimizer: ShardedOptimizer) -> bytes:
        """Return the values as they are now. If buffers are on a GPU, this waits for the forward.

        Raises:
            CheckpointError, TypeError: a value cannot be kept; the message names it.
            ValueError: the values are too large, or a buffer is not what it was at construction.
        """
        if not isinstance(optimizer.kept_extra, dict):
            raise TypeError(f"kept_extra must be a dict, not {show(optimizer.kept_extra)}")
        buffers = dict(self._buffers())
        self._check_buffers(buffers)
        options = [
            {key: value for key, value in group.items() if key not in LOCAL_OPTIONS}
            for group in optimizer.param_groups
        ]
        values = {
            "groups": encode(options, "param_groups"),
            "further": encode(optimizer._further_state(), "the optimizer's state"),
            "skipped_steps": optimizer.skipped_steps,
            "extra": encode(dict(optimizer.kept_extra), "kept_extra"),
            "extra_states": {
                name: encode(part.get_extra_state(), f"get_extra_state() of {name!r}")
                for name, part in self._with_extra.items()
            },
        }
        content = pack(
            values, {name: _bytes_of(buffer).numpy() for name, buffer in buffers.items()}
        )
        if len(content) > self.max_nbytes:
            raise ValueError(
                f"kept_extra, options of param_groups, buffers and extra states of modules have "
                f"{len(content):,} bytes together, more than the {self.max_nbytes:,} that are kept "
                "with a step. Make kept_extra smaller."
            )
        return content

    def _check_buffers(self, buffers: Mapping[str, torch.Tensor]) -> None:
        """Check that the model has the buffers that it had at construction.

        Raises:
            ValueError: the message names a buffer.
        """
        self._num_packed += 1
        found = {name: _kind(buffer) for name, buffer in buffers.items()}
        if self._num_packed == 1 and self._module is not None:  # some are made by the first forward
            found |= {name: found.get(name, "new") for name, _ in _buffer_owners(self._module)}
        if found != self._kinds:
            name = min(k for k in {*found, *self._kinds} if found.get(k) != self._kinds.get(k))
            raise ValueError(
                f"Buffer {name!r} was {self._kinds.get(name, 'absent')} at construction and is "
                f"{found.get(name, 'absent')} now, but with kept state a model must have the same "
                "persistent buffers. Run a forward before you construct the optimizer, or register "
                "it with persistent=False."
            )

    @property
    def identity(self) -> str:
        """Describes what is restored: only a model with the same can resume."""
        return f"{self._kinds} {sorted(self._with_extra)}"

    def resume(self, optimizer: ShardedOptimizer, core: ShardedAdam) -> ResumedStep | None:
        """Complete the step that an earlier process decided last, if its state is kept. Collective.

        Everything but `extra` is restored as it was after that step.
        """
        with torch.no_grad():
            last = complete_last_step(core)
        if last is None:
            return None
        with raise_on_all_ranks(core.ranks, "restoring what was kept with the step"):
            extra = self._restore(optimizer, last)
        if core.ranks.rank == 0:
            logger.info("Resumed from kept state after step %d", last.num_steps)
        return ResumedStep(last.num_steps, extra, last.report)

    def _restore(self, optimizer: ShardedOptimizer, step: DecidedStep) -> dict[str, Any]:
        """Restore the values of a step, and return its extra."""
        values, arrays = unpack(step.payload)
        with torch.no_grad():
            for name, buffer in self._buffers():
                kept = torch.from_numpy(arrays[name]).view(torch.uint8)
                flat = torch.empty(buffer.numel(), dtype=buffer.dtype, device="cpu")
                flat.view(torch.uint8).copy_(kept)
                buffer.copy_(flat.view(buffer.shape))
        for name, part in self._with_extra.items():
            part.set_extra_state(decode(values["extra_states"][name], f"the state of {name!r}"))
        optimizer._plan_further_state(decode(values["further"], "the optimizer's state"), {})()
        options = decode(values["groups"], "param_groups")
        for group, kept_options in zip(optimizer.param_groups, options, strict=True):
            # AdamGroup.update would reject the values of a dynamic lr or weight decay.
            dict.update(group, kept_options)
        optimizer.skipped_steps = values["skipped_steps"] + step.report.skipped
        optimizer.last_step = step.report
        optimizer._stepped(step.report)
        extra: dict[str, Any] = decode(values["extra"], "kept_extra")
        return extra


def extra_of(payload: bytes) -> dict[str, Any]:
    """Return `kept_extra` from a result of `KeptValues.pack`."""
    extra: dict[str, Any] = decode(unpack(payload)[0]["extra"], "kept_extra")
    return extra


def kind_of(optimizer: torch.optim.Optimizer) -> str:
    """Return the optimizer's class, and its groups' options that no load may change."""
    groups = [[key for key in FIXED_OPTIONS if group.get(key)] for group in optimizer.param_groups]
    return f"{type(optimizer).__name__} with groups {groups}"


def _buffer_owners(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the full name of each persistent buffer, and the module that has it."""
    saved = module.state_dict(keep_vars=True)
    # Hooks may rename the entries.
    live = {id(value) for value in saved.values()}
    for prefix, part in module.named_modules():
        for name, buffer in part.named_buffers(recurse=False):
            full_name = f"{prefix}.{name}".removeprefix(".")
            if full_name in saved or id(buffer) in live:
                yield full_name, part


def _kind(buffer: torch.Tensor) -> str:
    return f"{buffer.dtype} {list(buffer.shape)}"


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
