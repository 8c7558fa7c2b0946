"""`python -m tests.bench.limit`: the update and the step against the machine's memory bandwidth.

The limit is a pass that reads and writes the same bytes as an fp32 update, without arithmetic.
torch runs in ordinary memory and, as this package does, in huge pages: the difference between both
comes from the memory alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

import torch

from offload_adam.bench.harness import (
    OURS,
    Clock,
    Contender,
    Result,
    best_of,
    gb_per_s,
    interleave,
    median_ratio,
    pair_up,
    prepare_machine,
    summarize,
)
from offload_adam.bench.kernel import BYTES_PER_PARAM, offload_update
from offload_adam.bench.peers import ADAMW, torch_fused
from offload_adam.bench.planes import Planes, fill_with_noise
from offload_adam.bench.report import comparison_table, heading
from offload_adam.bench.step import (
    CLIPPED,
    SCALED,
    StepTensors,
    clip_divisor,
    offload_adam,
    step_tensors,
    torch_steps,
)
from offload_adam.doctor.bandwidth import step_nbytes_per_element
from offload_adam.kernels.probe import STREAM_NBYTES, pass_over
from offload_adam.torch_private import fused_adamw
from tests.bench.command import DisturbedError, run, undisturbed

LEAST_SHARE_OF_COPY = 0.9
COPY_BYTES_PER_PARAM = 8
DENORMAL = 5.6e-45
"""Four times the smallest positive float32: exp_avg and exp_avg_sq stop decaying there."""


def numba_pass(name: str, planes: Planes, num_threads: int) -> Contender:
    """Return one pass over all four tensors at once."""
    streams = (planes.gradient, planes.master_weight, planes.exp_avg, planes.exp_avg_sq)
    gradient, first, second, third = (stream.numpy() for stream in streams)
    return Contender(
        name, lambda: pass_over(gradient, first, second, third, num_threads), STREAM_NBYTES
    )


def torch_pass(name: str, planes: Planes) -> Contender:
    """Return passes over one tensor after the other. The factors 1 and 0 change no value."""

    def multiply_and_add() -> None:
        planes.master_weight.mul_(1.0)
        planes.exp_avg.mul_(1.0)
        planes.exp_avg_sq.add_(planes.gradient, alpha=0.0)

    return Contender(name, multiply_and_add, STREAM_NBYTES)


def plain_copy(name: str, planes: Planes) -> Contender:
    """Return a copy of one tensor."""
    target = planes.gradient.clone()
    return Contender(name, lambda: target.copy_(planes.gradient), COPY_BYTES_PER_PARAM)


def choose_limit(
    timings: Mapping[str, Sequence[float]],
    passes: Sequence[Contender],
    copies: Sequence[Contender],
    numel: int,
) -> tuple[str, dict[str, float]]:
    """Return the name of the fastest pass, and all bandwidths in 1e9 bytes a second.

    Raises:
        DisturbedError: this pass has less than 0.9 of the fastest copy's bandwidth, so other
            processes disturbed it.
    """
    measured = {
        one.name: gb_per_s(one.bytes_per_param, numel, median(timings[one.name]))
        for one in (*passes, *copies)
    }
    best = max((one.name for one in passes), key=measured.__getitem__)
    copied = max(measured[copy.name] for copy in copies)
    if measured[best] < LEAST_SHARE_OF_COPY * copied:
        raise DisturbedError(
            f"The limit was measured at {measured[best]:.1f} GB/s, under {LEAST_SHARE_OF_COPY} of "
            f"a plain copy's {copied:.1f} GB/s. Measure again on a quiet machine."
        )
    return best, measured


def measure_limit(
    work: str = "kernel",
    numel: int = 64_000_000,
    num_threads: int = 1,
    num_pairs: int = 7,
) -> dict[str, Any]:
    """Measure "kernel" or "step" against the limit of this machine.

    Raises:
        ValueError: `work` is neither "kernel" nor "step".
        DisturbedError: the machine was disturbed at every attempt.
        HostMemoryError: the node does not have enough memory available.
    """
    if work not in ("kernel", "step"):
        raise ValueError(f'work must be "kernel" or "step", not {work!r}')
    # Two sets of tensors with a copy's target; our state, and our parameter twice while it moves.
    machine = prepare_machine((2 * (16 + 4 + 4) + 12 + 4) * numel, num_threads)
    huge, ordinary = (step_tensors(numel, huge_pages) for huge_pages in (True, False))
    passes, copies = [], []
    for place, planes in (("huge pages", huge.planes), ("torch.empty", ordinary.planes)):
        passes += [
            numba_pass(f"limit (numba, {place})", planes, num_threads),
            torch_pass(f"limit (torch, {place})", planes),
        ]
        copies.append(plain_copy(f"copy (torch, {place})", planes))
    update = offload_update(huge.planes, num_threads)
    if work == "kernel":
        contenders = [update]
        for name, tensors in (("torch_fused", ordinary), ("torch_fused_huge_pages", huge)):
            contenders.append(Contender(name, torch_fused(tensors.planes).step, BYTES_PER_PARAM))
    else:
        optimizer = offload_adam(ordinary, num_threads)
        contenders = [
            Contender(OURS, optimizer.step, step_nbytes_per_element("fp32")),
            *torch_steps(ordinary),
            blocked_step("torch_fused_blocked", ordinary),
            *torch_steps(huge, "_huge_pages"),
            blocked_step("torch_fused_blocked_huge_pages", huge),
        ]
    with torch.no_grad():
        found = compare(contenders, passes, copies, numel, num_pairs)
        if work == "kernel":
            found["denormal_ratio"] = denormal_ratio(update, huge.planes, num_pairs)
    return {
        "benchmark": f"limit {work}",
        "numel": numel,
        "num_pairs": num_pairs,
        "machine": machine,
        **found,
    }


def compare(
    contenders: Sequence[Contender],
    passes: Sequence[Contender],
    copies: Sequence[Contender],
    numel: int,
    num_pairs: int,
    *,
    clock: Clock = time.perf_counter,
) -> dict[str, Any]:
    """Time everything in turns, and repeat if the machine was disturbed.

    Returns:
        limit_ratio: the limit's time over this package's.
        bound_ms: this package's bytes at the limit's bandwidth, in milliseconds.
        bound_ratio: the same over the time of torch_fused. Ratios are medians over the pairs.

    Raises:
        DisturbedError: the machine was disturbed at every attempt.
    """

    def attempt() -> tuple[dict[str, list[float]], str, dict[str, float]]:
        timings = interleave([*passes, *copies, *contenders], num_pairs, clock=clock)
        return timings, *choose_limit(timings, passes, copies, numel)

    timings, limit, measured = undisturbed(attempt)
    results = with_torch_fused(summarize(timings, contenders, numel))
    limit_ms = timings[limit]
    share = results[0]["bytes_per_param"] / STREAM_NBYTES
    rounds = zip(limit_ms, results[1]["pairs"], strict=True)
    return {
        "limit": limit,
        "limit_ms": median(limit_ms),
        "measured_gb_per_s": measured,
        "limit_ratio": median_ratio(pair_up(timings[OURS], limit_ms)),
        "bound_ms": median(limit_ms) * share,
        "bound_ratio": median(ms * share / pair["ms"] for ms, pair in rounds),
        "results": results,
    }


def blocked_step(name: str, tensors: StepTensors, block_numel: int = 1 << 20) -> Contender:
    """Return a step over blocks that stay in the cache between conversion and update.

    It calls the functional form of fused AdamW and converts each gradient twice, once for the norm.
    No optimizer of torch works like this, but it has the least memory traffic that torch allows.
    """
    planes = tensors.planes
    blocks = [
        tensor.split(block_numel)
        for tensor in (
            tensors.gradient,
            planes.master_weight,
            planes.exp_avg,
            planes.exp_avg_sq,
            tensors.parameter,
        )
    ]
    scratch = planes.gradient[:block_numel]
    norms = torch.zeros(len(blocks[0]))
    found_inf, step = torch.zeros(()), torch.zeros(())

    def widened(block: torch.Tensor) -> torch.Tensor:
        return scratch[: block.numel()].copy_(block)

    def run() -> None:
        for index, gradient in enumerate(blocks[0]):
            norms[index] = torch.linalg.vector_norm(widened(gradient))
        scale = clip_divisor(torch.linalg.vector_norm(norms))
        step.add_(1)
        for gradient, master, exp_avg, exp_avg_sq, parameter in zip(*blocks, strict=True):
            fused_adamw(
                [master],
                [widened(gradient)],
                [exp_avg],
                [exp_avg_sq],
                [],
                [step],
                lr=ADAMW.lr,
                beta1=ADAMW.beta1,
                beta2=ADAMW.beta2,
                weight_decay=ADAMW.weight_decay,
                eps=ADAMW.eps,
                amsgrad=False,
                maximize=False,
                grad_scale=scale,
                found_inf=found_inf,
            )
            parameter.copy_(master)

    return Contender(name, run, step_nbytes_per_element("fp32"))


def with_torch_fused(results: Sequence[Result]) -> list[Result]:
    """Insert the faster of torch's variants after this package, for each kind of memory."""
    names = {result["name"] for result in results}
    bests = [
        best_of(f"torch_fused{suffix}", (CLIPPED + suffix, SCALED + suffix), results)
        for suffix in ("", "_huge_pages")
        if CLIPPED + suffix in names
    ]
    return [results[0], *bests, *results[1:]]


def denormal_ratio(update: Contender, planes: Planes, num_pairs: int) -> float:
    """Return the update's time with denormal moments over its time with normal ones."""

    def normal() -> None:
        fill_with_noise(planes.gradient)
        planes.exp_avg.fill_(1e-3)
        planes.exp_avg_sq.fill_(1e-4)

    def denormal() -> None:
        planes.gradient.zero_()
        planes.exp_avg.fill_(DENORMAL)
        planes.exp_avg_sq.fill_(DENORMAL)

    contenders = [
        Contender("normal", update.run, prepare=normal),
        Contender("denormal", update.run, prepare=denormal),
    ]
    timings = interleave(contenders, num_pairs)
    return median_ratio(pair_up(timings["normal"], timings["denormal"]))


def show(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield the report as lines of text."""
    yield from heading(report, f"{report['numel']:,} parameters")
    yield from comparison_table(report["results"])
    yield ""
    for name, bandwidth in report["measured_gb_per_s"].items():
        yield f"{name}: {bandwidth:.1f} GB/s"
    yield (
        f"{report['limit']}: {report['limit_ms']:.1f} ms, {report['limit_ratio']:.3f} of {OURS}'s "
        f"time. At its bandwidth, this work takes {report['bound_ms']:.1f} ms, "
        f"{report['bound_ratio']:.2f} of torch_fused's time."
    )
    if "denormal_ratio" in report:
        yield f"Time with denormal moments over normal ones: {report['denormal_ratio']:.3f}"


if __name__ == "__main__":
    run(measure_limit, show)
