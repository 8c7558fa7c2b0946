"""`bench step`: all of a step on a CPU: bf16 gradient, clipping, AdamW, bf16 parameter.

torch has no such step. Two variants are built from torch's functions here, with every buffer
allocated in advance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import torch

from offload_adam.bench.arithmetic import updates_per_s
from offload_adam.bench.harness import OURS, Contender, compare, prepare_machine
from offload_adam.bench.peers import (
    MAX_GRAD_NORM,
    OUR_SETTINGS,
    available_peers,
    torch_fused,
)
from offload_adam.bench.planes import Planes, allocate, fill_with_noise, make_planes
from offload_adam.doctor.bandwidth import step_nbytes_per_element
from offload_adam.optimizer import OffloadAdam
from offload_adam.options import OffloadPolicy, StateFormat

OURS_IN_FP32 = f"{OURS}_fp32_state"
OURS_KEPT = f"{OURS}_kept"
CLIPPED, SCALED = "torch_clip_grad_norm", "torch_grad_scale"
SHARED_MEMORY = "/dev/shm"
_NORM_EPS = 1e-6  # clip_grad_norm_ adds it to the norm before it divides by the norm


@dataclass(frozen=True)
class StepTensors:
    """The tensors of a step.

    gradient: bf16, shared by all contenders, which only read it.
    parameter: bf16, written by the peers.
    planes: the peers' fp32 state, and a buffer for the fp32 gradient.
    """

    gradient: torch.Tensor
    parameter: torch.Tensor
    planes: Planes


def step_tensors(numel: int, huge_pages: bool) -> StepTensors:
    """Return tensors in which master weight and parameter have the same values.

    Raises:
        HostMemoryError: the node does not have enough memory available.
    """
    planes = make_planes(numel, huge_pages)
    gradient, parameter = allocate(numel, torch.bfloat16, 2, huge_pages)
    fill_with_noise(gradient)
    parameter.copy_(planes.master_weight)
    planes.master_weight.copy_(parameter)
    return StepTensors(gradient, parameter, planes)


def measure_step(
    numel: int,
    num_threads: int,
    num_pairs: int,
    state_format: StateFormat = "fp32",
    *,
    keeps: bool = False,
) -> dict[str, Any]:
    """Return the report of `bench step`, a JSON object.

    Args:
        state_format: format of this package's state. Unless it is "fp32", the report also has a
            step with fp32 state.
        keeps: the report also has a step whose state outlives the process.

    Raises:
        HostMemoryError: the node does not have enough memory available.
    """
    formats: dict[str, StateFormat] = {OURS: state_format}
    if state_format != "fp32":
        formats[OURS_IN_FP32] = "fp32"
    # The peers' tensors; our state, and our parameter twice while it moves into its bucket.
    itemsize = 16 + 4 + (12 + 4) * (len(formats) + keeps)
    machine = prepare_machine(itemsize * numel, num_threads)
    arithmetic = {name: updates_per_s(stored) for name, stored in formats.items()}
    tensors = step_tensors(numel, huge_pages=False)
    peers, left_out = available_peers(tensors.planes)
    contenders = [
        *(
            Contender(
                name,
                offload_adam(tensors, num_threads, stored).step,
                step_nbytes_per_element(stored),
            )
            for name, stored in formats.items()
        ),
        *torch_steps(tensors),
        *(clipped_step(name, optimizer, tensors) for name, optimizer in peers.items()),
    ]
    with ExitStack() as stack:
        if keeps:
            folder = stack.enter_context(TemporaryDirectory(dir=SHARED_MEMORY))
            kept = OffloadPolicy(keep="shared", keep_path=folder)
            optimizer = offload_adam(tensors, num_threads, state_format, kept)
            stack.callback(optimizer.close)
            nbytes = step_nbytes_per_element(state_format) + 2  # the norm copies the gradient
            contenders.append(Contender(OURS_KEPT, optimizer.step, nbytes))
        return _compare(contenders, numel, num_pairs, machine, left_out, state_format) | {
            "updates_per_s_and_core": arithmetic
        }


def _compare(
    contenders: Sequence[Contender],
    numel: int,
    num_pairs: int,
    machine: Mapping[str, Any],
    left_out: Mapping[str, str],
    state_format: StateFormat,
) -> dict[str, Any]:
    report = compare(
        "step",
        contenders,
        numel=numel,
        num_pairs=num_pairs,
        machine=machine,
        left_out=left_out,
        best={"torch_fused": (CLIPPED, SCALED)},
        definitions={
            OURS: f"state_format={state_format!r}",
            OURS_IN_FP32: "the same with fp32 state",
            OURS_KEPT: "the same with keep='shared', which also copies the gradient",
            "torch_fused": f"the faster of {CLIPPED} and {SCALED}",
            CLIPPED: "gradient converted to fp32, clip_grad_norm_, fused AdamW, rounded to bf16",
            SCALED: "clip_grad_norm_ replaced by a grad_scale that fused AdamW applies",
        },
    )
    return report | {"state_format": state_format}


def offload_adam(
    tensors: StepTensors,
    num_threads: int,
    state_format: StateFormat = "fp32",
    offload: OffloadPolicy = OffloadPolicy(),
) -> OffloadAdam:
    """Return this package's optimizer over a copy of the parameter, with the shared gradient."""
    parameter = torch.nn.Parameter(tensors.parameter.clone())
    # The parameter is a vector, to which only a group's own format applies.
    group = {"params": [parameter], "state_format": state_format}
    optimizer = OffloadAdam([group], **OUR_SETTINGS, num_threads=num_threads, offload=offload)
    parameter.grad = tensors.gradient
    return optimizer


def torch_steps(tensors: StepTensors, suffix: str = "") -> list[Contender]:
    """Return the variants of torch, both on the same tensors."""
    return [
        clipped_step(CLIPPED + suffix, torch_fused(tensors.planes), tensors),
        scaled_step(SCALED + suffix, torch_fused(tensors.planes), tensors),
    ]


def clipped_step(name: str, optimizer: torch.optim.Optimizer, tensors: StepTensors) -> Contender:
    """Return a step that converts, calls `clip_grad_norm_` and the optimizer, and converts back."""
    master: torch.nn.Parameter = optimizer.param_groups[0]["params"][0]

    def run() -> None:
        tensors.planes.gradient.copy_(tensors.gradient)
        torch.nn.utils.clip_grad_norm_([master], MAX_GRAD_NORM)
        optimizer.step()
        tensors.parameter.copy_(tensors.planes.master_weight)

    # Gradient converted; read for the norm; scaled; the update; parameter converted.
    return Contender(name, run, (2 + 4) + 4 + 8 + 28 + (4 + 2))


def scaled_step(name: str, optimizer: torch.optim.Optimizer, tensors: StepTensors) -> Contender:
    """Return a step in which fused AdamW clips: it divides the gradient by `grad_scale`."""
    found_inf = torch.zeros(())

    def run() -> None:
        gradient = tensors.planes.gradient.copy_(tensors.gradient)
        # torch.amp.GradScaler passes both values to the optimizer as these attributes.
        optimizer.grad_scale = clip_divisor(torch.linalg.vector_norm(gradient))  # type: ignore[attr-defined]
        optimizer.found_inf = found_inf  # type: ignore[attr-defined]
        optimizer.step()
        tensors.parameter.copy_(tensors.planes.master_weight)

    # Gradient converted; read for the norm; the update, which also writes the scaled gradient;
    # parameter converted.
    return Contender(name, run, (2 + 4) + 4 + (28 + 4) + (4 + 2))


def clip_divisor(total_norm: torch.Tensor) -> torch.Tensor:
    """Return the number to divide gradients by: 1 / the factor of `clip_grad_norm_`, at least 1."""
    return ((total_norm + _NORM_EPS) / MAX_GRAD_NORM).clamp_(min=1.0)
