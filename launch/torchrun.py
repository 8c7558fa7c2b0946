"""Run torchrun, print what happened as the last line, and exit with the job's own exit code.

After an error or a signal, torchrun itself ends with a traceback and exit code 1. The scripts in
this folder run this file in place of torchrun. LAUNCHED_AS is the name of the script to print.

A preempted run exits with 0, as a finished one does. Two variables tell a scheduler that it is to
start the run again:
    PREEMPTED_EXIT_CODE  the exit code of a run that was preempted and can be resumed.
    PREEMPTED_FILE       an empty file to create if the run was preempted and can be resumed.
With either, a preempted run that could not save a checkpoint exits with 1.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

import psutil
from torch.distributed.elastic import metrics
from torch.distributed.elastic.metrics import MetricData, MetricHandler
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

AGAIN = "run the same command again"
RESUMES = f"{AGAIN}; it resumes from the newest checkpoint, if there is one"
SENTENCES = {
    2: f"the configuration was rejected: correct it and {AGAIN}",
    3: "the job does not fit into memory: `offload-adam plan CONFIG` shows what needs how much",
}
GRACE_S = 15.0
"""Seconds for the ranks of other machines to end after those of this machine."""


def mistake_in_variables() -> str:
    """Remove the file that PREEMPTED_FILE names, and return what is wrong with the variables.

    Empty variables count as not set.
    """
    code = os.environ.get("PREEMPTED_EXIT_CODE")
    if code and not (code.isascii() and code.isdecimal() and 1 <= int(code[:4]) <= 255):
        return f"PREEMPTED_EXIT_CODE is {code!r}: set it to a whole number from 1 to 255"
    if code and int(code) in SENTENCES:
        return f"PREEMPTED_EXIT_CODE is {code!r}, which is the exit code of an error: set another"
    if marker := os.environ.get("PREEMPTED_FILE"):
        try:
            Path(marker).touch()  # the only sure way to learn whether it can be created
            Path(marker).unlink(missing_ok=True)  # other machines may share it
        except OSError as error:
            name = f"PREEMPTED_FILE ({marker})"
            return f"{name} cannot be created: {error.strerror}. Name one in a writable folder"
    return ""


def run(arguments: list[str], folder: Path) -> tuple[int, str]:
    """Run torchrun and return the job's exit code, and what happened and what to do."""
    # Inherited by the ranks. Local rank 0 writes the file if the job ends without an error.
    outcome_file = folder / "outcome.json"
    os.environ["OFFLOAD_ADAM_OUTCOME_FILE"] = str(outcome_file)
    # torchrun copies the error of the first failed rank to this file, and complains without it.
    os.environ.setdefault("TORCHELASTIC_ERROR_FILE", str(folder / "error.json"))
    try:
        torchrun(arguments)
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        return describe_failure(error)
    except SignalException as error:
        # torchrun does not tell how its ranks ended after a signal; the file does.
        if not outcome_file.exists():
            name = error.sigval.name
            return 128 + error.sigval, f"{name} ended the run: {RESUMES}"
    except Exception:
        traceback.print_exc()
        return 1, "torchrun failed, see its error above"
    return describe_end(outcome_file)


def describe_failure(error: ChildFailedError) -> tuple[int, str]:
    """Return the exit code of the first rank that failed, and what to do."""
    # torchrun ends the other ranks by SIGTERM, and by SIGKILL no sooner than 30 s later. Times are
    # whole seconds: in the same second, a killed rank (negative code) comes before a peer that
    # exited because of it.
    rank, failure = min(
        error.failures.items(),
        key=lambda f: (f[1].exitcode == -signal.SIGTERM, f[1].timestamp, f[1].exitcode),
    )
    # As in a shell: a rank that a signal has killed has 128 and the signal's number.
    code = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    return code, SENTENCES.get(code, f"rank {rank} failed: fix the cause and {RESUMES}")


def describe_end(outcome_file: Path) -> tuple[int, str]:
    """Return the exit code of a run without an error, and how it ended."""
    if not outcome_file.exists():
        return 0, "the run is done"
    outcome = json.loads(outcome_file.read_text(encoding="utf-8"))
    if not outcome["preempted"]:
        return 0, f"the run is done after step {outcome['step']}"
    preempted_code = int(os.environ.get("PREEMPTED_EXIT_CODE") or 0)
    marker = os.environ.get("PREEMPTED_FILE")
    ended = f"the run was preempted after step {outcome['step']}"
    if not outcome["saved"]:
        # A scheduler that started it again might repeat the same steps for ever.
        code = 1 if preempted_code or marker else 0
        return code, f"{ended} without a checkpoint of this step: {AGAIN}"
    if marker:
        try:
            Path(marker).touch()
        except OSError as error:  # the exit code is still that of the run
            print(f"Cannot create PREEMPTED_FILE: {error}", file=sys.stderr)
    return preempted_code, f"{ended} and can be resumed: {AGAIN}"


class GroupWatch(MetricHandler):
    """Sets `succeeded` once all ranks of this machine have ended without an error.

    torchrun then waits for the other machines. It reports the state of its ranks as metrics, such
    as workers.default.succeeded. Only this tells that wait from a restart, where no rank runs
    either.
    """

    def __init__(self) -> None:
        self.succeeded = threading.Event()

    def emit(self, metric_data: MetricData) -> None:
        """Read a metric of torchrun."""
        if metric_data.name.startswith("workers.") and metric_data.name.endswith(".succeeded"):
            self.succeeded.set()


def end_preempted(folder: Path, watch: GroupWatch, is_over: threading.Event) -> None:
    """End this process soon after a signal to another machine has ended its ranks.

    torchrun would wait 300 s for the processes like this one on all other machines. But one that
    gets a signal ends without telling the others, and a signal does not interrupt the wait.

    If ranks of this machine do not end, they are killed TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds
    after local rank 0 has written the outcome.
    """
    outcome_file = folder / "outcome.json"
    while not is_over.wait(1):
        try:
            text, written_s = outcome_file.read_text(encoding="utf-8"), outcome_file.stat().st_mtime
            if not json.loads(text)["preempted"]:
                continue
        except (FileNotFoundError, ValueError):  # not there, or not written to its end
            continue
        # In this time the last ranks of the other machines end, and usually this process, too.
        if watch.succeeded.is_set() and not is_over.wait(GRACE_S):
            end_now(folder, [])
        ranks = living_ranks()
        if any(start_s > written_s for start_s in ranks.values()):
            outcome_file.unlink()  # of an attempt that failed: torchrun has started the ranks again
        elif ranks and time.time() - written_s > shutdown_timeout_s():
            end_now(folder, [*ranks])


def living_ranks() -> dict[int, float]:
    """Return the ranks of this machine: process ID -> start in seconds since 1970."""
    found = {}
    for child in psutil.Process().children():
        try:
            # torchrun starts each rank in a session, and so a process group, of its own.
            if os.getpgid(child.pid) == child.pid and child.status() != psutil.STATUS_ZOMBIE:
                found[child.pid] = child.create_time()
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def shutdown_timeout_s() -> float:
    """Return how long torchrun waits for its ranks after a signal."""
    return int(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30"))


def end_now(folder: Path, ranks: list[int]) -> None:
    """Kill the process groups of these ranks, and end this process as after a preempted run."""
    code, text = describe_end(folder / "outcome.json")
    shutil.rmtree(folder, ignore_errors=True)
    if ranks:
        text = f"ranks with process IDs {ranks} did not end and were killed; {text}"
    report(code, text)
    # Last: torchrun restarts killed ranks, if it may.
    for pid in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    os._exit(code)


def report(code: int, text: str) -> None:
    """Print the last line."""
    name = os.environ.get("LAUNCHED_AS", "torchrun.py")
    print(f"{name}: {text} (exit code {code})", file=sys.stderr, flush=True)


def main() -> None:
    """Run torchrun with the arguments of this process."""
    if mistake := mistake_in_variables():
        report(2, mistake)
        sys.exit(2)
    is_over = threading.Event()
    with tempfile.TemporaryDirectory(prefix="offload-adam-") as folder:
        watch = GroupWatch()
        metrics.configure(watch, "torchelastic")  # the group of torchrun's own metrics
        arguments = (Path(folder), watch, is_over)
        threading.Thread(target=end_preempted, args=arguments, daemon=True).start()
        code, text = run(sys.argv[1:], Path(folder))
        is_over.set()
    report(code, text)
    sys.exit(code)


if __name__ == "__main__":
    main()
