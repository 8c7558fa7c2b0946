"""Checks of the GPUs: how many, their free memory, and the speed of their bus."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from offload_adam.doctor.bandwidth import bus_gb_per_s
from offload_adam.doctor.bandwidth_cache import Bandwidth
from offload_adam.doctor.finding import Finding
from offload_adam.errors import HostMemoryError
from offload_adam.units import format_nbytes

# PCIe 3 with 16 lanes gives 12. Less means fewer lanes, or a link in a power-saving state.
LEAST_GB_PER_S = 10.0
_DRIVER = Path("/proc/driver/nvidia/version")


def device_findings(local_world_size: int, measured: Bandwidth | None) -> Iterator[Finding]:
    """Yield findings on CUDA, and on the memory and the bus of each GPU.

    Args:
        local_world_size: number of ranks to be started on this node.
        measured: `bus` is set to the bandwidth of the slowest bus; None to measure no bus.
    """
    if not torch.cuda.is_available():
        yield without_cuda(_DRIVER.exists())
        return
    count = torch.cuda.device_count()
    if count == 1 < local_world_size:
        found = f"1 visible GPU for {local_world_size} local ranks"
        advice = "start one rank, unless the launcher makes a different GPU visible to each rank"
        yield Finding("CUDA", found, advice)
    elif count < local_world_size:
        found = f"{count} GPU(s) for {local_world_size} local ranks"
        advice = (
            f"start at most {count} rank(s) on this node (torchrun --nproc-per-node={count}), or "
            "set CUDA_VISIBLE_DEVICES to an empty string to train on CPUs"
        )
        yield Finding("CUDA", found, advice, is_fatal=True)
    for index in range(count):
        free_nbytes, total_nbytes = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        found = f"{name}: {format_nbytes(free_nbytes)} free of {format_nbytes(total_nbytes)}"
        advice = "stop other processes on this GPU: nvidia-smi lists them"
        yield Finding(f"GPU {index}", found, advice if free_nbytes < total_nbytes // 2 else "")
        if measured is not None:
            yield bus(index, measured)


def without_cuda(has_driver: bool) -> Finding:
    """Return the finding that there is no GPU, a warning if the NVIDIA driver is loaded."""
    if not has_driver:
        return Finding("CUDA", "no GPU: parameters and state share the host's memory")
    if torch.version.cuda is None:
        found = "the NVIDIA driver is loaded, but this torch is built without CUDA"
        return Finding("CUDA", found, "install torch with CUDA")
    found = f"the NVIDIA driver is loaded, but torch (CUDA {torch.version.cuda}) finds no GPU"
    advice = "check CUDA_VISIBLE_DEVICES, and with nvidia-smi that the driver is new enough"
    return Finding("CUDA", found, advice)


def bus(index: int, measured: Bandwidth) -> Finding:
    """Measure copies between pinned host memory and one GPU, in both directions.

    `measured.bus` becomes the slowest bandwidth so far, over GPUs and directions.
    """
    topic = f"bus of GPU {index}"
    try:
        h2d, d2h = bus_gb_per_s(index)
    except HostMemoryError as error:
        advice = "raise the limit: ulimit -l unlimited; in Docker: --ulimit memlock=-1"
        return Finding(topic, str(error), advice, is_fatal=True)
    slower = min(h2d, d2h)
    measured.bus = min(slower, measured.bus or slower)
    found, advice = f"H2D copies {h2d:.1f} GB/s, D2H copies {d2h:.1f} GB/s", ""
    if slower < LEAST_GB_PER_S:
        found += f"; expected {LEAST_GB_PER_S:.0f} GB/s or more"
        advice = "compare the link's current width and speed with its maximum: nvidia-smi -q"
    return Finding(topic, found, advice)
