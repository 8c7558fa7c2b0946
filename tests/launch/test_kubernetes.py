"""The manifests in launch/kubernetes: valid, consistent, and their commands do what they say."""

from __future__ import annotations

import http.server
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from offload_adam.cli.output import EXIT_BAD_CONFIGURATION
from offload_adam.cli.train import EXIT_DOES_NOT_FIT
from offload_adam.config import load_config

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "launch" / "kubernetes"


def manifests() -> list[dict[str, Any]]:
    texts = [path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.yaml"))]
    return [found for text in texts for found in yaml.safe_load_all(text)]


def of_kind(kind: str) -> dict[str, Any]:
    (found,) = [manifest for manifest in manifests() if manifest["kind"] == kind]
    return found


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    return of_kind("Job")


@pytest.fixture(scope="module")
def pod(job: dict[str, Any]) -> dict[str, Any]:
    """The specification of a pod."""
    spec: dict[str, Any] = job["spec"]["template"]["spec"]
    return spec


@pytest.fixture(scope="module")
def trainer(pod: dict[str, Any]) -> dict[str, Any]:
    (container,) = pod["containers"]
    return dict(container)


@pytest.fixture(scope="module")
def env(trainer: dict[str, Any]) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in trainer["env"] if "value" in entry}


@pytest.mark.parametrize("version", ["1.31", "latest"])
def test_manifests_are_valid(version: str) -> None:
    validator = pytest.importorskip("kubernetes_validate")
    version = validator.latest_version() if version == "latest" else version
    kinds = []
    for manifest in manifests():
        validator.validate(manifest, version, strict=True)
        kinds.append(manifest["kind"])
    assert sorted(kinds) == ["Job", "PersistentVolumeClaim", "Service"]


def test_pods_find_each_other(
    job: dict[str, Any], pod: dict[str, Any], env: dict[str, str]
) -> None:
    service, name = of_kind("Service"), job["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    subdomain = service["metadata"]["name"]
    assert pod["subdomain"] == subdomain
    assert env["HEAD_NODE"] == f"{name}-0.{subdomain}"
    assert env["LOCAL_ADDRESS"] == f"{name}-$(JOB_COMPLETION_INDEX).{subdomain}"
    assert job["spec"]["completionMode"] == "Indexed"
    num_nodes = job["spec"]["completions"]
    assert job["spec"]["parallelism"] == num_nodes == int(env["NUM_NODES"])


def test_values_come_after_the_variables_in_them(pod: dict[str, Any]) -> None:
    for container in (*pod["containers"], *pod["initContainers"]):
        names = [entry["name"] for entry in container["env"]]
        assert len(names) == len({*names})
        for place, entry in enumerate(container["env"]):
            assert {*re.findall(r"\$\((\w+)\)", entry.get("value", ""))} <= {*names[:place]}


def test_the_scripts_read_every_variable(pod: dict[str, Any], env: dict[str, str]) -> None:
    files = ("multi_node.sh", "settings.sh", "torchrun.py")
    text = "".join((ROOT / "launch" / name).read_text(encoding="utf-8") for name in files)
    read = {*re.findall(r"\$\{?([A-Z_]+)", text), *re.findall(r'environ.get\("([A-Z_]+)"', text)}
    assert {*env} <= read
    assert {"NUM_NODES", "HEAD_NODE"} <= {*env}  # without which multi_node.sh ends
    assert pod["initContainers"][0]["env"] == pod["containers"][0]["env"]
    assert pod["initContainers"][0]["image"] == pod["containers"][0]["image"]


def test_the_run_is_configured(trainer: dict[str, Any], pod: dict[str, Any]) -> None:
    script, config_path, *overrides = trainer["args"]
    assert (ROOT / script).stat().st_mode & 0o111
    config = load_config(str(ROOT / config_path), overrides)
    assert config.checkpoint.every > 0
    assert config.checkpoint.resume == "auto"
    mounts = {mount["mountPath"]: mount["name"] for mount in trainer["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    claim = volumes[mounts[config.run.dir]]["persistentVolumeClaim"]["claimName"]
    storage = of_kind("PersistentVolumeClaim")
    assert claim == storage["metadata"]["name"]
    assert storage["spec"]["accessModes"] == ["ReadWriteMany"]
    shared = volumes[mounts["/dev/shm"]]["emptyDir"]
    assert shared["medium"] == "Memory"
    assert shared["sizeLimit"]


def test_a_port_is_the_same_everywhere(trainer: dict[str, Any]) -> None:
    config = load_config(str(ROOT / trainer["args"][1]), trainer["args"][2:])
    assert config.observe.http_host == "0.0.0.0"
    port = config.observe.http_port
    assert [entry["containerPort"] for entry in trainer["ports"]] == [port]
    assert [entry["port"] for entry in of_kind("Service")["spec"]["ports"]] == [port]
    assert f"http://127.0.0.1:{port}/healthz" in trainer["livenessProbe"]["exec"]["command"][-1]


def test_a_preempted_pod_may_save_and_is_replaced(
    job: dict[str, Any], pod: dict[str, Any], trainer: dict[str, Any], env: dict[str, str]
) -> None:
    # Half a minute for the end of torchrun itself, and for ranks that it had to kill.
    shutdown_s = int(env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
    assert pod["terminationGracePeriodSeconds"] >= shutdown_s + 30
    assert pod["restartPolicy"] == "Never"
    rules = job["spec"]["podFailurePolicy"]["rules"]
    by_code = {
        code: rule["action"]
        for rule in rules
        for code in rule.get("onExitCodes", {"values": []})["values"]
    }
    assert by_code == {
        EXIT_BAD_CONFIGURATION: "FailJob",
        EXIT_DOES_NOT_FIT: "FailJob",
        int(env["PREEMPTED_EXIT_CODE"]): "Ignore",
    }
    for rule in rules:
        if "onExitCodes" in rule:
            assert rule["onExitCodes"]["containerName"] == trainer["name"]
            assert rule["onExitCodes"]["operator"] == "In"
    assert {
        "action": "Ignore",
        "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
    } in rules
    assert job["spec"]["backoffLimit"] >= job["spec"]["completions"]


@contextmanager
def answering(status: int) -> Iterator[int]:
    """Answer every request with this status; yield the port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b"rank 1 is dead")

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def probe(trainer: dict[str, Any], port: int) -> subprocess.CompletedProcess[str]:
    """Run the liveness probe, with another port."""
    program = trainer["livenessProbe"]["exec"]["command"][-1].replace(":8080", f":{port}")
    # One second instead of four until a server counts as hung.
    program = program.replace("timeout=4", "timeout=1")
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False
    )


def test_the_probe_fails_where_the_run_is_unhealthy_and_nowhere_else(
    trainer: dict[str, Any],
) -> None:
    with answering(200) as port:
        assert probe(trainer, port).returncode == 0
    # Nothing listens: not rank 0's pod, or before its first step.
    assert probe(trainer, port).returncode == 0
    with answering(503) as port:
        failed = probe(trainer, port)
    assert failed.returncode == 1
    assert failed.stderr == "rank 1 is dead\n"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert probe(trainer, silent.getsockname()[1]).returncode == 1
    assert trainer["livenessProbe"]["timeoutSeconds"] > 4


def test_pods_wait_for_the_head(pod: dict[str, Any]) -> None:
    program = pod["initContainers"][0]["command"][-1]

    def start(index: int, port: int) -> subprocess.Popen[bytes]:
        variables = {"HEAD_NODE": "localhost", "HEAD_PORT": str(port)}
        return subprocess.Popen(
            [sys.executable, "-c", program],
            env=variables | {"JOB_COMPLETION_INDEX": str(index)},
        )

    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
    head, other = start(0, address[1]), start(1, address[1])
    try:
        assert head.wait(30) == 0
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(1)
        with socket.create_server(address):
            assert other.wait(30) == 0
    finally:
        head.kill()
        other.kill()
