"""Options are declared once: what the constructor, the ranks and a configuration make of it."""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest
import torch

from offload_adam import Adam, FailurePolicy, OffloadAdam, OffloadAdamW, OffloadPolicy
from offload_adam.config import RunConfig
from offload_adam.options import ExecutionOptions, check_options, options_of, resolve_overlap
from offload_adam.sharded_optimizer.execution import decide_execution, shared_fields
from offload_adam.train.optimizer import build_optimizer, failure_policy, offload_policy

DECLARED = [
    declared
    for policy in (ExecutionOptions, OffloadPolicy, FailurePolicy)
    for declared in options_of(policy)
]
CHOSEN: dict[str, Any] = {
    "optimizer": {"bucket_nbytes": 4096, "num_threads": 1, "max_grad_norm": 2.0},
    "memory": {"pin": "none", "offload_fraction": 1, "allow_overcommit": True},
    "coordinator": {"dead_after": 7, "stuck_after": 70.0},
    "checkpoint": {"every": 3, "mode": "async", "snapshot_buffer_nbytes": 99},
}


def key(config: RunConfig, path: str) -> Any:
    section, _, name = path.partition(".")
    return getattr(getattr(config, section), name)


def with_key(path: str, value: object) -> RunConfig:
    section, _, name = path.partition(".")
    return RunConfig.model_validate({section: {name: value}})


@pytest.mark.parametrize("declared", DECLARED, ids=lambda declared: declared.name)
def test_every_option_is_documented_and_its_key_has_its_default(declared: Any) -> None:
    assert declared.text.endswith(".")
    if declared.key and declared.name != "gradient_reduction":  # a job has a default of its own
        assert key(RunConfig(), declared.key) == declared.default
        assert key(with_key(declared.key, None), declared.key) == declared.default


def _unwrapped(documentation: str) -> str:
    return documentation.replace("\n        ", " ")


@pytest.mark.parametrize("policy", [OffloadPolicy, FailurePolicy])
def test_a_policy_documents_every_option_and_is_frozen(policy: Any) -> None:
    documentation = inspect.getdoc(policy) or ""
    assert [item.name for item in fields(policy)] == [item.name for item in options_of(policy)]
    for declared in options_of(policy):
        assert f"    {declared.name}: {declared.text}" in _unwrapped(documentation)
        with pytest.raises(FrozenInstanceError):
            setattr(policy(), declared.name, declared.default)


@pytest.mark.parametrize("kind", [OffloadAdam, OffloadAdamW, Adam])
def test_every_optimizer_takes_the_shared_options(kind: type) -> None:
    parameters = inspect.signature(kind).parameters
    for item in fields(ExecutionOptions):
        assert parameters[item.name].default == item.default
        assert parameters[item.name].kind == inspect.Parameter.KEYWORD_ONLY


def test_a_configuration_reaches_the_policies() -> None:
    config = RunConfig.model_validate(CHOSEN)
    assert offload_policy(config) == OffloadPolicy(
        bucket_nbytes=4096,
        pin="none",
        offload_fraction=1.0,
        allow_overcommit=True,
        snapshot_buffer_nbytes=99,
    )
    assert failure_policy(config) == FailurePolicy(dead_after=7.0, stuck_after=70.0)
    optimizer = build_optimizer(config, torch.nn.Linear(3, 2))
    assert optimizer.max_grad_norm == 2.0


def test_the_ranks_share_what_is_declared_as_shared() -> None:
    options = ExecutionOptions(
        max_grad_norm=0.5, offload=OffloadPolicy(bucket_nbytes=7, offload_fraction=0.5)
    )
    with pytest.warns(UserWarning, match=r"offload_fraction=0\.5 has no effect"):
        execution = decide_execution(options, on_device=[False])
    facts = dict(shared_fields(options, execution))
    assert facts["gradient_reduction"] == "optimizer"
    shared = {"max_grad_norm", "reduce_dtype", "state_format", "accumulate"}
    shared |= {"bucket_nbytes", "offload_fraction", "keep", "resume_kept"}
    assert {declared.name for declared in DECLARED if declared.shared} == shared
    expected = {"max_grad_norm": "0.5", "bucket_nbytes": "7", "offload_fraction": "0.5"}
    assert facts.items() >= expected.items()
    assert facts.keys() >= shared


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (OffloadPolicy(allow_overcommit=1), "allow_overcommit must be a bool, not 1"),  # type: ignore[arg-type]
        (OffloadPolicy(bucket_nbytes=True), "bucket_nbytes must be an int or None, not True"),
        (OffloadPolicy(snapshot_buffer_nbytes=-1), "snapshot_buffer_nbytes must be at least 0"),
        (OffloadPolicy(offload_fraction=2), r"offload_fraction must lie in \[0, 1\], not 2"),
        (FailurePolicy(dead_after=0), "must be a finite number of seconds above 0, not 0"),
        (FailurePolicy(stuck_after="1"), "stuck_after must be a number of seconds, not '1'"),  # type: ignore[arg-type]
    ],
)
def test_a_wrong_value_is_named_at_construction(policy: Any, message: str) -> None:
    name = "offload" if isinstance(policy, OffloadPolicy) else "failures"
    for kind in (OffloadAdam, Adam):
        with pytest.raises((TypeError, ValueError), match=message):
            kind([torch.nn.Parameter(torch.ones(3))], **{name: policy})


def test_none_is_allowed_where_it_is_the_default() -> None:
    options = ExecutionOptions(num_threads=None, overlap=None)
    assert decide_execution(options, on_device=[False]).policy.reduces
    check_options(OffloadPolicy(bucket_nbytes=None))
    with pytest.raises(TypeError, match="snapshot_buffer_nbytes must be an int, not None"):
        check_options(OffloadPolicy(snapshot_buffer_nbytes=None))  # type: ignore[arg-type]


def test_the_library_works_without_pydantic() -> None:
    script = (
        "import sys; sys.modules['pydantic'] = None\n"
        "import torch, offload_adam\n"
        "p = torch.nn.Parameter(torch.ones(3))\n"
        "for make in (offload_adam.OffloadAdam, offload_adam.OffloadAdamW, offload_adam.Adam):\n"
        "    o = make([p], offload=offload_adam.OffloadPolicy(bucket_nbytes=64))\n"
        "    p.grad = torch.ones(3); o.step(); o.close()\n"
        "    assert o.last_step.num_updated == 1\n"
        "assert float(p[0]) < 1\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=120)


@pytest.mark.parametrize(
    ("overlap", "hooked", "reduces", "on_device", "expected"),
    [
        (None, True, True, True, True),
        (None, True, True, False, False),
        (None, False, True, True, False),
        (None, True, False, True, True),
        (False, True, True, True, False),
        (True, True, True, False, True),
        (True, True, False, False, False),
        (True, True, False, True, True),
    ],
)
def test_updates_overlap_where_they_can_be_waited_for_and_read_in_time(
    overlap: bool | None, hooked: bool, reduces: bool, on_device: bool, expected: bool
) -> None:
    assert resolve_overlap(overlap, hooked=hooked, reduces=reduces, on_device=on_device) is expected
