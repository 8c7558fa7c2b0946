"""Wrong arguments raise an error that names them, before anything is modified."""

from __future__ import annotations

import errno
import json
import linecache
import math
import subprocess
import sys
from typing import Any

import pytest
import torch

from offload_adam import Adam, FailurePolicy, OffloadAdam, OffloadAdamW, OffloadPolicy
from offload_adam.errors import HostMemoryError


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"lr": -1.0}, ValueError, "lr must be finite and at least 0, not -1.0"),
        ({"lr": math.nan}, ValueError, "lr must be finite"),
        ({"lr": "fast"}, TypeError, "lr must be a number, not 'fast'"),
        ({"eps": -1e-8}, ValueError, "eps must be"),
        ({"weight_decay": math.inf}, ValueError, "weight_decay must be"),
        ({"betas": (0.9, 1.0)}, ValueError, r"betas\[1\] must lie in \[0, 1\), not 1.0"),
        ({"betas": (-0.1, 0.9)}, ValueError, r"betas\[0\]"),
        ({"betas": 0.9}, ValueError, "betas must be two numbers"),
        ({"amsgrad": 1}, TypeError, "amsgrad must be a bool, not 1"),
        ({"max_grad_norm": 0.0}, ValueError, "max_grad_norm must be above 0"),
        ({"max_grad_norm": "1"}, TypeError, "max_grad_norm must be a number"),
        (
            {"offload": OffloadPolicy(bucket_nbytes=0)},
            ValueError,
            "bucket_nbytes must be at least 1",
        ),
        (
            {"offload": FailurePolicy()},
            TypeError,
            r"offload must be OffloadPolicy\(...\), not Fail",
        ),
        ({"failures": 5}, TypeError, r"failures must be FailurePolicy\(...\), not 5"),
        ({"pin": "all"}, TypeError, "unexpected keyword argument 'pin'"),
        ({"num_threads": 1.5}, TypeError, "num_threads must be an int"),
        ({"reduce_dtype": torch.float16}, ValueError, "reduce_dtype must be torch.float32 or None"),
        (
            {"state_format": "int4"},
            ValueError,
            "state_format must be one of 'fp32', 'bf16', 'mixed', 'int8', not 'int4'",
        ),
        (
            {"state_format": None},
            ValueError,
            "state_format must be one of 'fp32', 'bf16', 'mixed', 'int8', not None",
        ),
        (
            {"accumulate": "device"},
            ValueError,
            "accumulate must be one of 'auto', 'host', 'error', None",
        ),
        ({"accumulate": "host"}, ValueError, "needs module="),
        ({"module": 5}, TypeError, "module must be a torch.nn.Module or None, not 5"),
        (
            {"module": torch.nn.Linear(2, 2)},
            ValueError,
            "module= is a Linear that has none of the parameters",
        ),
        ({"process_group": 5}, TypeError, "process_group must be .* not 5"),
        ({"overlap": 1}, TypeError, "overlap must be a bool or None, not 1"),
        ({"gradient_reduction": "ddp"}, ValueError, "'optimizer' or 'external', not 'ddp'"),
    ],
)
def test_options_are_checked(options: dict[str, Any], error: type[Exception], words: str) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    address = parameter.data_ptr()
    with pytest.raises(error, match=words):
        OffloadAdam([parameter], **options)
    assert parameter.data_ptr() == address


class Subclassed(OffloadAdamW):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


@pytest.mark.parametrize("kind", [OffloadAdam, OffloadAdamW, Adam])
def test_a_warning_points_at_the_users_line(kind: Any) -> None:
    with pytest.warns(UserWarning, match="has no effect") as caught:
        kind([torch.nn.Parameter(torch.ones(3))], offload=OffloadPolicy(offload_fraction=0.5))
    assert [warning.filename for warning in caught] == [__file__]
    assert "kind(" in linecache.getline(__file__, caught[0].lineno)


def test_overlap_without_effect_is_a_user_warning() -> None:
    """The commands show UserWarnings once, and RuntimeWarnings on every rank."""
    model = torch.nn.Linear(2, 2)
    options: Any = {"gradient_reduction": "external", "overlap": True}
    with pytest.warns(UserWarning, match="overlap=True has no effect") as caught:
        OffloadAdam(model.parameters(), module=model, **options)
    assert [warning.filename for warning in caught] == [__file__]


def test_a_warning_of_a_subclass_points_into_the_users_class() -> None:
    with pytest.warns(UserWarning, match="has no effect") as caught:
        Subclassed([torch.nn.Parameter(torch.ones(3))], offload=OffloadPolicy(offload_fraction=0.5))
    assert "super()" in linecache.getline(caught[0].filename, caught[0].lineno)


def test_parameters_are_checked_by_name() -> None:
    def refuse(tensor: torch.Tensor, error: type[Exception], words: str) -> None:
        with pytest.raises(error, match=words):
            OffloadAdam([("p", torch.nn.Parameter(tensor))])

    refuse(torch.ones(3, dtype=torch.float64), ValueError, "'p' has dtype torch.float64")
    refuse(torch.ones(3, dtype=torch.complex64), ValueError, "'p' has dtype torch.complex64")
    refuse(torch.ones(3, device="meta"), ValueError, "'p' is on device 'meta'")
    refuse(torch.ones(1).expand(3), ValueError, r"'p' is expanded.*clone\(\)")
    refuse(torch.eye(3).to_sparse(), ValueError, "'p' has the layout torch.sparse_coo")
    with torch.inference_mode():
        made_there = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="'p' was created in inference mode"):
        OffloadAdam([("p", made_there)])
    partitioned = torch.nn.Parameter(torch.ones(2))
    partitioned.ds_id = 0  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="'p' belongs to DeepSpeed ZeRO-3, which shards"):
        OffloadAdam([("p", partitioned)])
    lazy = torch.nn.LazyLinear(3)
    with pytest.raises(ValueError, match=r"'weight' is not initialised yet\. Run a forward"):
        OffloadAdam(lazy.named_parameters())
    lazy(torch.ones(1, 2))
    OffloadAdam(lazy.named_parameters())
    with pytest.raises(ValueError, match="empty parameter list"):
        OffloadAdam([])
    frozen_bytes = torch.nn.Parameter(torch.ones(3, dtype=torch.uint8), requires_grad=False)
    OffloadAdam([frozen_bytes, torch.nn.Parameter(torch.ones(2))])


def test_names_come_from_the_module_or_the_position() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2).double())
    with pytest.raises(ValueError, match=r"Parameter '0.weight'"):
        OffloadAdam(model.parameters(), module=model)
    with pytest.raises(ValueError, match=r"\"param_groups\[0\]\['params'\]\[0\]\""):
        OffloadAdam(model.parameters())


def test_a_group_that_is_refused_leaves_the_optimizer_as_it_was() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = OffloadAdam([parameter], lr=0.1)
    for group in (
        {"params": [torch.nn.Parameter(torch.ones(2))], "lr": -1.0},
        {"params": [torch.nn.Parameter(torch.ones(2).double())]},
    ):
        with pytest.raises(ValueError, match=r"lr must be|has dtype"):
            optimizer.add_param_group(group)
        assert len(optimizer.param_groups) == 1
    parameter.grad = torch.ones(3)
    optimizer.step()
    assert torch.allclose(parameter.detach(), torch.full((3,), 0.9))


def test_state_that_does_not_fit_is_refused_before_anything_moves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    address = parameter.data_ptr()

    available = "offload_adam.coordinator.node_memory.available_memory"
    monkeypatch.setattr(available, lambda: (1023, "of the machine"))
    with pytest.raises(HostMemoryError, match=r"available \(of the machine\) +1023 B"):
        OffloadAdam([parameter])
    assert parameter.data_ptr() == address
    OffloadAdam([parameter], offload=OffloadPolicy(allow_overcommit=True))
    monkeypatch.setattr(available, lambda: (1024, "of the machine"))
    OffloadAdam([torch.nn.Parameter(torch.ones(3))])  # exp_avg and exp_avg_sq, a block of each


def test_memory_that_the_kernel_does_not_grant_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr("offload_adam.memory.arena.mmap.mmap", refuse)
    with pytest.raises(HostMemoryError, match=r"1\.00 KiB .* mapped: Cannot allocate memory"):
        OffloadAdam([torch.nn.Parameter(torch.ones(3))])


def test_a_parameter_has_one_optimizer_at_a_time() -> None:
    shared = torch.nn.Parameter(torch.ones(3))
    first = OffloadAdam([("shared", shared)], lr=0.1)
    for make in (OffloadAdam, Adam):
        with pytest.raises(ValueError, match=r"'q' is already trained .*Call close\(\)"):
            make([("p", torch.nn.Parameter(torch.ones(3))), ("q", shared)])
    other = OffloadAdam([("other", torch.nn.Parameter(torch.ones(3)))])
    with pytest.raises(ValueError, match="'q' is already trained by another"):
        other.add_param_group({"params": [("q", shared)]})
    shared.grad = torch.ones(3)
    first.step()
    assert torch.allclose(shared.detach(), torch.full((3,), 0.9))
    first.close()
    second = OffloadAdam([shared], lr=0.1)
    second.step()
    assert torch.allclose(shared.detach(), torch.full((3,), 0.8))


def test_an_optimizer_that_nobody_holds_owns_nothing() -> None:
    shared = torch.nn.Parameter(torch.ones(3))
    optimizer: Any = OffloadAdam([shared])
    optimizer.itself = optimizer  # it goes with the next collection of cycles only
    del optimizer
    OffloadAdam([shared]).step()


@pytest.fixture(scope="module")
def fresh_process() -> dict[str, Any]:
    """Return what a process has loaded with the package, and torch's threads after two steps."""
    code = (
        "import json, sys, torch; torch.set_num_threads(1)\n"
        "import offload_adam\n"
        "offload_adam.OffloadAdam\n"
        "loaded = sorted({'numba', 'pydantic', 'torch._dynamo'} & set(sys.modules))\n"
        "p = torch.nn.Parameter(torch.ones(100_000))\n"
        "o = offload_adam.OffloadAdam([p], num_threads=2)\n"
        "p.grad = torch.ones(100_000); o.step(); o.step()\n"
        "print(json.dumps({'loaded': loaded, 'num_threads': torch.get_num_threads()}))\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, check=True, timeout=120, stdout=subprocess.PIPE)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_torchs_thread_count_is_left_alone(fresh_process: dict[str, Any]) -> None:
    assert fresh_process["num_threads"] == 1


def test_the_package_is_quick_to_import(fresh_process: dict[str, Any]) -> None:
    assert fresh_process["loaded"] == []
