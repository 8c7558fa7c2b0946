"""The optimizer's options besides the groups': checks, and who averages the gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist

from offload_adam.coordinator.ranks import world_size_of
from offload_adam.memory.pinning import PINS


def resolve_reduction(
    kind: str | None, module: torch.nn.Module | None, process_group: dist.ProcessGroup | None
) -> str:
    """Return who averages the gradients over the ranks: "optimizer" or "external".

    Raises:
        ValueError: it is not known, or not possible.
        RuntimeError: WORLD_SIZE > 1 and no process group is initialised.
    """
    world_size = world_size_of(process_group)
    if kind not in (None, "optimizer", "external"):
        raise ValueError(f"gradient_reduction must be 'optimizer' or 'external', not {kind!r}")
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


def check_options(
    reduce_dtype: torch.dtype | None,
    state_dtype: torch.dtype,
    bucket_nbytes: int,
    num_threads: int | None,
    accumulate: str | None,
    pin: str,
    offload_fraction: float,
) -> None:
    """Refuse options that nothing implements, naming what is allowed."""
    if reduce_dtype not in (None, torch.float32):
        raise ValueError(f"reduce_dtype must be torch.float32 or None, not {reduce_dtype}")
    if state_dtype != torch.float32:
        raise ValueError(f"state_dtype must be torch.float32, not {state_dtype}")
    if accumulate not in (None, "host"):
        raise ValueError(f"accumulate must be 'host' or None, not {accumulate!r}")
    if pin not in PINS:
        raise ValueError(f"pin must be one of {', '.join(map(repr, PINS))}, not {pin!r}")
    if isinstance(offload_fraction, bool) or not isinstance(offload_fraction, (int, float)):
        raise TypeError(f"offload_fraction must be a number, not {offload_fraction!r}")
    if not 0.0 <= offload_fraction <= 1.0:
        raise ValueError(f"offload_fraction must lie in [0, 1], not {offload_fraction}")
    for name, value in (("bucket_nbytes", bucket_nbytes), ("num_threads", num_threads)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise TypeError(f"{name} must be an int, not {value!r}")
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")


def check_room(nbytes: int) -> None:
    """Refuse a room for copies that is no number of bytes."""
    if isinstance(nbytes, bool) or not isinstance(nbytes, int):
        raise TypeError(f"checkpoint_room_nbytes must be an int, not {nbytes!r}")
    if nbytes < 0:
        raise ValueError(f"checkpoint_room_nbytes must be at least 0, not {nbytes}")


def check_module(module: object) -> None:
    """Refuse a module that is none."""
    if module is not None and not isinstance(module, torch.nn.Module):
        raise TypeError(f"module must be a torch.nn.Module or None, not {module!r}")


def check_accumulate(accumulate: str | None, module: torch.nn.Module | None, kind: str) -> None:
    """Refuse room for gradients that never leave `.grad`."""
    if accumulate is not None and (module is None or kind == "external"):
        raise ValueError(
            "accumulate='host' adds gradients that leave during backward: it needs module= and "
            "gradient_reduction='optimizer'. Without them .grad accumulates as always"
        )


def check_overlap(
    overlap: bool | None,
    units: Sequence[torch.nn.Module] | None,
    module: torch.nn.Module | None,
) -> None:
    """Refuse what only a model with hooks can do."""
    if overlap is not None and not isinstance(overlap, bool):
        raise TypeError(f"overlap must be a bool or None, not {overlap!r}")
    if module is None and (overlap or units is not None):
        name = "overlap=True" if overlap else "units="
        raise ValueError(
            f"{name} lets the parts of a model wait for their own parameters: it needs module= and "
            "state in host memory"
        )
    for unit in units or ():
        if not isinstance(unit, torch.nn.Module):
            raise TypeError(f"units must be modules of module=, not {unit!r}")


def check_max_norm(name: str, value: float | None) -> float | None:
    """Return a clipping norm as a float, refusing what cannot be one."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, not {value!r}")
    if math.isnan(value) or value <= 0:
        raise ValueError(f"{name} must be above 0, not {value}")
    return float(value)
