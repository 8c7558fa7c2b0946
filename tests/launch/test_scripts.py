"""The launch scripts, with a stand-in for Python that records and prints its arguments."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]
_PYTHON_NAMES = ("python3.14", "python3.13", "python3.12", "python3.11", "python3")
_STAND_IN = f"""#!/usr/bin/env bash
printf '%s\\n' "$*" >>"$ASKED"
case "$*" in
  *version_info*) exit "${{TOO_OLD:-0}}" ;;
  *ensurepip*) exit "${{WITHOUT_VENV:-0}}" ;;
  *hashlib*) exec "{sys.executable}" "$@" ;;
  *device_count*) echo "${{GPUS:-0}}" ;;
  */launch/torchrun.py*)
    shift
    printf '%s\\n' "$@"
    ;;
  "-m venv "*)
    folder="${{@: -1}}"
    rm -rf "$folder"
    mkdir -p "$folder/bin"
    cp "$0" "$folder/bin/python"
    cp "$0" "$folder/bin/torchrun"
    ;;
  *"pip install"*)
    sleep "${{PIP_S:-0}}"
    exit "${{PIP_STATUS:-0}}"
    ;;
esac
"""


class Checkout:
    """A copy of the launch scripts at a path with spaces, and the stand-ins on its PATH."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a path with spaces"
        self.asked = folder / "asked"
        self._elsewhere = folder / "elsewhere"
        self._stand_ins = folder / "bin"
        for made in (self.root, self._elsewhere, self._stand_ins):
            made.mkdir()
        shutil.copytree(_ROOT / "launch", self.root / "launch")
        shutil.copy(_ROOT / "pyproject.toml", self.root)
        for name in _PYTHON_NAMES:
            self.stand_in(name, _STAND_IN)

    def run(
        self, script: str, *arguments: str, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a launch script from another folder and return what it printed."""
        self.asked.write_text("")
        process = self.start(script, *arguments, env=env)
        try:
            printed, errors = process.communicate(timeout=60)
        finally:
            process.kill()
        return subprocess.CompletedProcess(script, process.returncode, printed, errors)

    def start(
        self,
        script: str,
        *arguments: str,
        env: Mapping[str, str] | None = None,
        within: Sequence[str] = (),
    ) -> subprocess.Popen[str]:
        """Start a launch script.

        Args:
            within: the words of a command that runs the one that follows them.
        """
        return subprocess.Popen(
            [*within, "bash", self.root / "launch" / script, *arguments],
            cwd=self._elsewhere,
            env={
                "PATH": f"{self._stand_ins}:/usr/bin:/bin",
                "ASKED": str(self.asked),
                **(env or {}),
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def stand_in(self, name: str, text: str) -> None:
        """Put a command on the PATH."""
        (self._stand_ins / name).write_text(text)
        (self._stand_ins / name).chmod(0o755)

    def installs(self) -> list[str]:
        """Return the installs of the last run, from the first argument that differs on."""
        lines = self.asked.read_text().splitlines()
        return [line.split("constraints.txt ")[1] for line in lines if "pip install" in line]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_quickstart_runs_two_ranks_on_a_cpu_and_passes_overrides_on(checkout: Checkout) -> None:
    done = checkout.run("quickstart.sh", "--run.name=a b")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-7:] == [
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "offload_adam",
        "train",
        f"{checkout.root}/configs/quickstart.yaml",
        "--run.name=a b",
    ]


def test_quickstart_runs_a_rank_for_each_gpu(checkout: Checkout) -> None:
    assert "--nproc-per-node=4\n" in checkout.run("quickstart.sh", env={"GPUS": "4"}).stdout


def test_a_second_run_installs_nothing(checkout: Checkout) -> None:
    checkout.run("quickstart.sh")
    editable = f"--no-build-isolation --editable {checkout.root}"
    assert checkout.installs() == ["setuptools", f"{editable}[report]"]
    checkout.run("quickstart.sh")
    assert checkout.installs() == []
    checkout.run("test.sh")
    assert checkout.installs() == ["setuptools", f"{editable}[test,fuzz,watch,integrations]"]
    checkout.run("quickstart.sh")
    assert checkout.installs() == []


@pytest.mark.parametrize("name", ["pyproject.toml", "launch/constraints.txt"])
def test_a_change_of_what_is_wanted_installs_again(checkout: Checkout, name: str) -> None:
    checkout.run("quickstart.sh")
    with (checkout.root / name).open("a") as file:
        file.write("# changed\n")
    checkout.run("quickstart.sh")
    assert len(checkout.installs()) == 2


def test_a_failed_install_is_done_again(checkout: Checkout) -> None:
    assert checkout.run("quickstart.sh", env={"PIP_STATUS": "1"}).returncode != 0
    assert checkout.run("quickstart.sh").returncode == 0
    assert len(checkout.installs()) == 2


def test_of_two_first_runs_at_once_one_installs(checkout: Checkout) -> None:
    processes = [checkout.start("quickstart.sh", env={"PIP_S": "0.5"}) for _ in range(2)]
    try:
        outputs = [process.communicate(timeout=30)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0]
    assert len(checkout.installs()) == 2
    assert sum("waiting for another process that installs" in text for text in outputs) == 1
    assert all("--nproc-per-node=2" in text for text in outputs)


def test_a_killed_install_is_done_again(checkout: Checkout) -> None:
    killed = checkout.start("quickstart.sh", env={"PIP_S": "30"})
    try:
        deadline_s = time.monotonic() + 20
        while not checkout.asked.exists() or "pip install" not in checkout.asked.read_text():
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
    finally:
        os.killpg(killed.pid, signal.SIGKILL)
        killed.communicate(timeout=30)
    assert checkout.run("quickstart.sh").returncode == 0
    assert len(checkout.installs()) == 2


def test_a_package_whose_install_was_interrupted_is_installed_again(checkout: Checkout) -> None:
    """With METADATA, pip takes a package for installed, though its scripts come later."""
    checkout.run("quickstart.sh", env={"PIP_STATUS": "1"})
    packages = checkout.root / ".venv" / "lib" / "python3.11" / "site-packages"
    for name, files in {"whole": ("METADATA", "INSTALLER"), "half": ("METADATA",)}.items():
        folder = packages / f"{name}-1.0.dist-info"
        folder.mkdir(parents=True)
        for file in files:
            (folder / file).touch()
    assert checkout.run("quickstart.sh").returncode == 0
    assert [path.name for path in packages.iterdir()] == ["whole-1.0.dist-info"]


def test_a_read_only_checkout_is_said_and_runs_once_it_is_complete(checkout: Checkout) -> None:
    namespace = ("unshare", "--user", "--map-root-user", "--mount")
    if subprocess.run([*namespace, "true"], check=False, capture_output=True).returncode:
        pytest.skip("no user namespaces here")
    mount = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'
    within = (*namespace, "sh", "-ec", mount, str(checkout.root))
    outcomes = []
    for _ in range(2):
        process = checkout.start("quickstart.sh", within=within)
        try:
            outcomes.append((*process.communicate(timeout=30), process.returncode))
        finally:
            process.kill()
        checkout.run("quickstart.sh")  # installs
    (_, error, code), (printed, _, later_code) = outcomes
    assert (code, later_code) == (1, 0)
    assert error == (
        f"quickstart.sh: {checkout.root} is not writable, so nothing can be installed into "
        f"{checkout.root}/.venv; run this script once where it is writable\n"
    )
    assert "--nproc-per-node=2" in printed


def test_a_moved_checkout_gets_a_new_environment(checkout: Checkout) -> None:
    checkout.run("quickstart.sh")
    checkout.root = checkout.root.rename(checkout.root.with_name("moved"))
    assert checkout.run("quickstart.sh").returncode == 0
    assert len(checkout.installs()) == 2


def test_no_python_is_said(checkout: Checkout) -> None:
    done = checkout.run("quickstart.sh", env={"TOO_OLD": "1"})
    assert done.returncode == 1
    assert "quickstart.sh: no Python 3.11 or newer found" in done.stderr


def test_a_python_without_venv_is_said(checkout: Checkout) -> None:
    done = checkout.run("test.sh", env={"WITHOUT_VENV": "1"})
    assert done.returncode == 1
    assert "apt-get install python3-venv" in done.stderr


def test_test_leaves_the_long_kinds_out_unless_all_is_given(checkout: Checkout) -> None:
    checkout.run("test.sh")
    whole = checkout.asked.read_text().splitlines()[-1]
    assert whole == (
        "-m pytest -m not slow and not fault and not browser and not peers "
        "--require-marker=distributed"
    )
    checkout.run("test.sh", "--all")
    assert checkout.asked.read_text().splitlines()[-1] == (
        "-m pytest -m  --require-marker=distributed"
    )
    checkout.run("test.sh", "--all", "-k", "kernel")
    assert checkout.asked.read_text().splitlines()[-1] == "-m pytest -m  -k kernel"


@pytest.mark.parametrize(
    ("script", "env", "arguments", "hint"),
    [
        ("single_node.sh", {}, [], "give a configuration"),
        ("single_node.sh", {}, ["run.yaml"], "set RANKS_PER_NODE"),
        ("multi_node.sh", {}, ["run.yaml"], "set NUM_NODES"),
        ("multi_node.sh", {"NUM_NODES": "2"}, ["run.yaml"], "set HEAD_NODE"),
        ("slurm.sbatch", {}, ["run.yaml"], "submit this with sbatch"),
    ],
)
def test_what_is_missing_is_named(
    checkout: Checkout, script: str, env: dict[str, str], arguments: list[str], hint: str
) -> None:
    checkout.run("quickstart.sh")  # makes the environment, which these do not
    done = checkout.run(script, *arguments, env=env)
    assert done.returncode != 0
    assert hint in done.stderr


def test_multi_node_meets_at_the_head_node(checkout: Checkout) -> None:
    checkout.run("quickstart.sh")
    done = checkout.run(
        "multi_node.sh",
        "run.yaml",
        "--train.num_steps=5",
        env={"NUM_NODES": "2", "HEAD_NODE": "first", "RANKS_PER_NODE": "3", "JOB_ID": "7"}
        | {"MAX_RESTARTS": "2"},
    )
    assert done.stdout.split() == [
        "--nnodes=2",
        "--nproc-per-node=3",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=first:29500",
        "--rdzv-conf=is_host=true",
        "--rdzv-id=7",
        "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
        "--max-restarts=2",
        "-m",
        "offload_adam",
        "train",
        "run.yaml",
        "--train.num_steps=5",
    ]


@pytest.mark.parametrize("status", [0, 1])
def test_ranks_are_bound_to_numa_nodes_where_numactl_works(checkout: Checkout, status: int) -> None:
    checkout.run("quickstart.sh")
    checkout.stand_in("numactl", f"#!/bin/sh\nexit {status}\n")
    done = checkout.run("single_node.sh", "run.yaml", env={"GPUS": "2"})
    assert ("--numa-binding=node" in done.stdout.split()) == (status == 0)
    assert ("give the container SYS_NICE" in done.stderr) == (status == 1)
    assert "--nproc-per-node=2" in done.stdout.split()


def submit(checkout: Checkout, **env: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run the Slurm script with stand-ins for Slurm's commands; return the commands, too."""
    asked = checkout.root / "commands"
    record = f'#!/usr/bin/env bash\nprintf \'%s\\n\' "${{0##*/}} $*" >>"{asked}"\n'
    checkout.stand_in("scontrol", record + '[[ "$1" != show ]] || printf "first\\nsecond\\n"\n')
    checkout.stand_in(
        "srun",
        f"{record}env >>'{asked}'\n"
        '[[ -z "${PREEMPTED:-}" ]] || touch "$PREEMPTED_FILE"\nexit "${SRUN_STATUS:-0}"\n',
    )
    slurm = {
        "SLURM_SUBMIT_DIR": str(checkout.root),
        "SLURM_JOB_NODELIST": "listed[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_ID": "34567",
        "SLURM_CPUS_ON_NODE": "8",
    }
    done = checkout.run("slurm.sbatch", "run.yaml", "--train.num_steps=5", env=slurm | env)
    return done, asked.read_text().splitlines()


def test_slurm_starts_each_machine_with_the_first_as_head(checkout: Checkout) -> None:
    done, commands = submit(checkout)
    assert done.returncode == 0, done.stderr
    assert commands[:2] == [
        "scontrol show hostnames listed[1-2]",
        "srun --cpus-per-task=8 --kill-on-bad-exit=1 launch/multi_node.sh run.yaml "
        "--train.num_steps=5",
    ]
    assert {"HEAD_NODE=first", "HEAD_PORT=24567", "NUM_NODES=2", "JOB_ID=34567"} <= {*commands}
    assert not [command for command in commands if command.startswith("scontrol requeue")]


def test_a_preempted_slurm_job_is_requeued(checkout: Checkout) -> None:
    done, commands = submit(checkout, PREEMPTED="1")
    assert done.returncode == 0, done.stderr
    assert commands[-1] == "scontrol requeue 34567"
    assert not list(checkout.root.glob("*.preempted"))
    stale = checkout.root / "offload-adam-34567.preempted"
    stale.touch()  # of a start that was killed
    (checkout.root / "commands").unlink()
    _, commands = submit(checkout)
    assert commands[-1] != "scontrol requeue 34567"
    assert not stale.exists()


def test_a_failed_slurm_job_is_not_requeued(checkout: Checkout) -> None:
    done, commands = submit(checkout, PREEMPTED="1", SRUN_STATUS="3")
    assert done.returncode == 3
    assert commands[-1] != "scontrol requeue 34567"


def test_shellcheck_reads_every_shell_script() -> None:
    text = (_ROOT / ".ci" / "run").read_text(encoding="utf-8")
    (patterns,) = re.findall(r'^phase "shellcheck" \S+ -x (.*)$', text, flags=re.M)
    checked = {path for pattern in patterns.split() for path in _ROOT.glob(pattern)}
    scripts = set()
    for folder in (".ci", "launch", "tests", "offload_adam", "docs"):
        for path in (_ROOT / folder).rglob("*"):
            if path.is_file() and path.suffix in ("", ".sh", ".sbatch"):
                first = path.read_bytes().partition(b"\n")[0]
                if first.startswith((b"#!", b"# shellcheck")) and b"bash" in first:
                    scripts.add(path)
    assert checked == scripts
