"""The findings of doctor on other machines, faked by patches and by files."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from offload_adam.doctor import (
    bandwidth,
    bandwidth_cache,
    devices,
    examination,
    host,
    storage,
)
from offload_adam.doctor.bandwidth_cache import Bandwidth
from offload_adam.doctor.examination import bandwidth_findings, examine, run_check
from offload_adam.doctor.finding import Finding, worst
from offload_adam.doctor.load import OtherProcesses
from offload_adam.errors import HostMemoryError
from offload_adam.kernels import threads
from offload_adam.memory.arena import HostArena
from offload_adam.options import StateFormat
from offload_adam.plan.inputs import Source, Training
from offload_adam.train import speeds
from offload_adam.train.speeds import known_speeds
from tests.support.cuda_runtime import StandInRuntime


def test_the_most_severe_status_counts() -> None:
    fine, costly = Finding("a", "b"), Finding("a", "b", "c")
    broken = Finding("a", "b", "c", is_fatal=True)
    assert worst([]) == "ok"
    assert worst([fine, costly, fine]) == "warning"
    assert worst([costly, broken, fine]) == "failed"


@pytest.mark.parametrize(
    ("numbers", "text"),
    [([0, 1, 2, 3, 8], "0-3,8"), ([5], "5"), ([], ""), ([1, 3, 4], "1,3-4")],
)
def test_cores_are_printed_as_ranges(numbers: list[int], text: str) -> None:
    assert host.ranges(numbers) == text


def cores(topic: str, num_ranks: int = 1) -> Finding:
    return next(f for f in host.core_findings(num_ranks, on_device=False) if f.topic == topic)


def test_a_quota_below_one_core_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    for quota, status in ((None, "ok"), (2.5, "ok"), (0.5, "warning")):
        monkeypatch.setattr(host, "cgroup_cores", lambda quota=quota: quota)
        assert cores("CPU quota").status == status
    assert cores("CPU quota").found.endswith("0.5 core(s)")


def test_more_ranks_than_cores_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "allowed_cores", lambda: 2)
    monkeypatch.setattr(host, "threads_per_rank", lambda ranks, on_device: 1)
    assert cores("local ranks", 2).status == "ok"
    assert cores("local ranks", 2).found == "2 rank(s) with 1 thread(s) each on 2 core(s)"
    assert cores("local ranks", 3).status == "warning"


def test_with_a_gpu_each_rank_leaves_one_core_free(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    measured: list[tuple[int, str]] = []

    def measure_step(num_threads: int, state_format: str = "fp32") -> float:
        measured.append((num_threads, state_format))
        return 1.0

    monkeypatch.setattr(threads, "allowed_cores", lambda pid=0: 8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bandwidth_cache, "keep", lambda found: None)
    monkeypatch.setattr(
        examination, "measure_bandwidth", lambda counts: dict.fromkeys(counts, float(counts[-1]))
    )
    monkeypatch.setattr(examination, "measure_step", measure_step)
    monkeypatch.setattr(speeds, "measure_step", measure_step)
    monkeypatch.setattr(speeds, "bus_gb_per_s", lambda index: (1.0, 1.0))
    findings, _ = examine(2, tmp_path)
    found = {one.topic: one.found for one in findings}
    assert found["local ranks"].startswith("2 rank(s) with 3 thread(s) each")
    assert [topic for topic in found if topic.startswith("bandwidth, ")] == [
        f"bandwidth, {count} thread(s)" for count in (1, 2, 4, 6)
    ]
    for on_device in (True, False):
        speeds.measured_speeds(Training(world_size=2, local_world_size=2, on_device=on_device))
    # By doctor, and for a plan of each kind.
    by_doctor = [(6, state_format) for state_format in ("fp32", "bf16", "mixed", "int8")]
    assert measured == [*by_doctor * examination.NUM_ROUNDS, (6, "fp32"), (8, "fp32")]


@pytest.mark.parametrize(
    ("assembly", "bits"),
    [
        ("vmulps\t(%rax), %zmm0, %zmm1\n vmulps %xmm0, %xmm1, %xmm2", 512),
        ("\tvmulps\t%ymm0, %ymm1, %ymm2\n\tvmovaps %zmm3, %zmm4", 256),
        ("mulps %xmm0, %xmm1", 128),
        ("fmul v0.4s, v1.4s, v0.4s", None),
    ],
)
def test_only_arithmetic_counts_for_the_vector_width(assembly: str, bits: int | None) -> None:
    assert host.widest_register(assembly) == bits


def test_narrow_vectors_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_compiled_loop", lambda: "mulps %xmm0, %xmm1")
    assert host.vector_width().status == "warning"


def test_the_workqueue_layer_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "select_threading_layer", lambda: "workqueue")
    found = host.threading_layer()
    assert found.status == "warning"
    assert "libgomp" in found.advice


def test_only_huge_pages_of_the_new_allocation_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smaps = tmp_path / "smaps_rollup"
    assert host.granted_share(smaps) is None

    def allocate(nbytes: int) -> HostArena:
        smaps.write_text("AnonHugePages:    49152 kB\n")
        return HostArena(1)

    smaps.write_text("Rss: 9 kB\nAnonHugePages:     16384 kB\nShmemPmdMapped: 0 kB\n")
    monkeypatch.setattr(host, "HostArena", allocate)
    assert host.granted_share(smaps) == 0.5


def test_huge_pages_that_are_off_or_not_granted_are_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = tmp_path / "enabled"
    assert host.huge_pages(setting).status == "warning"
    setting.write_text("always madvise [never]\n")
    assert "echo madvise" in host.huge_pages(setting).advice
    setting.write_text("always [madvise] never\n")
    for share, status in ((0.2, "warning"), (1.0, "ok"), (None, "ok")):
        monkeypatch.setattr(host, "granted_share", lambda share=share: share)
        assert host.huge_pages(setting).status is status


def test_one_rank_on_two_numa_nodes_is_a_warning(tmp_path: Path) -> None:
    for node, cores in (("node0", "0-15"), ("node1", "16-31"), ("node2", "")):
        (tmp_path / node).mkdir()
        (tmp_path / node / "cpulist").write_text(f"{cores}\n")
    alone = host.numa(1, tmp_path)
    assert alone.status == "warning"
    assert "node 1: core(s) 16-31; node 2: core(s) none" in alone.found
    assert "start 2 ranks" in alone.advice
    assert host.numa(2, tmp_path).status == "ok"
    assert host.numa(1, tmp_path / "none").status == "ok"


def test_a_low_limit_of_locked_memory_matters_with_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (8 * 2**20, 8 * 2**20))
    assert host.locked_limit(needed=False).status == "ok"
    low = host.locked_limit(needed=True)
    assert low.status == "warning"
    assert "8.00 MiB" in low.found
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
    assert host.locked_limit(needed=True).found == "unlimited"


def test_little_available_memory_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "available_memory", lambda: (2**20, "control group"))
    found = host.available()
    assert found.status == "warning"
    assert found.found.startswith("1.00 MiB available (control group)")


def test_a_folder_that_cannot_be_written_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    assert storage.free_disk(tmp_path / "file" / "runs", None).status == "failed"
    usage = shutil.disk_usage(tmp_path)
    for free, status in ((2**30, "warning"), (32 * 2**30, "ok")):
        found_usage = usage._replace(free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda _, u=found_usage: u)
        assert storage.free_disk(tmp_path / "still" / "to be made", None).status is status
    assert "checkpoint of 2.15 B parameters" in storage.free_disk(tmp_path, None).found


@pytest.mark.parametrize(
    ("free_gb", "status", "found"),
    [
        (112 * 3 + 1, "ok", "3 are on the disk at once (checkpoint.keep_last is 2)"),
        (112 * 3 - 1, "warning", "3 are on the disk at once (checkpoint.keep_last is 2)"),
        (112 + 1, "warning", "3 are on the disk at once (checkpoint.keep_last is 2)"),
        (112 - 1, "failed", "a checkpoint of 7 B parameters has up to 104.31 GiB, which does not"),
    ],
)
def test_a_disk_without_space_for_the_checkpoints_of_a_run_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_gb: int, status: str, found: str
) -> None:
    """16 bytes a parameter: 112e9 bytes for 7e9 of them."""
    usage = shutil.disk_usage(tmp_path)._replace(free=free_gb * 10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    finding = storage.free_disk(tmp_path, 7e9)
    assert finding.status == status
    assert found in finding.found


def test_a_driver_without_a_usable_torch_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    assert devices.without_cuda(False).status == "ok"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "install torch" in devices.without_cuda(True).advice
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "nvidia-smi" in devices.without_cuda(True).advice


class FakeGpus:
    """Two GPUs, of which other processes use the second."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        gib = 2**30
        free = {0: 70 * gib, 1: 10 * gib}
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (free[index], 80 * gib))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU model {index}")


def test_gpus_in_use_or_too_few_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeGpus(monkeypatch)
    found = list(devices.device_findings(4, None))
    assert [one.status for one in found] == ["failed", "ok", "warning"]
    assert found[0].found == "2 GPU(s) for 4 local ranks"
    assert found[2].found == "GPU model 1: 10.00 GiB free of 80.00 GiB"
    # A launcher may make only its own GPU visible to each rank.
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    found = list(devices.device_findings(4, None))
    assert [one.status for one in found] == ["warning", "ok"]
    assert found[0].found == "1 visible GPU for 4 local ranks"
    assert [one.status for one in devices.device_findings(1, None)] == ["ok"]


def test_memory_that_cannot_be_pinned_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(arena: object, runtime: object) -> None:
        raise HostMemoryError("CUDA could not pin it")

    monkeypatch.setattr(HostArena, "pin", refuse)
    monkeypatch.setattr(bandwidth, "CudaRuntime", StandInRuntime)
    measured = Bandwidth()
    assert devices.bus(0, measured).status == "failed"
    assert measured.bus is None


def test_the_slowest_bus_is_saved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    FakeGpus(monkeypatch)
    monkeypatch.setattr(devices, "bus_gb_per_s", lambda index: ((25.0, 24.0), (9.0, 12.0))[index])
    monkeypatch.setattr(examination, "measure_bandwidth", lambda counts: dict.fromkeys(counts, 8.0))
    monkeypatch.setattr(examination, "measure_step", lambda threads, state_format="fp32": 7.0)
    monkeypatch.setattr(storage, "write_gb_per_s", lambda folder: 1.0)
    findings, measured = examine(2, tmp_path)
    assert measured.bus == 9.0
    statuses = {one.topic: one.status for one in findings if one.topic.startswith("bus")}
    assert statuses == {"bus of GPU 0": "ok", "bus of GPU 1": "warning"}
    assert bandwidth_cache.recall() == measured
    machine = known_speeds(Training())
    assert (machine.bus_gb_per_s, machine.host_gb_per_s) == (9.0, 7.0)
    assert machine.source_of("bus") is Source.KEPT


def test_a_lower_bandwidth_with_more_threads_is_a_warning() -> None:
    rising = list(bandwidth_findings({1: 10.0, 2: 20.0, 4: 19.0}, 0.1))
    assert {one.status for one in rising} == {"ok"}
    assert rising[0].topic == "bandwidth, 1 thread(s)"
    assert rising[3].found == "other processes used 0.1 of 4 core(s) meanwhile"
    falling = list(bandwidth_findings({1: 10.0, 2: 20.0, 4: 11.0}, 0.1))
    assert [one.status for one in falling] == ["ok", "ok", "warning", "ok"]
    assert "use 2 thread(s) for all ranks" in falling[2].advice
    # On a busy machine, other processes may be the reason.
    busy = list(bandwidth_findings({1: 10.0, 2: 20.0, 4: 11.0}, 3.0))
    assert [one.status for one in busy] == ["ok", "ok", "ok", "warning"]
    assert busy[3].topic == "load"
    assert busy[3].found == "other processes used 3.0 of 4 core(s) meanwhile"


def test_a_step_below_half_of_the_memory_bandwidth_is_a_warning() -> None:
    assert examination.step_finding(20.0, 40.0).status == "ok"
    slow = examination.step_finding(19.0, 40.0)
    assert slow.status == "warning"
    assert slow.found == "19.0 GB/s, 48% of the memory bandwidth"


def test_a_step_above_the_memory_bandwidth_is_no_share_of_it() -> None:
    wrong = examination.step_finding(88.0, 10.0)
    assert wrong.status == "warning"
    assert wrong.found == "88.0 GB/s, more than the 10.0 GB/s that the memory was measured at"
    assert wrong.advice == "run doctor again on an idle machine: one of them is wrong"


@pytest.mark.parametrize(("other_cores", "busy"), [(0.1, False), (1.5, True)])
def test_the_best_of_several_rounds_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other_cores: float, busy: bool
) -> None:
    """Another process slows some of the measurements down, each at another time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(examination, "threads_per_node", lambda *_, **__: 2)
    memory = iter([{1: 5.0, 2: 40.0}, {1: 20.0, 2: 4.0}, {1: 19.0, 2: 39.0}])
    steps = {
        "fp32": iter([3.0, 30.0, 31.0]),
        "bf16": iter([29.0, 2.0, 28.0]),
        "mixed": iter([1.0, 1.0, 27.0]),
        "int8": iter([26.0, 25.0, 1.0]),
    }
    monkeypatch.setattr(examination, "measure_bandwidth", lambda _: next(memory))
    monkeypatch.setattr(
        examination, "measure_step", lambda _, state_format: next(steps[state_format])
    )
    monkeypatch.setattr(OtherProcesses, "cores", lambda _: other_cores)
    monkeypatch.setattr(storage, "write_gb_per_s", lambda folder: 1.0)
    findings, measured = examine(1, tmp_path)
    best: dict[StateFormat, float] = {"bf16": 29.0, "mixed": 27.0, "int8": 26.0}
    assert measured == Bandwidth({1: 20.0, 2: 40.0}, 31.0, low_precision_steps=best, busy=busy)
    assert bandwidth_cache.recall() == measured
    saved = next(one.found for one in findings if one.topic == "saved bandwidths")
    assert ("since this machine was busy" in saved) == busy


def test_the_cores_of_other_processes_are_those_that_this_one_does_not_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In 10 s, cores 1 and 3 are busy for 9 s and 7 s, and this process uses 4 s of it."""
    idle = {"user": 0.0, "nice": 0.0, "system": 0.0, "irq": 0.0, "softirq": 0.0, "steal": 0.0}
    cores = [SimpleNamespace(**idle) for _ in range(4)]
    clock = {"own": 100.0, "now": 1000.0}
    monkeypatch.setattr(psutil, "cpu_times", lambda percpu: cores)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 3})
    monkeypatch.setattr(time, "process_time", lambda: clock["own"])
    monkeypatch.setattr(time, "perf_counter", lambda: clock["now"])
    others = OtherProcesses()
    cores[0].user = cores[2].user = 10.0  # not ours to use
    cores[1].user, cores[1].nice, cores[1].system = 5.0, 3.0, 1.0
    cores[3].irq, cores[3].softirq, cores[3].steal = 1.0, 2.0, 4.0
    clock.update(own=104.0, now=1010.0)
    assert others.cores() == pytest.approx((9.0 + 7.0 - 4.0) / 10.0)
    clock.update(own=200.0)  # clocks of different precision
    assert others.cores() == 0.0


def test_a_check_that_raises_does_not_stop_the_others() -> None:
    def check() -> Iterator[Finding]:
        yield Finding("first", "seen")
        raise OSError("gone")

    first, second = run_check("cores", check)
    assert first.found == "seen"
    assert second.status == "warning"
    assert "OSError: gone" in second.found

    def lacking() -> Iterator[Finding]:
        raise HostMemoryError("no room")

    assert next(run_check("bandwidth", lacking)).status == "failed"


def test_this_machine_can_be_checked_without_measuring(tmp_path: Path) -> None:
    findings, _ = examine(1, tmp_path, measure=False)
    topics = [one.topic for one in findings]
    expected = "affinity, CPU quota, local ranks, Numba's threads, threading layer, vector width, "
    expected += "host memory, locked memory, huge pages, NUMA"
    assert topics[:10] == expected.split(", ")
    assert not any("the check raised" in one.found for one in findings)
    assert not any(topic.startswith("bandwidth") for topic in topics)


def test_a_save_that_torchrun_would_kill_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """16 bytes a parameter: at 2 GB/s, 30 s are enough for 3.75e9 of them."""
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)
    monkeypatch.setattr(storage, "write_gb_per_s", lambda folder: 2.0)
    finding = storage.last_save(tmp_path, None)
    assert finding.status == "ok"
    assert "3.75 B parameters in the 30 s" in finding.found
    assert storage.last_save(tmp_path, 3.74e9).status == "ok"
    finding = storage.last_save(tmp_path, 7.5e9)
    assert finding.status == "warning"
    assert "saving 7.5 B takes 60 s, so the run would be killed" in finding.found
    assert "--shutdown-timeout=120" in finding.advice


def test_measuring_the_disk_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "7")
    monkeypatch.setattr(storage, "WRITE_NBYTES", 8 * 2**20)
    finding = storage.last_save(tmp_path / "to be made", 1e15)
    assert finding.status == "warning"
    assert "in the 7 s before torchrun kills it" in finding.found
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "soon")
    assert storage.last_save(tmp_path, None).status == "warning"
