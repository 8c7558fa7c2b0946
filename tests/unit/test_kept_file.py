"""Kept files: valid after every prefix of a write, and never believed if they are damaged."""

from __future__ import annotations

import errno
import mmap
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from offload_adam.errors import HostMemoryError, KeptInUseError, KeptStateError
from offload_adam.kept import file as module
from offload_adam.kept import space
from offload_adam.kept.file import Found, KeptFile, Sizes, peek
from offload_adam.kept.folder import FolderHolder
from offload_adam.kept.holder import NotKeptError
from offload_adam.kept.lock import KeptLock

ROOT = Path(__file__).parents[2]
IDENTITY = '{"model": {"shapes": [[3, 4], [5]]}, "rank": 1}'
SIZES = Sizes(prepared_nbytes=200, decision_nbytes=3000, undo_nbytes=100, arena_nbytes=5000)
RECORDS = {step: bytes([step]) * (80 + step) for step in range(1, 9)}
DECISIONS = {step: bytes([100 + step]) * (20 + step) for step in range(1, 9)}


@pytest.fixture
def path() -> Iterator[Path]:
    memory = Path("/dev/shm")
    folder = tempfile.mkdtemp(dir=memory if memory.is_dir() else None)
    yield Path(folder) / "kept" / "rank1"
    shutil.rmtree(folder)


def create(path: Path, sizes: Sizes = SIZES) -> KeptFile:
    return KeptFile.create(FolderHolder(path), IDENTITY, sizes)


def attach(path: Path) -> KeptFile:
    return KeptFile.attach(FolderHolder(path), IDENTITY, SIZES)


def write(kept: KeptFile, step: int) -> None:
    kept.write_prepared(step, RECORDS[step])
    kept.write_decision(step, DECISIONS[step])


class Killed(Exception):
    """The simulated end of the process."""


class Stores:
    """Lets a number of stores of at most 8 bytes happen, and then raises Killed."""

    def __init__(self, left: int) -> None:
        self.left = left

    def into(self, memory: Any) -> Any:
        return _Limited(self, memory)

    def count(self) -> None:
        if self.left == 0:
            raise Killed
        self.left -= 1


class _Limited:
    def __init__(self, stores: Stores, memory: Any) -> None:
        self._stores, self._memory = stores, memory

    def __len__(self) -> int:
        return len(self._memory)

    def __getitem__(self, key: Any) -> Any:
        return self._memory[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        if not isinstance(key, slice):
            self._stores.count()
            self._memory[key] = value
            return
        first = key.start or 0
        for start in range(0, len(value), 8):
            self._stores.count()
            part = value[start : start + 8]
            self._memory[first + start : first + start + len(part)] = part


def after_kills(path: Path, action: Callable[[KeptFile], object]) -> Iterator[KeptFile]:
    """Yield the file of `path`, as mapped by the next process, after each prefix of an action."""
    kept = attach(path)
    before = kept.mapping[:]
    for num_stores in range(1000):
        kept.mapping[:] = before
        stores, killed = Stores(num_stores), attach(path)
        killed.mapping, killed._words = stores.into(killed.mapping), stores.into(killed._words)
        try:
            action(killed)
        except Killed:
            yield attach(path)
        else:
            yield attach(path)
            return
    raise AssertionError("the action does not end")


def test_new_file_is_zeroed_and_its_parts_are_apart(path: Path) -> None:
    kept = create(path)
    assert kept.found() == Found(0, 0, 0)
    assert (kept.done, kept.valid_from) == (0, 0)
    assert kept.undo.shape == (100,)
    assert kept.undo.dtype == np.uint8
    assert not kept.undo.any()
    assert not any(kept.mapping[kept.arena_start :])
    # What is written into one part is in no other.
    kept.undo[:] = 1
    kept.mapping[kept.arena_start : kept.arena_start + 5000] = b"\2" * 5000
    for step, size in ((1, 200), (2, 200)):
        kept.write_prepared(step, bytes([10 + step]) * size)
        kept.write_decision(step, bytes([20 + step]) * SIZES.decision_nbytes)
    kept.valid_from, kept.done = 3, 4
    assert kept.begin_launch(5, 6) == 6
    other = attach(path)
    assert other.undo.tolist() == [1] * 100
    assert other.mapping[other.arena_start : other.arena_start + 5000] == b"\2" * 5000
    for step in (1, 2):
        assert other.read_prepared(step) == bytes([10 + step]) * 200
        assert other.read_decision(step) == bytes([20 + step]) * SIZES.decision_nbytes
    assert other.found() == Found(2, 2, 3)
    assert (other.done, other.begin_launch(5, 7)) == (4, 6)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("nbytes", [0, 1, 4096, 2**21 - 1, 2**21, 2**21 + 1])
@pytest.mark.parametrize("block_nbytes", [4096, 2**21])
def test_parts_are_aligned(
    path: Path, nbytes: int, block_nbytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        os,
        "fstatvfs",
        lambda _: SimpleNamespace(f_bsize=block_nbytes, f_blocks=0, f_bavail=0, f_frsize=1),
    )
    kept = create(path, Sizes(33, 44, 77, nbytes))
    assert kept.arena_start % (2**21 if nbytes >= 2**21 else mmap.PAGESIZE) == 0
    assert kept.undo.ctypes.data % 64 == 0
    assert kept.arena_start + nbytes <= len(kept.mapping) == path.stat().st_size
    assert len(kept.mapping) % block_nbytes == 0


def test_existing_file_is_replaced_but_its_mapping_stays(path: Path) -> None:
    old = create(path)
    write(old, 1)
    new = create(path)
    assert new.found() == Found(0, 0, 0)
    assert old.read_prepared(1) == RECORDS[1]
    path.unlink()
    path.symlink_to("target")
    create(path)
    assert not path.is_symlink()
    assert not (path.parent / "target").exists()


def test_records_alternate_between_two_slots(path: Path) -> None:
    kept = create(path)
    for step in range(1, 9):
        write(kept, step)
        assert attach(path).found() == Found(step, step, 0)
        for other in range(1, 9):
            is_there = other in (step - 1, step)
            assert kept.read_prepared(other) == (RECORDS[other] if is_there else None)
            assert kept.read_decision(other) == (DECISIONS[other] if is_there else None)
    assert kept.read_prepared(0) is None


def test_each_prefix_of_a_step_leaves_the_last_decided_one(path: Path) -> None:
    kept = create(path)
    write(kept, 1)
    write(kept, 2)
    seen = []
    for found in after_kills(path, lambda kept: write(kept, 3)):
        assert found.read_prepared(2) == RECORDS[2]
        assert found.read_decision(2) == DECISIONS[2]
        assert found.read_prepared(1) in (None, RECORDS[1])
        assert found.read_prepared(3) in (None, RECORDS[3])
        assert found.read_decision(1) in (None, DECISIONS[1])
        assert found.read_decision(3) in (None, DECISIONS[3])
        for step in (1, 3):  # no decision without what it decides
            assert found.read_prepared(step) or not found.read_decision(step)
        prepared = 3 if found.read_prepared(3) else 2
        decided = 3 if found.read_decision(3) else 2
        assert found.found() == Found(prepared, decided, 0)
        assert peek(FolderHolder(path)) == RECORDS[decided]
        seen.append((prepared, decided))
    assert seen == sorted(seen)
    assert set(seen) == {(2, 2), (3, 2), (3, 3)}


def test_prepared_record_can_be_replaced_before_its_decision(path: Path) -> None:
    kept = create(path)
    write(kept, 2)
    kept.write_prepared(3, RECORDS[3])
    for found in after_kills(path, lambda kept: kept.write_prepared(3, RECORDS[5])):
        content = found.read_prepared(3)
        assert content in (RECORDS[3], None, RECORDS[5])
        # While it is absent, its number says so, not only its checksum.
        assert found._words[found._layout.record(0, 3) // 8] == (3 if content else 0)
        assert found.found().decided == 2
        assert peek(FolderHolder(path)) == RECORDS[2]
    assert attach(path).read_prepared(3) == RECORDS[5]


def test_each_prefix_of_begin_launch_keeps_number_and_pieces_together(path: Path) -> None:
    kept = create(path)
    assert kept.begin_launch(7, 3) == 3
    kept.done = 7
    results = [
        found.begin_launch(8, 5) for found in after_kills(path, lambda k: k.begin_launch(8, 4))
    ]
    assert results == [5, 5, 4]
    assert attach(path).begin_launch(8, 9) == 4


def test_each_prefix_of_a_creation_is_no_kept_file(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for num_stores in range(1000):
        stores = Stores(num_stores)

        def map_new(*arguments: Any, stores: Stores = stores) -> Any:
            return stores.into(space.map_new(*arguments))

        monkeypatch.setattr(module, "map_new", map_new)
        try:
            create(path)
        except Killed:
            with pytest.raises(NotKeptError, match="creation was interrupted"):
                attach(path)
            assert peek(FolderHolder(path)) is None
        except TypeError:  # its mapping is not a real one, but the header is complete
            break
    assert attach(path).found() == Found(0, 0, 0)


WRITER = """
import sys
from pathlib import Path
from offload_adam.kept.file import KeptFile, Sizes
from offload_adam.kept.folder import FolderHolder

holder = FolderHolder(Path(sys.argv[1]))
holder.acquire(5)
kept = KeptFile.attach(holder, "killed", Sizes(5000, 5000, 0, 0))
print("writing", flush=True)
step = kept.found().decided
while True:
    step += 1
    kept.write_prepared(step, step.to_bytes(8) * 600)
    kept.write_decision(step, step.to_bytes(8))
"""


def test_file_of_a_killed_process_has_the_last_decided_step(path: Path) -> None:
    sizes, decided = Sizes(5000, 5000, 0, 0), 0
    KeptFile.create(FolderHolder(path), "killed", sizes).close()
    for seed in range(3):
        process = start(WRITER, path)
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        time.sleep(0.02 + random.Random(seed).random() * 0.02)
        process.kill()
        process.wait(10)
        kept = KeptFile.attach(FolderHolder(path), "killed", sizes)
        found = kept.found()
        assert found.decided > decided
        decided = found.decided
        assert found.prepared in (decided, decided + 1)
        for step in (found.prepared, decided):
            assert kept.read_prepared(step) == step.to_bytes(8) * 600
        assert kept.read_decision(decided) == decided.to_bytes(8)


@pytest.mark.parametrize("mask", [1, 0x80, 0xFF])
def test_changed_byte_of_the_header_is_noticed(path: Path, mask: int) -> None:
    kept = create(path)
    for index in range(module._HEADER.size + len(IDENTITY)):
        kept.mapping[index] ^= mask
        with pytest.raises(NotKeptError):
            attach(path)
        assert peek(FolderHolder(path)) is None
        kept.mapping[index] ^= mask
    attach(path)


@pytest.mark.parametrize("mask", [1, 0x80, 0xFF])
def test_changed_byte_of_a_record_is_noticed(path: Path, mask: int) -> None:
    kept = create(path)
    write(kept, 1)
    write(kept, 2)
    for kind, content in enumerate((RECORDS[2], DECISIONS[2])):
        start = kept._layout.record(kind, 2)
        for index in range(start, start + 24 + len(content)):
            kept.mapping[index] ^= mask
            assert (kept.read_prepared, kept.read_decision)[kind](2) is None
            assert kept.found()[kind] == 1
            assert kept.found()[1 - kind] == 2
            assert peek(FolderHolder(path)) == (None if kind == 0 else RECORDS[1])
            kept.mapping[index] ^= mask
    assert kept.found() == Found(2, 2, 0)


def test_record_that_is_too_long_is_not_read_even_with_a_right_checksum(path: Path) -> None:
    kept = create(path)
    for length, is_read in ((200, True), (201, False), (len(kept.mapping), False)):
        start = kept._layout.record(0, 2)
        content = kept.mapping[start + 24 : start + 24 + length]
        crc = zlib.crc32(content, zlib.crc32(struct.pack("=QQQ", 0, 2, len(content))))
        kept.mapping[start : start + 24] = struct.pack("=QQQ", 2, len(content), crc)
        assert (kept.read_prepared(2) is not None) == is_read


def test_content_that_does_not_fit_changes_nothing(path: Path) -> None:
    kept = create(path)
    write(kept, 1)
    before = kept.mapping[:]
    with pytest.raises(ValueError, match="201 bytes does not fit into 200 bytes"):
        kept.write_prepared(3, bytes(201))
    with pytest.raises(ValueError, match="3,001 bytes does not fit into 3,000 bytes"):
        kept.write_decision(1, bytes(3001))
    assert kept.mapping[:] == before
    with pytest.raises(ValueError, match="at most 1,048,576"):
        KeptFile.create(FolderHolder(path.with_name("long")), "x" * (2**20 + 1), SIZES)
    assert not path.with_name("long").exists()


@pytest.mark.parametrize(
    ("identity", "says"),
    [
        (IDENTITY.replace("5", "6"), r"identity.model.shapes\[1\]\[0\] is 5, not 6"),
        ('{"model": 3, "rank": 1}', "identity.model is .*, not 3"),
        ("[1]", r"identity is .*, not \[1\]"),
        ("x" * 50, "its identity differs"),
        (IDENTITY + " ", "its identity differs"),
        ("[" * 100_000, "its identity differs"),
    ],
)
def test_other_identity_is_told(path: Path, identity: str, says: str) -> None:
    create(path)
    with pytest.raises(NotKeptError, match=says):
        KeptFile.attach(FolderHolder(path), identity, SIZES)


@pytest.mark.parametrize("field", Sizes._fields)
def test_other_sizes_are_told(path: Path, field: str) -> None:
    create(path)
    with pytest.raises(NotKeptError, match=f"{field}=1[,)]"):
        KeptFile.attach(FolderHolder(path), IDENTITY, SIZES._replace(**{field: 1}))


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def _cut_to_header(path: Path) -> None:
    os.truncate(path, 70)


def _extend(path: Path) -> None:
    os.truncate(path, path.stat().st_size + 4096)


def _empty(path: Path) -> None:
    os.truncate(path, 0)


def _link(path: Path) -> None:
    path.symlink_to(path.rename(path.with_name("target")))


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _zeros(path: Path) -> None:
    path.write_bytes(bytes(100_000))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (Path.unlink, "does not exist"),
        (_truncate, "bytes instead of"),
        (_cut_to_header, "bytes instead of"),
        (_extend, "bytes instead of"),
        (_empty, "too short"),
        (_link, "symbolic links"),
        (_folder, "directory"),
        (_pipe, "not a regular file"),
        (_zeros, "no kept state"),
    ],
)
def test_other_file_is_not_attached(path: Path, change: Callable[[Path], None], says: str) -> None:
    write(create(path), 1)
    assert peek(FolderHolder(path)) == RECORDS[1]
    change(path)
    with pytest.raises((NotKeptError, KeptStateError), match=says):
        attach(path)
    assert peek(FolderHolder(path)) is None


def test_file_of_another_user_is_not_attached(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create(path)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(KeptStateError, match="belongs to user"):
        attach(path)


@pytest.mark.parametrize("index", range(3, 8))
@pytest.mark.parametrize("value", [0, 1, 2**31, 2**32 - 1, 2**62, 2**64 - 1])
def test_header_with_a_right_checksum_is_checked_too(path: Path, index: int, value: int) -> None:
    kept = create(path)
    *fields, _ = struct.unpack_from("=8sIIQQQQII", kept.mapping)
    fields[index] = min(value, 2**32 - 1) if index == 7 else value
    identity = kept.mapping[56 : 56 + min(fields[7], len(kept.mapping))]
    header = struct.pack("=8sIIQQQQI", *fields)
    kept.mapping[:56] = header + struct.pack("=I", zlib.crc32(identity, zlib.crc32(header)))
    with pytest.raises(NotKeptError):
        attach(path)
    assert peek(FolderHolder(path)) is None


def test_pages_are_allocated_as_asked(path: Path) -> None:
    sizes = SIZES._replace(arena_nbytes=2**22)
    kept = KeptFile.create(FolderHolder(path), IDENTITY, sizes)
    assert path.stat().st_blocks * 512 >= len(kept.mapping)
    kept = KeptFile.create(FolderHolder(path), IDENTITY, sizes, reserve=False)
    assert kept.arena_start <= path.stat().st_blocks * 512 <= len(kept.mapping) - 2**22
    KeptFile.attach(FolderHolder(path), IDENTITY, sizes)
    assert path.stat().st_blocks * 512 >= len(kept.mapping)


@pytest.mark.parametrize("reserve", [True, False])
def test_full_file_system_is_told_and_nothing_is_left(
    path: Path, monkeypatch: pytest.MonkeyPatch, reserve: bool
) -> None:
    system = SimpleNamespace(f_bsize=4096, f_frsize=4096, f_blocks=100, f_bavail=2)
    monkeypatch.setattr(os, "fstatvfs", lambda _: system)
    with pytest.raises(HostMemoryError, match=r"needs .* KiB.* 8.00 KiB free \(No space .*--shm"):
        KeptFile.create(FolderHolder(path), IDENTITY, SIZES, reserve=reserve)
    assert not path.exists()


def test_failed_allocation_is_told_and_nothing_is_left(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(code: int) -> Callable[[int, int, int], None]:
        def allocate(*_: int) -> None:
            raise OSError(code, os.strerror(code))

        return allocate

    for code in (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT):
        monkeypatch.setattr(os, "posix_fallocate", fail(code))
        with pytest.raises(HostMemoryError, match=os.strerror(code)):
            create(path)
        assert not path.exists()
        with pytest.raises(NotKeptError):
            attach(path)
    monkeypatch.setattr(os, "posix_fallocate", fail(errno.EIO))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        create(path)
    assert not path.exists()
    monkeypatch.setattr(os, "posix_fallocate", fail(errno.EOPNOTSUPP))
    create(path)
    attach(path)


def test_file_outside_memory_is_warned_of_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if path.parents[2] == Path("/dev/shm"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            create(path)
    monkeypatch.setattr(space, "_IN_MEMORY", ())
    with pytest.warns(UserWarning, match="is not in memory"):
        create(path.parent / "other" / "rank0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        create(path.parent / "other" / "rank1")


def test_views_outlive_close_and_remove(path: Path) -> None:
    kept = create(path)
    arena = np.frombuffer(kept.mapping, np.float32, 1000, kept.arena_start)
    undo = kept.undo
    kept.close()
    kept.close()
    arena[:] = 1.5
    undo[:] = 7
    other = attach(path)
    assert (
        np.frombuffer(other.mapping, np.float32, 1000, other.arena_start).tolist() == [1.5] * 1000
    )
    assert other.undo.tolist() == [7] * 100
    other.close()
    FolderHolder(path).remove()
    FolderHolder(path).remove()
    assert not path.exists()
    arena[:] = 2.5
    if sys.platform == "linux":
        maps = Path("/proc/self/maps")
        assert str(path) in maps.read_text()
        del arena, undo
        assert str(path) not in maps.read_text()


HOLDER = """
import os, sys, time
from pathlib import Path
from offload_adam.kept.lock import KeptLock

lock = KeptLock(Path(sys.argv[1]))
lock.acquire(5)
child = os.fork() if "fork" in sys.argv else 0
os.write(1, f"{child}\\n".encode())  # one write, which the other process does not interrupt
time.sleep(float(sys.argv[2]))
"""


def start(program: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


@pytest.fixture
def hold(path: Path) -> Iterator[Callable[..., tuple[subprocess.Popen[str], int]]]:
    """Start a process that holds the lock for some seconds; return it and its forked child."""
    started = []

    def start_one(hold_s: float, *options: str) -> tuple[subprocess.Popen[str], int]:
        process = start(HOLDER, path, hold_s, *options)
        assert process.stdout is not None
        child = max(int(process.stdout.readline()) for _ in range(1 + len(options)))
        started.append((process, child))
        return process, child

    yield start_one
    for process, child in started:
        process.kill()
        process.wait(10)
        if child:
            os.kill(child, signal.SIGKILL)


def test_lock_is_held_until_its_process_is_killed(path: Path, hold: Any) -> None:
    process, child = hold(100, "fork")
    lock = KeptLock(path)
    says = f"in use by process {process.pid} on {socket.gethostname()}, still after 0.1 s. Close"
    with pytest.raises(KeptInUseError, match=says):
        lock.acquire(0.1)
    process.kill()
    process.wait(10)
    os.kill(child, 0)  # the forked child lives, without the lock
    lock.acquire(0)
    lock.release()


def test_lock_waits_until_its_holder_ends(path: Path, hold: Any) -> None:
    hold(0.3)
    start_s = time.monotonic()
    KeptLock(path).acquire(10)
    assert 0.05 < time.monotonic() - start_s < 5


def test_lock_is_exclusive_within_a_process(path: Path) -> None:
    first, second = KeptLock(path), KeptLock(path.parent / ".." / path.parent.name / path.name)
    first.acquire(0)
    with pytest.raises(KeptInUseError, match=rf"of this process \({os.getpid()}\)"):
        second.acquire(0.1)
    # The attempt has not closed a descriptor of the file, which would have released the lock.
    process = start("import sys, fcntl; fcntl.lockf(open(sys.argv[1], 'r+'), 6)", f"{path}.lock")
    assert process.wait(10) == 1
    second.release()
    first.release()
    first.release()
    second.acquire(0)
    second.release()


def test_lock_file_is_not_a_link(path: Path) -> None:
    path.parent.mkdir()
    path.with_name("rank1.lock").symlink_to("target")
    with pytest.raises(OSError, match="symbolic link"):
        KeptLock(path).acquire(0)
