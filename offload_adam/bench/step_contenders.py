"""All of a CPU-side step: bf16 gradient in, clip to a norm, AdamW, bf16 parameter out.

torch has no such step, so it is put together from what torch has, with every buffer allocated
before. Where one way of doing that is faster than another, all of them run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from offload_adam.bench.contender import ADAMW, MAX_GRAD_NORM
from offload_adam.bench.planes import (
    HUGE_PAGES,
    Planes,
    allocate,
    fill_with_noise,
    make_planes,
    named,
)
from offload_adam.bench.results import BASELINE
from offload_adam.optimizer import OffloadAdam
from offload_adam.torch_private import fused_adamw

CLIPPED, SCALED, BLOCKED = "torch_clip_grad_norm", "torch_grad_scale", "torch_fused_blocked"
_NORM_EPS = 1e-6  # what clip_grad_norm_ adds to the norm that it divides by


@dataclass(frozen=True)
class StepStreams:
    """What a step reads and writes at its edges, bf16, and the fp32 planes of those who need them.

    gradient: read by every contender, written by none.
    parameter: where the peers write the rounded weights.
    wide: their master weights, moments, and the gradient converted to fp32.
    """

    gradient: torch.Tensor
    parameter: torch.Tensor
    wide: Planes


def step_streams(numel: int, memory: str) -> StepStreams:
    """Return streams of which the master weights and the parameter hold the same values.

    Raises:
        HostMemoryError: the node does not have that much memory available.
    """
    wide = make_planes(numel, memory)
    gradient, parameter = allocate(numel, torch.bfloat16, 2, memory)
    fill_with_noise(gradient)
    parameter.copy_(wide.master_weight)
    wide.master_weight.copy_(parameter)
    return StepStreams(gradient, parameter, wide)


class OffloadStep:
    """The package as its users have it: `OffloadAdam(...).step()` on a bf16 parameter.

    It places state and parameter itself; the gradient lies where autograd would allocate it.
    """

    name = BASELINE
    # The gradient twice, for the norm and for the update; fp32 state both ways; the parameter.
    bytes_per_param = 2 + 2 + 24 + 2
    memory = HUGE_PAGES

    def __init__(self, streams: StepStreams, num_threads: int) -> None:
        self.parameter = torch.nn.Parameter(streams.parameter.clone())
        self.optimizer = OffloadAdam(
            [self.parameter],
            lr=ADAMW.lr,
            betas=(ADAMW.beta1, ADAMW.beta2),
            eps=ADAMW.eps,
            weight_decay=ADAMW.weight_decay,
            decoupled_weight_decay=True,
            max_grad_norm=MAX_GRAD_NORM,
            num_threads=num_threads,
        )
        self.parameter.grad = streams.gradient

    def run(self) -> None:
        """Take one step."""
        self.optimizer.step()


class ClippedStep:
    """An optimizer over fp32 planes, behind `clip_grad_norm_`."""

    # Gradient converted; read for the norm; scaled; the update; parameter converted.
    bytes_per_param = (2 + 4) + 4 + 8 + 28 + (4 + 2)

    def __init__(self, name: str, optimizer: torch.optim.Optimizer, streams: StepStreams) -> None:
        self.name = named(name, streams.wide.memory)
        self.memory = streams.wide.memory
        self._optimizer = optimizer
        self._streams = streams
        self._master: torch.nn.Parameter = optimizer.param_groups[0]["params"][0]

    def run(self) -> None:
        """Take one step."""
        self._streams.wide.gradient.copy_(self._streams.gradient)
        torch.nn.utils.clip_grad_norm_([self._master], MAX_GRAD_NORM)
        self._optimizer.step()
        self._streams.parameter.copy_(self._streams.wide.master_weight)


class ScaledStep:
    """torch's fused AdamW, which clips by itself: it divides the gradient by `grad_scale`."""

    # Gradient converted; read for the norm; the update, which writes the scaled gradient back;
    # parameter converted.
    bytes_per_param = (2 + 4) + 4 + (28 + 4) + (4 + 2)

    def __init__(self, optimizer: torch.optim.Optimizer, streams: StepStreams) -> None:
        self.name = named(SCALED, streams.wide.memory)
        self.memory = streams.wide.memory
        self._optimizer = optimizer
        self._streams = streams
        self._found_inf = torch.zeros(())

    def run(self) -> None:
        """Take one step."""
        wide = self._streams.wide
        wide.gradient.copy_(self._streams.gradient)
        # The way in which torch.amp.GradScaler hands both over.
        self._optimizer.grad_scale = divisor(torch.linalg.vector_norm(wide.gradient))  # type: ignore[attr-defined]
        self._optimizer.found_inf = self._found_inf  # type: ignore[attr-defined]
        self._optimizer.step()
        self._streams.parameter.copy_(wide.master_weight)


class BlockedStep:
    """torch's fused AdamW over blocks that stay in cache between conversion, update and conversion.

    No optimizer of torch's works so: it takes the functional form underneath, a loop of the user's
    own, and a second conversion of the gradient for the norm. It is the least that torch can do.
    """

    bytes_per_param = 2 + 2 + 24 + 2

    def __init__(self, streams: StepStreams, block_numel: int = 1 << 20) -> None:
        wide = streams.wide
        self.name = named(BLOCKED, wide.memory)
        self.memory = wide.memory
        self._blocks = [
            plane.split(block_numel)
            for plane in (
                streams.gradient,
                wide.master_weight,
                wide.exp_avg,
                wide.exp_avg_sq,
                streams.parameter,
            )
        ]
        self._scratch = wide.gradient[:block_numel]
        self._norms = torch.zeros(len(self._blocks[0]))
        self._found_inf = torch.zeros(())
        self._step = torch.zeros(())

    def run(self) -> None:
        """Take one step."""
        for index, narrow in enumerate(self._blocks[0]):
            self._norms[index] = torch.linalg.vector_norm(self._widened(narrow))
        scale = divisor(torch.linalg.vector_norm(self._norms))
        self._step += 1
        for narrow, master, exp_avg, exp_avg_sq, parameter in zip(*self._blocks, strict=True):
            fused_adamw(
                [master],
                [self._widened(narrow)],
                [exp_avg],
                [exp_avg_sq],
                [],
                [self._step],
                lr=ADAMW.lr,
                beta1=ADAMW.beta1,
                beta2=ADAMW.beta2,
                weight_decay=ADAMW.weight_decay,
                eps=ADAMW.eps,
                amsgrad=False,
                maximize=False,
                grad_scale=scale,
                found_inf=self._found_inf,
            )
            parameter.copy_(master)

    def _widened(self, narrow: torch.Tensor) -> torch.Tensor:
        return self._scratch[: narrow.numel()].copy_(narrow)


def divisor(total_norm: torch.Tensor) -> torch.Tensor:
    """Return what to divide gradients by to clip them: 1 / clip_grad_norm_'s factor, at least 1."""
    return ((total_norm + _NORM_EPS) / MAX_GRAD_NORM).clamp_(min=1.0)
