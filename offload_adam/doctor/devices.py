"""The GPUs, whether host memory can be pinned for them, and the speed of the bus between."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch

from offload_adam.doctor.finding import Finding, failed, ok, warning
from offload_adam.errors import HostMemoryError
from offload_adam.memory.arena import HostArena
from offload_adam.memory.pinning import CudaRuntime
from offload_adam.units import format_nbytes

COPY_NBYTES = 256 * 1024 * 1024
NUM_COPIES = 10
LEAST_GB_PER_S = 10.0
"""PCIe 3 with 16 lanes gives 12; less is a link with fewer lanes or in a saving state."""
_DRIVER = Path("/proc/driver/nvidia/version")


def device_findings(local_world_size: int, speeds: list[float] | None) -> Iterator[Finding]:
    """Yield whether there is CUDA, and for each GPU its memory and its bus.

    Args:
        speeds: gets the GB/s of each bus in its slower direction; None to measure none.
    """
    if not torch.cuda.is_available():
        yield without_cuda(_DRIVER.exists())
        return
    count = torch.cuda.device_count()
    if count == 1 < local_world_size:
        yield warning(
            "CUDA",
            f"1 visible GPU for {local_world_size} local ranks",
            "start one rank, unless the launcher shows each rank its own GPU",
        )
    elif count < local_world_size:
        yield failed(
            "CUDA",
            f"{count} GPU(s) for {local_world_size} local ranks",
            f"start --nproc-per-node={count}, or hide the GPUs with CUDA_VISIBLE_DEVICES=",
        )
    for index in range(count):
        yield _memory(index)
        if speeds is not None:
            yield bus(index, speeds)


def without_cuda(has_driver: bool) -> Finding:
    """Return that parameters stay on the CPU, and whether they need not."""
    if not has_driver:
        return ok("CUDA", "no GPU: parameters and state share the host's memory")
    if torch.version.cuda is None:
        return warning(
            "CUDA",
            "there is a driver, but torch is built without CUDA",
            "install torch with CUDA",
        )
    return warning(
        "CUDA",
        f"there is a driver, and torch (CUDA {torch.version.cuda}) finds no GPU",
        "check CUDA_VISIBLE_DEVICES, and that the driver is new enough: nvidia-smi",
    )


def _memory(index: int) -> Finding:
    free_nbytes, total_nbytes = torch.cuda.mem_get_info(index)
    name = torch.cuda.get_device_name(index)
    found = f"{name}: {format_nbytes(free_nbytes)} free of {format_nbytes(total_nbytes)}"
    if free_nbytes < total_nbytes // 2:
        return warning(f"GPU {index}", found, "end what else uses it: nvidia-smi")
    return ok(f"GPU {index}", found)


def bus(index: int, speeds: list[float]) -> Finding:
    """Measure the copies between pinned host memory and one GPU, in both directions.

    Args:
        speeds: gets the GB/s of the slower one.
    """
    topic = f"bus of GPU {index}"
    try:
        up, down = bus_gb_per_s(index)
    except HostMemoryError as error:
        return failed(topic, str(error), "ulimit -l unlimited; in Docker: --ulimit memlock=-1")
    speeds.append(min(up, down))
    found = f"{up:.1f} GB/s up, {down:.1f} GB/s down"
    if min(up, down) < LEAST_GB_PER_S:
        return warning(topic, found, "compare the link's width and speed: nvidia-smi -q")
    return ok(topic, found)


def bus_gb_per_s(index: int) -> tuple[float, float]:
    """Return the bandwidth of copies from pinned memory to one GPU, and of those back.

    Raises:
        HostMemoryError: the memory is not there, or cannot be pinned.
    """
    gpu = torch.device("cuda", index)
    arena = HostArena(COPY_NBYTES)
    arena.pin(CudaRuntime(gpu))
    try:
        host = arena.take(COPY_NBYTES, torch.uint8)
        device = torch.empty(COPY_NBYTES, dtype=torch.uint8, device=gpu)
        return copy_gb_per_s(host, device), copy_gb_per_s(device, host)
    finally:
        arena.close()


def copy_gb_per_s(source: torch.Tensor, target: torch.Tensor) -> float:
    """Return the median bandwidth of copies from `source` to `target`, in 1e9 bytes a second."""
    device = target.device if target.is_cuda else source.device
    milliseconds: list[float] = []
    with torch.cuda.device(device):
        for _ in range(1 + NUM_COPIES):
            start = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            start.record()
            target.copy_(source, non_blocking=True)
            end.record()
            end.synchronize()
            milliseconds.append(start.elapsed_time(end))
    return source.nbytes / median(milliseconds[1:]) / 1e6
