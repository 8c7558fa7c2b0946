"""State of several ranks outlives their processes: all complete the step that any rank decided."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from offload_adam import OffloadAdamW, OffloadPolicy
from offload_adam.fsdp_private import local_of
from offload_adam.kept.file import Found
from offload_adam.kept.file import _open as open_file
from offload_adam.kept.folder import FolderHolder
from offload_adam.sharded_optimizer import ShardedOptimizer
from tests.support.fsdp2 import NUM_TOKENS, make_model, shard
from tests.support.ranks import RankPool

pytestmark = pytest.mark.filterwarnings("ignore:.* is not in memory:UserWarning")

KINDS = ("replicated", "bf16", "int8", "ddp", "fsdp2", "hsdp")


def build(kind: str, policy: OffloadPolicy) -> tuple[nn.Module, ShardedOptimizer]:
    dtype = torch.float32 if kind in ("replicated", "ddp", "fsdp2") else torch.bfloat16
    torch.manual_seed(dist.get_rank())  # the optimizer copies the parameters of rank 0
    model: Any = make_model(dtype)
    if kind == "ddp":
        model = DistributedDataParallel(model, find_unused_parameters=True)
    elif kind == "fsdp2":
        shard(model)
    elif kind == "hsdp":
        names = ("replicate", "shard")
        shard(model, mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=names))
    optimizer = OffloadAdamW(
        model.named_parameters(),
        lr=1e-2,
        module=model,
        max_grad_norm=1.0,
        num_threads=1,
        state_format="int8" if kind == "int8" else "fp32",
        offload=policy,
    )
    return model, optimizer


def train(
    model: nn.Module, optimizer: ShardedOptimizer, num_steps: int, first: int | None = None
) -> None:
    resumed = optimizer.resumed_step
    if first is None:
        first = 1 if resumed is None else resumed.step + 1
    for step in range(first, first + num_steps):
        generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
        tokens = torch.randint(0, NUM_TOKENS, (2, 4), generator=generator)
        model(tokens).float().square().mean().backward()
        optimizer.kept_extra = {"step": step, "rank": dist.get_rank()}
        optimizer.step()
        optimizer.zero_grad()


def values(model: nn.Module, optimizer: ShardedOptimizer) -> dict[str, torch.Tensor]:
    """Return this rank's parameters and state, and what all ranks should have."""
    optimizer.synchronize()
    found = {f"parameter {n}": local_of(p).detach().clone() for n, p in model.named_parameters()}
    for index, entry in optimizer.local_state_dict()["state"].items():
        for key, value in entry.items():
            found[f"{index} {key}"] = local_of(torch.as_tensor(value)).clone()
    return found


def undisturbed(rank: int, world_size: int, kind: str, num_steps: int) -> dict[str, torch.Tensor]:
    model, optimizer = build(kind, OffloadPolicy())
    train(model, optimizer, num_steps)
    found = values(model, optimizer)
    optimizer.close()
    return found


def kept_run(
    rank: int, world_size: int, kind: str, folder: str, num_steps: int
) -> tuple[int, dict[str, Any], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the step and the extra that were resumed, the values then, and those at the end."""
    policy = OffloadPolicy(keep="shared", keep_path=folder)
    model, optimizer = build(kind, policy)
    resumed = optimizer.resumed_step
    at_first = values(model, optimizer)
    train(model, optimizer, num_steps)
    at_last = values(model, optimizer)
    optimizer.close()
    return (
        0 if resumed is None else resumed.step,
        {} if resumed is None else resumed.extra,
        at_first,
        at_last,
    )


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_continue_to_the_bit(kind: str, ranks: RankPool, tmp_path: Path) -> None:
    folder = str(tmp_path / "kept")
    after_three = ranks.run(undisturbed, 2, kind, 3)
    after_five = ranks.run(undisturbed, 2, kind, 5)
    ranks.run(kept_run, 2, kind, folder, 3)
    outcomes = ranks.run(kept_run, 2, kind, folder, 2)
    for rank, (step, extra, at_first, at_last) in enumerate(outcomes):
        assert step == 3
        assert extra == {"step": 3, "rank": rank}
        assert_same(at_first, after_three[rank])
        assert_same(at_last, after_five[rank])


def found_in(path: Path) -> Found:
    file, _ = open_file(FolderHolder(path))
    found = file.found()
    file.close()
    return found


def copied_run(rank: int, world_size: int, folder: str, copy: str, before: tuple[int, ...]) -> None:
    """Train two steps, and copy this rank's file in the second one.

    Args:
        before: ranks that copy it right before they record the decision; others after the update.
    """
    model, optimizer = build("replicated", OffloadPolicy(keep="shared", keep_path=folder))
    train(model, optimizer, 1)
    kept, path = optimizer._alive().kept, Path(folder) / f"rank-{rank:05d}"
    assert kept is not None
    decide = kept.decide

    def copy_and_decide(*arguments: Any, **options: Any) -> int:
        if rank in before:
            shutil.copy(path, Path(copy) / path.name)
        return decide(*arguments, **options)

    kept.decide = copy_and_decide  # type: ignore[method-assign]
    train(model, optimizer, 1, first=2)
    optimizer.synchronize()
    if rank not in before:
        shutil.copy(path, Path(copy) / path.name)
    optimizer.close()


@pytest.mark.parametrize(("before", "step"), [((), 2), ((0,), 2), ((1,), 2), ((0, 1), 1)])
def test_a_step_is_decided_if_any_rank_has_recorded_it(
    before: tuple[int, ...], step: int, ranks: RankPool, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    expected = ranks.run(undisturbed, 2, "replicated", step)
    ranks.run(copied_run, 2, str(tmp_path / "kept"), str(copy), before)
    for rank in range(2):
        found = found_in(copy / f"rank-{rank:05d}")
        assert (found.prepared, found.decided) == (2, 1 if rank in before else 2)
    outcomes = ranks.run(kept_run, 2, "replicated", str(copy), 0)
    for rank, (resumed, extra, at_first, _) in enumerate(outcomes):
        assert resumed == step
        assert extra["step"] == step
        assert_same(at_first, expected[rank])


def reasons(rank: int, world_size: int, folder: str) -> tuple[bool, list[str]]:
    """Return whether the state was adopted, and what was logged about that."""
    messages: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    logger, handler = logging.getLogger("offload_adam"), Collect()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        policy = OffloadPolicy(keep="shared", keep_path=folder)
        _, optimizer = build("replicated", policy)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    optimizer.close()
    return optimizer.resumed_step is not None, [m for m in messages if "kept state" in m]


def test_a_rank_without_its_file_lets_all_begin_anew(ranks: RankPool, tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    ranks.run(kept_run, 2, "replicated", str(folder), 2)
    (folder / "rank-00001").unlink()
    outcomes = ranks.run(reasons, 2, str(folder))
    assert [adopted for adopted, _ in outcomes] == [False, False]
    assert "rank-00001" in outcomes[0][1][0]


def test_files_of_different_runs_are_not_mixed(ranks: RankPool, tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        ranks.run(kept_run, 2, "replicated", str(folder), 2)
    (other / "rank-00001").rename(one / "rank-00001")
    outcomes = ranks.run(reasons, 2, str(one))
    assert [adopted for adopted, _ in outcomes] == [False, False]
    assert "from different runs" in outcomes[0][1][0]


def test_another_world_size_begins_anew_and_deletes_what_is_left(
    ranks: RankPool, tmp_path: Path
) -> None:
    folder = tmp_path / "kept"
    ranks.run(kept_run, 2, "replicated", str(folder), 2)
    ((adopted, messages),) = ranks.run(reasons, 1, str(folder))
    assert not adopted
    assert "0 of 2" in messages[0]
    assert not (folder / "rank-00001").exists()
