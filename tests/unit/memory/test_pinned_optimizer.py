"""What an optimizer pins, and that it is over with the optimizer, however that ends."""

from __future__ import annotations

import gc
import threading
import warnings
import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from offload_adam import Adam, OffloadAdam, OffloadPolicy
from tests.support.cuda_runtime import StandInRuntime
from tests.support.devices import HOST_AS_DEVICE
from tests.support.policies import in_policies

NUMEL = 1024


def make(
    pin: str,
    runtime: StandInRuntime,
    dtype: torch.dtype = torch.bfloat16,
    overlap: bool | None = None,
) -> OffloadAdam:
    class Offloading(OffloadAdam):
        _backend = replace(HOST_AS_DEVICE, make_runtime=lambda _: runtime)

    parameters = [torch.nn.Parameter(torch.ones(NUMEL, dtype=dtype)) for _ in range(2)]
    options: dict[str, Any] = {"pin": pin, "overlap": overlap}
    if overlap:
        options["module"] = torch.nn.ParameterList(parameters)
    return Offloading(parameters, **in_policies(bucket_nbytes=2 * NUMEL, **options))


# fp32 master weight and moments, and the gradient shard; two slots of one bucket's parameters.
STATE_NBYTES = 2 * NUMEL * (12 + 2)
STAGING_NBYTES = 2 * NUMEL * 2
# Gradients of two buckets on their way to state that is not page-locked.
BUFFER_NBYTES = 2 * NUMEL * 2


@pytest.mark.parametrize(
    ("pin", "pinned", "staging"),
    [
        ("all", STATE_NBYTES + STAGING_NBYTES, STAGING_NBYTES),
        ("staging", STAGING_NBYTES + BUFFER_NBYTES, STAGING_NBYTES + BUFFER_NBYTES),
        ("none", 0, STAGING_NBYTES + BUFFER_NBYTES),
    ],
)
def test_what_is_asked_for_is_pinned_to_the_byte(pin: str, pinned: int, staging: int) -> None:
    runtime = StandInRuntime()
    optimizer = make(pin, runtime)
    assert optimizer.pinned_nbytes == runtime.nbytes == pinned
    assert optimizer.host_nbytes["state"] == STATE_NBYTES
    assert optimizer.host_nbytes["staging"] == staging


def test_pinning_and_the_cache_use_the_device_of_the_parameters() -> None:
    """Once for each construction and new group, after the parameters have moved."""
    runtime = StandInRuntime()
    devices: list[torch.device] = []
    emptied: list[tuple[torch.device, bool]] = []
    old = [torch.nn.Parameter(torch.ones(NUMEL, dtype=torch.bfloat16)) for _ in range(3)]
    first = [parameter.data_ptr() for parameter in old]

    def make_runtime(device: torch.device) -> StandInRuntime:
        devices.append(device)
        return runtime

    def empty_cache(device: torch.device) -> None:
        moved = [a.data_ptr() != b for a, b in zip(old, first, strict=True)]
        emptied.append((device, all(moved[: 1 + 2 * len(emptied)])))

    class Offloading(OffloadAdam):
        _backend = replace(HOST_AS_DEVICE, make_runtime=make_runtime, empty_cache=empty_cache)

    optimizer = Offloading(old[:1], **in_policies(bucket_nbytes=2 * NUMEL))
    optimizer.add_param_group({"params": old[1:]})
    optimizer.close()
    device = old[0].device
    assert devices == [device]
    assert emptied == [(device, True), (device, True)]


def test_the_cache_is_left_alone_for_parameters_on_a_cpu() -> None:
    emptied: list[torch.device] = []

    class OnHost(OffloadAdam):
        _backend = replace(OffloadAdam._backend, empty_cache=emptied.append)

    OnHost([torch.nn.Parameter(torch.ones(NUMEL))]).close()
    assert emptied == []


def test_refused_state_falls_back_to_the_buffers_with_a_warning() -> None:
    class RefusesLarge(StandInRuntime):
        def register(self, address: int, nbytes: int) -> int:
            self.refuse_after = 0 if nbytes > STAGING_NBYTES else None
            return super().register(address, nbytes)

    runtime = RefusesLarge()
    with pytest.warns(RuntimeWarning, match=r"ulimit -l.*pin='staging'"):
        optimizer = make("all", runtime)
    assert not runtime.has_error
    assert optimizer.pinned_nbytes == runtime.nbytes == STAGING_NBYTES + BUFFER_NBYTES
    parameter = optimizer.param_groups[0]["params"][0]
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert float(optimizer.state[parameter]["master_weight"].max()) < 1.0


def test_nothing_pins_for_parameters_on_a_cpu_and_nobody_is_warned() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = OffloadAdam(
            [torch.nn.Parameter(torch.ones(3))], offload=OffloadPolicy(pin="all")
        )
    assert optimizer.pinned_nbytes == 0


@pytest.mark.parametrize("kind", [OffloadAdam, Adam])
def test_an_unknown_way_is_refused(kind: Any) -> None:
    with pytest.raises(ValueError, match="pin must be one of 'all', 'staging', 'none', not 'yes'"):
        kind([torch.nn.Parameter(torch.ones(3))], **in_policies(pin="yes"))


def test_a_closed_optimizer_frees_its_memory_though_it_lives() -> None:
    runtime = StandInRuntime()
    optimizer = make("all", runtime)
    parameters = optimizer.param_groups[0]["params"]
    plane = weakref.ref(optimizer._alive().states[0].planes.exp_avg)
    optimizer.close()
    optimizer.close()
    gc.collect()
    assert runtime.registered == {}
    assert plane() is None
    assert float(parameters[0].detach().sum()) == NUMEL
    for use in (optimizer.step, optimizer.state_dict, lambda: optimizer.pinned_nbytes):
        with pytest.raises(RuntimeError, match="has been closed"):
            use()
    with pytest.raises(RuntimeError, match="has been closed"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})


def test_a_collected_optimizer_frees_its_memory() -> None:
    runtime = StandInRuntime()
    optimizer = make("all", runtime)
    plane = weakref.ref(optimizer._alive().states[0].planes.exp_avg)
    exp_avg = optimizer.state[optimizer.param_groups[0]["params"][0]]["exp_avg"]
    del optimizer
    gc.collect()
    assert runtime.registered == {}
    assert plane() is None
    assert float(exp_avg.fill_(1.0).sum()) == NUMEL  # who holds a tensor has its bytes


@pytest.mark.parametrize("overlap", [False, True])
def test_a_module_that_holds_its_optimizer_is_collected_with_it(overlap: bool) -> None:
    runtime = StandInRuntime()

    class Offloading(OffloadAdam):
        _backend = replace(HOST_AS_DEVICE, make_runtime=lambda _: runtime)

    module = torch.nn.Linear(4, 4)
    object.__setattr__(
        module, "held", Offloading(module.parameters(), module=module, overlap=overlap)
    )
    assert runtime.nbytes > 0
    del module
    gc.collect()
    assert runtime.registered == {}


@pytest.mark.parametrize("pin", ["all", "staging"])
@pytest.mark.parametrize("order", [1, -1])
def test_each_buffer_is_pinned_once_whatever_the_order_of_sizes(pin: str, order: int) -> None:
    runtime = StandInRuntime()

    class Offloading(OffloadAdam):
        _backend = replace(HOST_AS_DEVICE, make_runtime=lambda device: runtime)

    parameters = [
        torch.nn.Parameter(torch.ones(size * NUMEL, dtype=torch.bfloat16))
        for size in range(1, 6)[::order]
    ]
    optimizer = Offloading(parameters, **in_policies(bucket_nbytes=1, pin=pin))
    assert runtime.calls == [call for call in runtime.calls if call.startswith("register")]
    # State or the buffers of gradients, and the slots of parameters.
    assert len(runtime.calls) == 2
    optimizer.close()


def test_larger_buffers_take_the_place_of_smaller_ones() -> None:
    runtime = StandInRuntime()
    optimizer = make("staging", runtime)
    larger = torch.nn.Parameter(torch.ones(2 * NUMEL, dtype=torch.bfloat16))
    optimizer.add_param_group({"params": [larger]})
    # The larger shard has one of the two slots.
    staging = (STAGING_NBYTES // 2) * (1 + 2)
    assert optimizer.pinned_nbytes == runtime.nbytes == staging + 2 * BUFFER_NBYTES
    optimizer.close()
    assert runtime.registered == {}


@pytest.mark.parametrize("overlap", [False, True])
def test_planes_are_touched_by_their_threads_where_there_are_several_nodes(
    monkeypatch: pytest.MonkeyPatch, overlap: bool
) -> None:
    from offload_adam.kernels import adam, first_touch

    launched: list[tuple[str, int]] = []
    touched: list[int] = []
    monkeypatch.setattr("offload_adam.step.step.spans_nodes", lambda: True)
    original_touch, original_update = first_touch.touch, adam.update

    def note(memory: npt.NDArray[np.uint8], num_threads: int) -> None:
        launched.append(("touch", threading.get_ident()))
        touched.append(memory.nbytes)
        original_touch(memory, num_threads)

    def note_update(*arguments: Any) -> None:
        launched.append(("update", threading.get_ident()))
        original_update(*arguments)

    monkeypatch.setattr(first_touch, "touch", note)
    monkeypatch.setattr(adam, "update", note_update)
    optimizer = make("none", StandInRuntime(), overlap=overlap)
    assert touched == 2 * [4 * NUMEL, 4 * NUMEL, 4 * NUMEL, 2 * NUMEL]
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.synchronize()
    assert {what for what, _ in launched} == {"touch", "update"}
    assert len({ident for _, ident in launched}) == 1
    assert (launched[0][1] == threading.get_ident()) is not overlap
