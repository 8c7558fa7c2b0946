"""Writes after an optimizer's end, and those of forked children, do not reach the kept file."""

from __future__ import annotations

import gc
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from offload_adam import OffloadAdamW, OffloadPolicy
from offload_adam.errors import KeptInUseError
from offload_adam.kept.file import KeptFile, Sizes
from offload_adam.kept.folder import FolderHolder
from offload_adam.kept.pages import FilePages
from offload_adam.options import StateFormat
from offload_adam.sharded_optimizer import ShardedOptimizer
from tests.support.devices import HOST_AS_DEVICE
from tests.support.keepers import keeper_folder, kill_keeper

Place = dict[str, Any]
"""Arguments of `optimizer_of`."""

pytestmark = pytest.mark.filterwarnings("ignore:.* is not in memory:UserWarning")

ROOT = Path(__file__).parents[2]
PAGE = mmap.PAGESIZE
SIZES = Sizes(100, 100, 100, 4 * PAGE)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def arena_of(kept: KeptFile) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.frombuffer(kept.mapping, np.uint8, 4 * PAGE, kept.arena_start)


def test_private_pages_keep_their_addresses_and_copied_ones_their_values(tmp_path: Path) -> None:
    path = tmp_path / "rank"
    kept = KeptFile.create(FolderHolder(path), "{}", SIZES)
    arena = arena_of(kept)
    arena[:] = np.arange(4 * PAGE) % 251
    before = arena.copy()
    # From the middle of page 1 into page 2.
    kept.make_private([(arena.ctypes.data + PAGE + 100, PAGE)])
    assert (arena == before).all()
    arena[:10] = 255
    kept.valid_from = 7
    other = KeptFile.attach(FolderHolder(path), "{}", SIZES)
    assert (arena_of(other) == before).all()
    assert other.valid_from == 0
    arena_of(other)[:] = 9
    assert (arena[:10] == 255).all()
    assert (arena[10:PAGE] == before[10:PAGE]).all()  # copied by the first write to the page
    assert (arena[PAGE : 3 * PAGE] == before[PAGE : 3 * PAGE]).all()
    assert (arena[3 * PAGE :] == 9).all()
    kept.close()
    kept.make_private()
    assert (arena[PAGE : 3 * PAGE] == before[PAGE : 3 * PAGE]).all()


def test_pages_of_a_removed_file_are_private_but_not_copied(tmp_path: Path) -> None:
    kept = KeptFile.create(FolderHolder(tmp_path / "rank"), "{}", SIZES)
    arena = arena_of(kept)
    with (tmp_path / "rank").open("r+b", buffering=0) as file:
        FolderHolder(tmp_path / "rank").remove()
        kept.make_private()
        arena[0] = 1
        file.seek(kept.arena_start)
        assert file.read(4 * PAGE) == bytes(4 * PAGE)
        file.seek(kept.arena_start + PAGE)
        file.write(b"\2")
    assert arena[[0, PAGE]].tolist() == [1, 2]


def test_views_by_torch_outlive_close(tmp_path: Path) -> None:
    kept = KeptFile.create(FolderHolder(tmp_path / "rank"), "{}", SIZES)
    view = torch.frombuffer(kept.mapping, dtype=torch.uint8, offset=kept.arena_start)
    kept.close()
    assert view.fill_(3).sum() == 3 * view.numel()


def test_close_without_its_object_closes_the_descriptor(tmp_path: Path) -> None:
    kept = KeptFile.create(FolderHolder(tmp_path / "rank"), "{}", SIZES)
    file = kept._pages._file
    assert not os.get_inheritable(file)
    kept.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(file)


def net(dtype: torch.dtype, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(*[nn.Linear(64, 64, dtype=dtype) for _ in range(3)])


@pytest.fixture(params=["shared", "keeper"])
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    with keeper_folder() as folder:
        yield {"folder": str(folder), "keep": request.param}


def optimizer_of(
    model: nn.Module, folder: str, keep: Any = "shared", **options: Any
) -> OffloadAdamW:
    policy = OffloadPolicy(
        keep=keep, keep_path=folder, attach_timeout=0.0, bucket_nbytes=16384, **options
    )
    # Parameters in bfloat16 are then the high halves of their master weights.
    is_split = next(model.parameters()).dtype == torch.bfloat16
    state_format: StateFormat = "bf16" if is_split else "fp32"
    return OffloadAdamW(model.parameters(), lr=0.1, state_format=state_format, offload=policy)


def train(model: nn.Sequential, optimizer: OffloadAdamW, num_steps: int = 1) -> None:
    for step in range(num_steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(4, 64, generator=generator, dtype=torch.float32)
        model(x.to(next(model.parameters()).dtype)).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.synchronize()


def values(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(model: nn.Module, expected: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, model.parameters(), expected))


def drop(optimizers: list[OffloadAdamW]) -> None:
    optimizers.clear()
    gc.collect()


def close(optimizers: list[OffloadAdamW]) -> None:
    optimizers[0].close()


@DTYPES
@pytest.mark.parametrize("end", [close, drop])
def test_writes_after_the_end_do_not_reach_the_file(
    end: Callable[[list[OffloadAdamW]], None], dtype: torch.dtype, place: Place
) -> None:
    model = net(dtype)
    optimizers = [optimizer_of(model, **place)]
    train(model, optimizers[0], 2)
    expected = values(model)
    end(optimizers)
    assert same(model, expected)
    with torch.no_grad():
        next(model.parameters()).zero_()
    later = net(dtype, seed=1)
    second = optimizer_of(later, **place)
    assert second.resumed_step is not None
    assert second.resumed_step.step == 2
    assert same(later, expected)
    second.close()


@DTYPES
@pytest.mark.parametrize("end", [close, drop])
def test_the_next_optimizer_does_not_change_the_old_model(
    end: Callable[[list[OffloadAdamW]], None], dtype: torch.dtype, place: Place
) -> None:
    model = net(dtype)
    optimizers = [optimizer_of(model, **place)]
    train(model, optimizers[0])
    expected = values(model)
    end(optimizers)
    later = net(dtype, seed=1)
    second = optimizer_of(later, **place)
    train(later, second, 2)
    assert not any(map(torch.equal, later.parameters(), expected))
    assert same(model, expected)
    second.close()


FORK = """
import os, sys
import torch
from tests.unit.test_kept_private import net, optimizer_of, same, train, values

dtype, place = getattr(torch, sys.argv[1]), {"folder": sys.argv[2], "keep": sys.argv[3]}
torch.set_num_threads(1)
model = net(dtype)
optimizer = optimizer_of(model, **place)
train(model, optimizer)
expected = values(model)
pid = os.fork()
if pid == 0:
    assert same(model, expected)
    for parameter in model.parameters():
        parameter.data.zero_()
    optimizer._core.kept.file.valid_from = 99
    grandchild = os.fork()
    assert not any(parameter.any() for parameter in model.parameters())
    if grandchild:
        assert os.waitpid(grandchild, 0)[1] == 0
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
assert same(model, expected)
assert optimizer._core.kept.file.valid_from == 1
train(model, optimizer, 2)  # the parent's pages are still those of the file
expected = values(model)
optimizer.close()
later = net(dtype, seed=1)
second = optimizer_of(later, **place)
assert second.resumed_step.step == 3 and same(later, expected)
"""


@DTYPES
def test_writes_of_a_forked_child_stay_in_it(dtype: torch.dtype, place: Place) -> None:
    command = [sys.executable, "-c", FORK, str(dtype).removeprefix("torch."), *place.values()]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr


def test_parameters_that_cannot_be_copied_keep_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = net(torch.float32)
    optimizer = optimizer_of(model, str(tmp_path))
    train(model, optimizer)

    def fail(*_: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(FilePages, "make_private", fail)
    optimizer.close()
    assert "could not be copied (Cannot allocate memory)" in caplog.text
    with pytest.raises(KeptInUseError):
        optimizer_of(net(torch.float32), str(tmp_path))


def test_a_simulated_device_with_pinned_state_closes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ShardedOptimizer, "_backend", HOST_AS_DEVICE)
    model = net(torch.bfloat16)
    optimizer = optimizer_of(model, str(tmp_path), pin="all")
    train(model, optimizer)
    expected = values(model)
    exp_avg = optimizer.state[next(model.parameters())]["exp_avg"]
    optimizer.close()
    exp_avg.zero_()  # a view of the file, too
    later = net(torch.bfloat16, seed=1)
    second = optimizer_of(later, str(tmp_path), pin="all")
    assert same(later, expected)
    assert second.state[next(later.parameters())]["exp_avg"].all()
    second.close()


def test_parameters_of_discarded_state_are_not_copied(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[Any] = []
    monkeypatch.setattr(FilePages, "make_private", lambda _, pieces: copied.append(list(pieces)))
    for discards in (False, True):
        model = net(torch.float32)
        optimizer = optimizer_of(model, **place)
        train(model, optimizer)
        if discards:
            optimizer.discard_kept()
        optimizer.close()
    assert [bool(pieces) for pieces in copied] == [True, False]


def test_training_goes_on_without_its_keeper(caplog: pytest.LogCaptureFixture) -> None:
    with keeper_folder() as folder:
        model = net(torch.float32)
        optimizer = optimizer_of(model, str(folder), "keeper")
        train(model, optimizer)
        kill_keeper(folder)
        assert "no longer kept" not in caplog.text
        train(model, optimizer, 3)
        assert caplog.text.count("no longer kept") == 1
        expected = net(torch.float32)
        plain = OffloadAdamW(expected.parameters(), lr=0.1)
        for num_steps in (1, 3):
            train(expected, plain, num_steps)
        assert same(model, values(expected))
        optimizer.close()
        plain.close()
        assert optimizer_of(net(torch.float32), str(folder), "keeper").resumed_step is None
