"""Two hosts on one machine: network namespaces with a cable between them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.fault.runs import PATIENCE, ROOT, TINY, processes_of

pytestmark = [pytest.mark.fault, pytest.mark.timeout(300)]

ADDRESSES = ("10.77.0.1", "10.77.0.2")


class Host:
    """A network namespace that a sleeping process keeps open, with its end of the cable."""

    def __init__(self, holder: subprocess.Popen[bytes], address: str) -> None:
        self.holder = holder
        self.address = address

    def command(self, *words: str) -> list[str]:
        """Return the command that runs these words on this host."""
        enter = ["nsenter", f"--target={self.holder.pid}", "--user", "--net"]
        return [*enter, "--preserve-credentials", *words]

    def run(self, *words: str) -> None:
        subprocess.run(self.command(*words), check=True, capture_output=True, timeout=20)

    def plug_in(self) -> None:
        """Give the cable's end its address."""
        self.run("ip", "link", "set", "lo", "up")
        self.run("ip", "address", "add", f"{self.address}/24", "dev", "cable")
        self.run("ip", "link", "set", "cable", "up")


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    """Return two hosts that reach each other, or skip where the kernel does not let us."""
    if any(shutil.which(tool) is None for tool in ("ip", "nsenter", "unshare")):
        pytest.skip("no ip, nsenter or unshare")
    holders: list[subprocess.Popen[bytes]] = []
    try:
        first = Host(
            _hold(["unshare", "--user", "--map-root-user", "--net"], holders), ADDRESSES[0]
        )
        second = Host(_hold(first.command("unshare", "--net"), holders), ADDRESSES[1])
        peer = ("peer", "name", "cable", "netns", str(second.holder.pid))
        first.run("ip", "link", "add", "name", "cable", "type", "veth", *peer)
        first.plug_in()
        second.plug_in()
    except (subprocess.SubprocessError, OSError) as error:
        _end(holders)
        pytest.skip(f"no network namespaces here: {error}")
    yield [first, second]
    _end(holders)


def _hold(prefix: list[str], holders: list[subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
    holder = subprocess.Popen([*prefix, "sh", "-c", "echo ready; exec sleep 600"], stdout=-1)
    holders.append(holder)
    assert holder.stdout is not None
    if holder.stdout.readline() != b"ready\n":
        raise OSError(f"{prefix[0]} failed")
    return holder


def _end(holders: list[subprocess.Popen[bytes]]) -> None:
    for holder in holders:
        holder.kill()
        holder.wait(10)


def launch(hosts: list[Host], folder: Path, *overrides: str) -> list[subprocess.Popen[str]]:
    """Start `launch/multi_node.sh` on both hosts, one rank on each."""
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "NUM_NODES": "2",
        "HEAD_NODE": ADDRESSES[0],
        "RANKS_PER_NODE": "1",
        "NETWORK_INTERFACE": "cable",
    }
    processes = []
    for host in hosts:
        words = [str(ROOT / "launch" / "multi_node.sh"), str(TINY), f"--run.dir={folder}"]
        with (folder / f"printed-{host.address}").open("w") as printed:
            processes.append(
                subprocess.Popen(
                    host.command(*words, *PATIENCE, *overrides),
                    env=environment | {"LOCAL_ADDRESS": host.address},
                    cwd=folder,
                    stdout=printed,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
    return processes


def printed(folder: Path) -> str:
    return "\n\n".join(path.read_text() for path in sorted(folder.glob("printed-*")))


def wait_for_steps(folder: Path, num_steps: int) -> None:
    metrics = folder / "tiny" / "metrics.jsonl"
    deadline_s = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text().count("\n") >= num_steps):
        assert time.monotonic() < deadline_s, printed(folder)
        time.sleep(0.1)


def workers(folder: Path) -> list[psutil.Process]:
    """Return the ranks that live: torchrun's agents have no RANK."""
    found = []
    for process in processes_of(folder):
        try:
            if "RANK" in process.environ():
                found.append(process)
        except psutil.Error:
            continue
    return found


def end_all(folder: Path) -> None:
    for process in processes_of(folder):
        process.kill()


def test_two_hosts_train_together(hosts: list[Host], tmp_path: Path) -> None:
    processes = launch(hosts, tmp_path)
    try:
        codes = [process.wait(timeout=80) for process in processes]
    finally:
        end_all(tmp_path)
    assert codes == [0, 0], printed(tmp_path)
    lines = (tmp_path / "tiny" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 41))


def test_a_host_that_is_cut_off_ends_on_both_sides(hosts: list[Host], tmp_path: Path) -> None:
    processes = launch(hosts, tmp_path, "--train.num_steps=1000000")
    try:
        wait_for_steps(tmp_path, 3)
        hosts[0].run("ip", "link", "set", "cable", "down")
        start_s = time.monotonic()
        while workers(tmp_path):
            assert time.monotonic() - start_s < 30, printed(tmp_path)
            time.sleep(0.2)
        assert processes[0].wait(timeout=60) == 1
        # torchrun's agent on the other side waits some minutes more for its store, with no ranks.
    finally:
        end_all(tmp_path)
    first, second = ((tmp_path / f"printed-{host.address}").read_text() for host in hosts)
    assert "offload-adam: Rank 1 is dead: process " in first
    assert "has sent no heartbeat for " in first
    assert "The store has not answered for " in second
