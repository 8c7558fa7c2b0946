"""The keeper: a file outlives its process, has one user at a time, and is freed in the end."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from offload_adam.cli.app import app
from offload_adam.errors import KeptInUseError, KeptStateError
from offload_adam.kept import keeper, keeper_client
from offload_adam.kept.file import KeptFile, Sizes, peek
from offload_adam.kept.holder import NotKeptError
from offload_adam.kept.keeper_client import KeeperHolder, running_keepers
from offload_adam.kept.record import pack
from tests.support.keepers import keeper_folder, keeper_in, kill_keeper, wait_until
from tests.support.torchrun import ROOT

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs Linux"),
    pytest.mark.timeout(60),
]
SIZES = Sizes(prepared_nbytes=400, decision_nbytes=300, undo_nbytes=100, arena_nbytes=5000)
NAME = "rank-00000"
USER = """
import os, sys, time
from pathlib import Path
from offload_adam.kept.file import KeptFile, Sizes
from offload_adam.kept.keeper_client import KeeperHolder
from offload_adam.kept.record import pack

holder = KeeperHolder(Path(sys.argv[1]), "rank-00000", float(sys.argv[2]))
holder.acquire(0.0)
file = KeptFile.create(holder, "identity", Sizes(*map(int, sys.argv[3:])))
file.write_prepared(1, pack({"num_steps": 41}, {}))
file.write_decision(1, b"decided")
file.mapping[file.arena_start] = 7
child = os.fork()
os.write(1, f"{child}\\n".encode())
time.sleep(100)
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    with keeper_folder() as one:
        yield one


@pytest.fixture
def user(folder: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Start a process that has created a file and decided step 42, and a forked child of it."""
    with subprocess.Popen(
        [sys.executable, "-c", USER, str(folder), "900", *map(str, SIZES)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    ) as process:
        assert process.stdout is not None
        children = [int(process.stdout.readline()) for _ in range(2)]
        yield process, max(children)
        process.kill()
        os.kill(max(children), signal.SIGKILL)


def holder_of(folder: Path, name: str = NAME, keep_for_s: float = 900.0) -> KeeperHolder:
    return KeeperHolder(folder, name, keep_for_s)


def acquired(folder: Path, name: str = NAME, keep_for_s: float = 900.0) -> KeeperHolder:
    holder = holder_of(folder, name, keep_for_s)
    holder.acquire(5.0)
    return holder


def pid_of(folder: Path) -> int:
    found = keeper_in(folder)
    assert found is not None
    return found.pid


def connect(folder: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(10)
    connection.connect(str(folder / keeper.SOCKET_NAME))
    return connection


def test_file_of_a_killed_process_has_one_user_and_is_intact(
    folder: Path, user: tuple[subprocess.Popen[str], int]
) -> None:
    process, child = user
    holder = holder_of(folder)
    assert peek(holder) == pack({"num_steps": 41}, {})  # while it is in use
    says = f"in use by process {process.pid} on {socket.gethostname()}, still after 0.1 s. Close"
    with pytest.raises(KeptInUseError, match=says):
        holder.acquire(0.1)
    holder.release()
    process.kill()
    process.wait(10)
    os.kill(child, 0)  # the forked child lives, with the connection
    holder.acquire(5.0)
    file = KeptFile.attach(holder, "identity", SIZES)
    assert file.read_decision(1) == b"decided"
    assert file.mapping[file.arena_start] == 7
    assert file.mapping[file.arena_start + 1 :] == bytes(len(file.mapping) - file.arena_start - 1)
    assert holder.names() == [NAME]
    file.close()
    holder.release()


def test_process_has_a_file_once(folder: Path) -> None:
    first, second = acquired(folder), holder_of(folder)
    with pytest.raises(KeptInUseError, match=f"by another optimizer of this process {os.getpid()}"):
        second.acquire(0.1)
    second.release()  # not that of the first
    with pytest.raises(KeptInUseError):
        second.acquire(0.0)
    acquired(folder, "rank-00001").release()
    first.release()
    first.release()
    second.acquire(0.0)


def test_only_its_user_changes_a_file(folder: Path) -> None:
    holder = acquired(folder)
    os.close(holder.create())
    other = holder_of(folder)
    other.remove()
    assert holder.has_file()
    with closing(connect(folder)) as connection:
        keeper.send(connection, {"do": "remove", "name": NAME})
        with pytest.raises(ConnectionError):
            keeper.receive(connection)
    assert holder.has_file()
    holder.remove()
    assert not holder.has_file()
    with pytest.raises(NotKeptError, match="does not exist"):
        KeptFile.attach(holder, "", SIZES)


def test_closed_connection_of_a_live_process_still_uses_its_file(folder: Path) -> None:
    """Until it ends: a GPU may write to memory of a process that is being killed."""
    first = acquired(folder)
    first._disconnect()
    with pytest.raises(KeptInUseError, match="this process"):
        holder_of(folder).acquire(0.2)


def test_deleted_socket_is_warned_of(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    holder = acquired(folder)
    (folder / keeper.SOCKET_NAME).unlink()
    for _ in range(2):
        holder.check()
    assert caplog.text.count("its socket was deleted") == 1
    holder.release()


def test_keeper_that_is_stopped_is_an_error_and_loses_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper_client, "_ANSWER_S", 0.3)
    holder = acquired(folder)
    os.close(holder.create())
    pid = pid_of(folder)
    os.kill(pid, signal.SIGSTOP)
    for look in (holder.open, holder_of(folder).open, lambda: holder_of(folder).acquire(0.0)):
        with pytest.raises(KeptStateError, match=rf"process {pid}, does not answer"):
            look()
    assert holder_of(folder).has_file()
    os.kill(pid, signal.SIGCONT)
    holder.release()  # over a new connection
    after = acquired(folder)
    assert after.has_file()
    after.release()


def test_process_that_executes_itself_attaches_again(folder: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path;"
        "from offload_adam.kept.keeper_client import KeeperHolder;"
        "holder = KeeperHolder(Path(sys.argv[1]), 'rank-00000', 900.0); holder.acquire(5.0);"
        "assert holder.has_file() == (sys.argv[2] == 'again');"
        "holder.create();"
        "sys.argv[2] == 'again' or os.execv(sys.executable, [*sys.orig_argv[:-1], 'again'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder), "once"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr


def test_look_does_not_extend_the_time_but_open_does(folder: Path) -> None:
    holder = acquired(folder)
    os.close(holder.create())
    holder.release()
    time.sleep(0.3)
    for keep_for_s, is_extended in ((None, False), (900.0, True)):
        assert KeeperHolder(folder, NAME, keep_for_s).has_file()
        found = keeper_in(folder)
        assert found is not None
        assert found.left_s is not None
        assert (found.left_s > 899.8) == is_extended


def test_list_allocates_no_pages(folder: Path) -> None:
    holder = acquired(folder)
    kept = KeptFile.create(holder, "identity", SIZES._replace(arena_nbytes=2**26), reserve=False)
    assert invoke("list").exit_code == 0
    assert os.fstat(kept._pages._file).st_blocks * 512 < 2**25
    holder.release()


def test_files_are_freed_after_keep_for(folder: Path) -> None:
    holder = acquired(folder, keep_for_s=0.5)
    os.close(holder.create())
    time.sleep(0.8)
    assert holder.has_file()  # in use
    process = psutil.Process(pid_of(folder))
    holder.release()
    assert holder_of(folder).has_file()
    start_s = time.monotonic()
    process.wait(10)
    assert time.monotonic() - start_s > 0.2
    assert not holder_of(folder).has_file()
    assert not (folder / keeper.SOCKET_NAME).exists()
    acquired(folder).release()  # by a new keeper
    assert pid_of(folder) != process.pid


def test_keeper_without_files_ends(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = keeper.Keeper(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    monkeypatch.setattr(keeper, "_EMPTY_S", 0.1)
    server._keep_for_s = 900.0
    start_s = time.monotonic()
    server.serve()
    assert time.monotonic() - start_s < 5


def test_process_goes_on_if_its_keeper_is_killed(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    holder = acquired(folder)
    file = KeptFile.create(holder, "identity", SIZES)
    holder.check()
    assert "has ended" not in caplog.text
    kill_keeper(folder)
    for _ in range(3):
        holder.check()
    (record,) = [one for one in caplog.records if "has ended" in one.getMessage()]
    assert record.levelno == logging.WARNING
    assert f"The keeper in {folder} has ended" in record.getMessage()
    file.mapping[file.arena_start] = 1
    assert not holder.has_file()
    assert holder.names() == []
    holder.remove()
    os.close(holder.create())
    holder.release()
    holder.acquire(5.0)  # starts another, beside the old socket
    assert not holder.has_file()
    holder.release()


@pytest.mark.parametrize("method", ["create", "remove"])
def test_request_to_a_killed_keeper_is_warned_of(
    folder: Path, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    holder = acquired(folder)
    kill_keeper(folder)
    getattr(holder, method)()
    assert "no longer kept" in caplog.text


def test_many_start_one_keeper(folder: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from offload_adam.kept.keeper_client import *;"
        "holder = KeeperHolder(Path(sys.argv[1]), sys.argv[2], 900.0); holder.acquire(5.0);"
        "holder.create(); print(flush=True); input(); assert holder.has_file()"
    )
    users = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(folder), f"rank-{rank:05d}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        for rank in range(4)
    ]
    for process in users:
        assert process.stdout is not None
        assert process.stdout.readline() == "\n"
    found = keeper_in(folder)  # fails if there are two
    assert found is not None
    assert found.files is not None
    pids = {name: file.pid for name, file in found.files.items()}
    assert pids == {f"rank-{rank:05d}": process.pid for rank, process in enumerate(users)}
    for process in users:
        process.communicate("\n", timeout=10)
        assert process.returncode == 0


def test_keeper_is_detached_and_small(folder: Path) -> None:
    with open(ROOT / "README.md", "rb") as inherited:
        os.set_inheritable(inherited.fileno(), True)
        holder = acquired(folder)
        process = psutil.Process(pid_of(folder))
        names = [os.readlink(link) for link in Path(f"/proc/{process.pid}/fd").iterdir()]
    assert not any("README.md" in name or "pipe" in name for name in names)
    assert os.getsid(process.pid) not in (os.getsid(0), 0)
    assert process.ppid() != os.getpid()
    assert process.cwd() == "/"
    assert process.memory_info().rss < 40e6
    assert (folder / keeper.SOCKET_NAME).stat().st_mode & 0o077 == 0
    assert folder.stat().st_mode & 0o077 == 0
    holder.release()


def test_connections_leave_no_descriptors(folder: Path) -> None:
    holder = acquired(folder)
    os.close(holder.create())
    process, own = psutil.Process(pid_of(folder)), psutil.Process()
    before = process.num_fds(), own.num_fds()
    for _ in range(50):
        assert holder_of(folder).has_file()
        assert holder.has_file()
        with pytest.raises(KeptInUseError):
            holder_of(folder).acquire(0.0)
        os.close(holder.create())
    wait_until(lambda: process.num_fds() <= before[0])
    assert own.num_fds() == before[1]


@pytest.mark.parametrize(
    "packet",
    [
        b"x",
        b"[]",
        b"{}",
        b'{"do": 1}',
        b'{"do": "open"}',
        b'{"do": "open", "name": []}',
        b'{"do": "acquire", "name": "x"}',
        b'{"do": "open", "name": "x", "looks": true',
        b'{"do": "acquire", "name": "x", "keep_for_s": [], "program": ""}',
        b'{"do": "acquire", "name": "x", "keep_for_s": NaN, "program": ""}',
        b'{"do": "acquire", "name": "x", "keep_for_s": ' + b"9" * 400 + b', "program": ""}',
        b'{"do": "create", "name": "x"}',
        b'{"do": "release", "name": "x"}',
        b'{"do": "unknown", "name": "x"}',
        b"[" * 100_000,
        b'"' + b"\xff" * 100_000,
    ],
)
def test_malformed_requests_end_their_connection_only(folder: Path, packet: bytes) -> None:
    holder = acquired(folder)
    with closing(connect(folder)) as connection:
        file = os.open("/dev/null", os.O_RDONLY)
        socket.send_fds(connection, [packet], [file])
        os.close(file)
        with pytest.raises(ConnectionError):
            keeper.receive(connection)
    assert not holder.has_file()
    os.close(holder.create())
    assert holder.has_file()


def test_client_that_does_not_read_is_dropped(folder: Path) -> None:
    holder = acquired(folder)
    with closing(connect(folder)) as connection:

        def flood() -> None:
            for _ in range(100_000):
                keeper.send(connection, {"do": "describe"})

        with pytest.raises(OSError, match=r"reset|pipe"):
            flood()
    holder.release()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_other_users_are_not_served(folder: Path) -> None:
    holder = acquired(folder)
    os.close(holder.create())
    for path in (folder.parent, folder, folder / keeper.SOCKET_NAME):
        path.chmod(0o777)
    program = (
        "import socket, sys; s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET);"
        "s.settimeout(10); s.connect(sys.argv[1]);\n"
        'try: s.send(b\'{"do": "describe"}\'); print(len(s.recv(1000)) > 0)\n'
        "except ConnectionError: print(False)"
    )
    for user, is_served in ((os.geteuid(), "True"), (65534, "False")):
        done = subprocess.run(
            ["python3", "-c", program, folder / keeper.SOCKET_NAME],
            user=user,
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
            env={"PATH": os.environ["PATH"]},
        )
        assert done.stdout.split() == [is_served], done
    assert holder.has_file()


def test_keeper_of_another_user_is_not_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    acquired(folder).release()
    monkeypatch.setattr(keeper, "credentials", lambda _: (1, os.geteuid() + 1))
    with pytest.raises(KeptStateError, match=f"has the keeper of user {os.geteuid() + 1}"):
        holder_of(folder).acquire(0.0)


def test_keeper_of_another_version_is_rejected(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    acquired(folder).release()
    monkeypatch.setattr(keeper, "PROTOCOL", 2)
    with pytest.raises(KeptStateError, match=rf"another version .*keeper stop {folder}`"):
        holder_of(folder).acquire(0.0)


def test_folder_that_cannot_have_a_keeper_is_named(folder: Path) -> None:
    folder.write_text("")
    with pytest.raises(KeptStateError, match=rf"{folder} cannot be opened: Not a directory"):
        holder_of(folder).acquire(0.0)
    missing = Path("/proc/nowhere/kept")
    with pytest.raises(KeptStateError, match=rf"{missing} cannot have a keeper: .*No such file"):
        holder_of(missing).acquire(0.0)


def test_folder_may_have_a_long_path(folder: Path) -> None:
    deep = folder / "/".join(["x" * 100] * 4)
    holder = acquired(deep)
    os.close(holder.create())
    assert holder_of(deep).has_file()
    assert holder.has_file()


def test_forked_child_does_not_use_the_connection(folder: Path) -> None:
    holder = acquired(folder)
    os.close(holder.create())
    child = os.fork()
    if child == 0:
        holder.remove()
        holder.release()
        os._exit(0)
    os.waitpid(child, 0)
    assert holder.has_file()
    with pytest.raises(KeptInUseError):
        holder_of(folder).acquire(0.0)


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["keeper", *arguments])


def test_list_and_stop(folder: Path, user: tuple[subprocess.Popen[str], int]) -> None:
    process, _ = user
    listed = json.loads(invoke("list", "--json").stdout)
    (one,) = [entry for entry in listed if entry["folder"] == str(folder)]
    file = one["files"][NAME]
    assert (file["pid"], file["step"], one["left_s"]) == (process.pid, 42, None)
    assert 0 <= file["age_s"] < 30
    assert file["nbytes"] > 5000
    text = invoke("list").stdout
    assert "42" in text
    assert invoke("stop").exit_code == 1
    assert invoke("stop", "--all", str(folder)).exit_code == 1
    refused = invoke("stop", str(folder))
    assert refused.exit_code == 1
    assert f"Process(es) [{process.pid}] use the state in {folder}" in refused.stderr
    assert keeper_in(folder) is not None
    process.kill()
    process.wait(10)
    wait_until(lambda: holder_of(folder).has_file() and "freed in" in invoke("list").stdout)
    (one,) = [e for e in json.loads(invoke("list", "--json").stdout) if e["folder"] == str(folder)]
    assert one["files"][NAME]["pid"] is None
    assert 800 < one["left_s"] <= 900
    done = invoke("stop", f"{folder}/../{folder.name}")
    assert done.exit_code == 0, done.output
    assert keeper_in(folder) is None
    assert not (folder / keeper.SOCKET_NAME).exists()
    assert "has no keeper on this node" in invoke("stop", str(folder)).stderr


def test_stop_with_force_ends_a_keeper_in_use(folder: Path) -> None:
    holder = acquired(folder)
    os.close(holder.create())
    assert invoke("stop", "--force", str(folder)).exit_code == 0
    assert not [one for one in running_keepers() if one.folder == folder]
