"""The thread plan: cores from mask and cgroup, shared by local ranks; the layer is checked."""

from __future__ import annotations

import linecache
import os
import threading
from pathlib import Path

import numba
import pytest
import torch

from offload_adam import OffloadAdam
from offload_adam.kernels import threads
from tests.support.scenario import Offloading
from tests.unit.kernel_subprocess import ONE_UPDATE, run_python


def write(path: Path, text: str) -> Path:
    """Write a file and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="ascii")
    return path


def test_a_version_2_quota_is_read(tmp_path: Path) -> None:
    own = write(tmp_path / "cgroup", "0::/jobs/ours\n")
    write(tmp_path / "fs/jobs/ours/cpu.max", "250000 100000\n")
    assert threads.cgroup_cores(own, tmp_path / "fs") == 2.5


def test_the_tightest_ancestor_holds(tmp_path: Path) -> None:
    own = write(tmp_path / "cgroup", "0::/jobs/ours/step\n")
    write(tmp_path / "fs/jobs/ours/step/cpu.max", "max 100000\n")
    write(tmp_path / "fs/jobs/ours/cpu.max", "800000 100000\n")
    write(tmp_path / "fs/jobs/cpu.max", "300000 100000\n")
    assert threads.cgroup_cores(own, tmp_path / "fs") == 3


def test_a_container_sees_its_own_cgroup_as_the_root(tmp_path: Path) -> None:
    own = write(tmp_path / "cgroup", "0::/docker/0123abc\n")
    write(tmp_path / "fs/cpu.max", "400000 100000\n")
    assert threads.cgroup_cores(own, tmp_path / "fs") == 4


def test_a_cgroup_outside_the_namespace_ends_at_the_root(tmp_path: Path) -> None:
    own = write(tmp_path / "cgroup", "0::/../../other\n")
    write(tmp_path / "fs/cpu.max", "400000 100000\n")
    assert threads.cgroup_cores(own, tmp_path / "fs") == 4


@pytest.mark.parametrize("mount", ["cpu", "cpu,cpuacct"])
@pytest.mark.parametrize("place", ["jobs/ours", "jobs", "."])
def test_a_version_1_quota_is_read(tmp_path: Path, mount: str, place: str) -> None:
    own = write(tmp_path / "cgroup", "5:memory:/jobs\n4:cpu,cpuacct:/jobs/ours\n1:name=systemd:/\n")
    write(tmp_path / "fs" / mount / place / "cpu.cfs_quota_us", "150000\n")
    write(tmp_path / "fs" / mount / place / "cpu.cfs_period_us", "50000\n")
    assert threads.cgroup_cores(own, tmp_path / "fs") == 3


@pytest.mark.parametrize(
    ("name", "text"),
    [("cpu.max", "max 100000\n"), ("cpu.max", ""), ("cpu.cfs_quota_us", "-1\n")],
)
def test_no_quota_is_no_limit(tmp_path: Path, name: str, text: str) -> None:
    own = write(tmp_path / "cgroup", "1:cpu:/\n0::/\n")
    write(tmp_path / "fs" / name, text)
    write(tmp_path / "fs/cpu" / name, text)
    assert threads.cgroup_cores(own, tmp_path / "fs") is None


def test_no_cgroup_at_all_is_no_limit(tmp_path: Path) -> None:
    assert threads.cgroup_cores(tmp_path / "missing", tmp_path) is None


@pytest.mark.parametrize(
    ("mask", "quota", "allowed"), [(8, None, 8), (8, 2.5, 2), (8, 0.5, 1), (2, 16.0, 2)]
)
def test_allowed_cores_are_the_mask_bounded_by_the_quota(
    monkeypatch: pytest.MonkeyPatch, mask: int, quota: float | None, allowed: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(mask)), raising=False)
    monkeypatch.setattr(threads, "cgroup_cores", lambda: quota)
    assert threads.allowed_cores() == allowed


@pytest.mark.parametrize(
    ("local_world_size", "share"), [(None, 8), ("1", 8), ("3", 2), ("8", 1), ("16", 1)]
)
def test_ranks_share_the_cores_whatever_torchrun_says(
    monkeypatch: pytest.MonkeyPatch, local_world_size: str | None, share: int
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(threads, "allowed_cores", lambda pid=0: 8)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "16")
    if local_world_size is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local_world_size)
    assert threads.cores_per_rank() == share
    assert threads.cores_per_rank(4) == 2
    assert threads.threads_per_rank(on_device=False) == share
    assert threads.threads_per_rank(on_device=True) == max(1, share - 1)


@pytest.mark.parametrize(
    ("local_world_size", "on_device", "of_rank", "of_node"),
    [
        (1, False, 8, 8),
        (1, True, 7, 7),
        (2, True, 3, 6),
        (3, False, 2, 6),
        (8, True, 1, 8),
        (16, True, 1, 8),
    ],
)
def test_the_thread_that_launches_a_devices_work_has_a_core_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
    local_world_size: int,
    on_device: bool,
    of_rank: int,
    of_node: int,
) -> None:
    monkeypatch.setattr(threads, "allowed_cores", lambda pid=0: 8)
    assert threads.threads_per_rank(local_world_size, on_device=on_device) == of_rank
    assert threads.threads_per_node(local_world_size, on_device=on_device) == of_node


@pytest.mark.parametrize(("given", "on_cpu", "on_device"), [(None, 8, 7), (5, 5, 5), (8, 8, 8)])
def test_an_optimizer_plans_the_threads_for_where_its_parameters_are(
    monkeypatch: pytest.MonkeyPatch, given: int | None, on_cpu: int, on_device: int
) -> None:
    monkeypatch.setattr(threads, "allowed_cores", lambda pid=0: 8)
    monkeypatch.setattr(numba.config, "NUMBA_NUM_THREADS", 8)
    monkeypatch.setattr(numba, "set_num_threads", lambda number: None)
    planned: list[int] = []
    for kind in (OffloadAdam, Offloading):
        optimizer = kind([torch.nn.Parameter(torch.ones(3))], num_threads=given)
        update = optimizer._alive()._host_update
        assert update is not None
        planned.append(update._num_threads)
        optimizer.close()
    assert planned == [on_cpu, on_device]


def test_nodes_are_those_of_the_cores_that_may_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for node, cores in enumerate(["0-1,8", "2-3", ""]):
        (tmp_path / f"node{node}").mkdir()
        (tmp_path / f"node{node}" / "cpulist").write_text(f"{cores}\n")
    for allowed, several in [({0, 8}, False), ({1, 2}, True), ({2}, False), ({99}, False)]:
        monkeypatch.setattr("os.sched_getaffinity", lambda pid, cores=allowed: cores)
        assert threads.spans_nodes(tmp_path) is several
    assert not threads.spans_nodes(tmp_path / "absent")


def test_a_plan_larger_than_numbas_pool_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_owner_pid", None)
    with pytest.warns(RuntimeWarning, match="num_threads=1000 is more than"):
        assert threads.plan_threads(1000) == 1000


def test_a_warning_about_threads_points_at_the_users_line() -> None:
    with pytest.warns(RuntimeWarning, match="num_threads=1000 is more than") as caught:
        OffloadAdam([torch.nn.Parameter(torch.ones(3))], num_threads=1000)
    assert [warning.filename for warning in caught] == [__file__]
    assert "num_threads=1000)" in linecache.getline(__file__, caught[0].lineno)


def test_the_plan_ignores_torchruns_one_and_names_the_layer() -> None:
    output = run_python(
        """
        import logging, sys, warnings
        logging.basicConfig(level=logging.INFO, stream=sys.stdout)
        warnings.simplefilter("error")
        import numba
        from offload_adam.kernels import threads
        cores = threads.allowed_cores()
        assert threads.plan_threads(None) == cores
        assert threads.plan_threads(None, on_device=True) == max(1, cores - 1)
        assert threads.plan_threads(1, on_device=True) == 1
        assert numba.threading_layer() == "omp"
        """,
        OMP_NUM_THREADS="1",
        LOCAL_WORLD_SIZE="1",
    )
    assert "thread(s) on the omp threading layer" in output


def test_workqueue_is_kept_where_the_user_asks_for_it_and_warns() -> None:
    output = run_python(
        """
        import warnings
        from offload_adam.kernels import threads
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            print(threads.select_threading_layer(), [str(one.message) for one in caught])
        """,
        NUMBA_THREADING_LAYER="workqueue",
    )
    assert (
        output.startswith("workqueue ['Only Numba's workqueue") or "workqueue threading" in output
    )
    assert "libgomp" in output


def test_a_forked_child_is_told_instead_of_ended() -> None:
    output = run_python(
        ONE_UPDATE
        + """
import os
threads.plan_threads(1)
run_one_update()
child = os.fork()
if child == 0:
    for refused in (lambda: threads.use_threads(1), lambda: threads.plan_threads(1)):
        try:
            refused()
        except RuntimeError as error:
            assert "spawn" in str(error)
        else:
            os._exit(1)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0, "the child ran on"
run_one_update()  # the parent's threads are still there
print("both as they should")
"""
    )
    assert output.endswith("both as they should\n")


@pytest.mark.parametrize(
    ("agent", "rank", "local_world_size", "share"),
    [(64, 64, 8, 8), (64, 32, 8, 8), (64, 8, 8, 8), (64, 4, 8, 4), (1, 8, 2, 4)],
)
def test_ranks_that_torchrun_has_bound_share_the_agents_cores(
    monkeypatch: pytest.MonkeyPatch, agent: int, rank: int, local_world_size: int, share: int
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    monkeypatch.setattr(threads, "cgroup_cores", lambda: None)
    cores = {0: rank, os.getppid(): agent}
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores[pid])), raising=False)
    assert threads.cores_per_rank(local_world_size) == share


def test_a_thread_of_this_package_sets_its_number_of_threads_only_if_it_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[int] = []
    monkeypatch.setattr(numba, "set_num_threads", given.append)

    def launch_some() -> None:
        for number in (1, 1, 2, 2, 1):
            threads.use_threads(number)

    def claim_and_launch() -> None:
        threads.claim_thread()
        launch_some()

    most = numba.config.NUMBA_NUM_THREADS
    for run, expected in ((launch_some, (1, 1, 2, 2, 1)), (claim_and_launch, (1, 2, 1))):
        given.clear()
        thread = threading.Thread(target=run)
        thread.start()
        thread.join(60.0)
        assert given == [min(number, most) for number in expected]
