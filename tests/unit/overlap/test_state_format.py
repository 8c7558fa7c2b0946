"""State in low precision with parameters on a device: the bits of a run in host memory."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from offload_adam import OffloadAdamW, OffloadPolicy, begin_checkpoint, save_checkpoint
from offload_adam.memory.split_master import join
from offload_adam.options import Pin
from tests.distributed.test_snapshot_buffer import WAIT_S, Disk
from tests.support.devices import HOST_AS_DEVICE
from tests.support.state_format import (
    NUM_STEPS,
    WITHOUT_SECOND,
    Net,
    Values,
    differences,
    gradients_of,
    make,
    values_of,
)

NON_FINITE = 2
"""The step with a gradient that is not finite."""


class OnDevice(OffloadAdamW):
    _backend = HOST_AS_DEVICE


def make_on_device(
    *, pin: Pin = "all", bucket_nbytes: int = 1000, snapshot_nbytes: int = 0, **options: Any
) -> tuple[Net, Any]:
    offload = OffloadPolicy(
        bucket_nbytes=bucket_nbytes, pin=pin, snapshot_buffer_nbytes=snapshot_nbytes
    )
    return make("plain 1", kind=OnDevice, offload=offload, **options)


def run(net: Net, optimizer: Any, start: int = 0, end: int = NUM_STEPS) -> None:
    """Take steps with two backwards each, whose sums are exact in bf16; one step is skipped."""
    for step in range(start, end):
        for number in (2 * step, 2 * step + 1):
            gradients = gradients_of(net, number)
            if step == WITHOUT_SECOND:
                del gradients["second.weight"]
            if number == 2 * NON_FINITE:
                gradients["table.weight"][5, 5] = torch.inf
            net(gradients).backward()
        optimizer.step()
        assert optimizer.last_step.skipped == (step == NON_FINITE)
        optimizer.zero_grad()


@pytest.fixture(scope="module", params=["bf16", "int8"])
def state_format(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def expected(state_format: str) -> Values:
    net, optimizer = make("plain 1", state_format=state_format)
    run(net, optimizer)
    return values_of(net, optimizer)


def check(net: Net, optimizer: Any, expected: Values) -> None:
    """Compare all bits with those of a run in host memory, and the parameters with the masters."""
    found = values_of(net, optimizer)
    # A parameter on the device is not its own master weight, so the state has another.
    copied = found.pop("exact.weight master_weight")
    assert torch.equal(copied, net.exact.weight)
    del found["exact.bias master_weight"]
    assert differences(found, expected) == []
    num_split = 0
    for state in optimizer._alive().states:
        if state.planes.master_remainder is None:
            continue
        assert state.planes.master_weight.data_ptr() != state.shard.data_ptr()
        for segment in state.segments.each:
            high = segment.of(state.planes.master_weight)
            assert torch.equal(high, segment.of(state.shard))
            num_split += 1
    assert num_split == 4
    for name in ("first.weight", "first.bias", "second.weight", "table.weight"):
        parameter = net.get_parameter(name)
        remainder = optimizer.state[parameter]["master_remainder"]
        joined = join(parameter.detach(), remainder)
        assert torch.equal(joined, expected[f"{name} master_weight"])


@pytest.mark.parametrize("pin", ["all", "staging", "none"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"streams": True, "overlap": False},
        {"streams": True, "overlap": True},
        {"streams": True, "overlap": True, "accumulate": "host"},
        # One step updates the first and the last parameters of a bucket.
        {"streams": True, "overlap": True, "bucket_nbytes": 2**20},
    ],
    ids=["drop-in", "sequential", "overlapped", "accumulated", "one bucket"],
)
def test_the_bits_are_those_of_a_run_in_host_memory(
    expected: Values, state_format: str, pin: Pin, options: dict[str, Any]
) -> None:
    net, optimizer = make_on_device(pin=pin, state_format=state_format, **options)
    run(net, optimizer)
    check(net, optimizer, expected)
    optimizer.close()


@pytest.mark.parametrize("streams", [False, True])
def test_streaming_in_host_memory(expected: Values, state_format: str, streams: bool) -> None:
    options: dict[str, Any] = {}
    if streams:
        options = {"accumulate": "host", "gradient_reduction": "optimizer"}
    net, optimizer = make("plain 1", streams=streams, state_format=state_format, **options)
    run(net, optimizer)
    assert differences(values_of(net, optimizer), expected) == []
    optimizer.close()


@pytest.mark.parametrize("overlap", [False, True])
def test_gradients_are_added_in_fp32(overlap: bool) -> None:
    """259 is 256 + 1 + 1 + 1, but in bf16 every one of these sums is 256."""
    net, optimizer = make_on_device(
        streams=True, overlap=overlap, accumulate="host", betas=(0.0, 0.9)
    )
    for value in (256.0, 1.0, 1.0, 1.0):
        net({n: torch.full_like(p, value) for n, p in net.named_parameters()}).backward()
    optimizer.step()
    optimizer.synchronize()
    for name in ("first.weight", "second.weight", "exact.weight", "table.weight"):
        first = optimizer.state[net.get_parameter(name)]["exp_avg"]
        assert first.dtype == torch.bfloat16
        # bfloat16 has 258 and 260: each is rounded to one of them.
        assert set(first.flatten().tolist()) == {258.0, 260.0}, name
        second = optimizer.state[net.get_parameter(name)]["exp_avg_sq"].float()
        # Within a unit in the last place, to which it is rounded up or down.
        assert (second / (0.1 * 259**2) - 1).abs().max() < 2**-7, name
    optimizer.close()


def test_a_forward_reads_the_updated_parameters() -> None:
    """Each forward waits for the H2D copies of the parameters that it reads."""
    net, optimizer = make_on_device(streams=True, overlap=True)
    plain_net, plain = make("plain 1")
    seen: list[dict[str, torch.Tensor]] = []
    for model, own in ((net, optimizer), (plain_net, plain)):
        read: dict[str, torch.Tensor] = {}
        for place, layer in model.named_children():

            def note(layer: nn.Module, _: object, place: str = place, read: Any = read) -> None:
                for name, value in layer.named_parameters():
                    read[f"{place}.{name} {len(read)}"] = value.detach().clone()

            layer.register_forward_pre_hook(note)
        run(model, own)
        seen.append(read)
    assert differences(*seen) == []
    assert len(seen[0]) == 2 * NUM_STEPS * 7
    optimizer.close()


@pytest.mark.parametrize("snapshot_nbytes", [0, 2**20])
@pytest.mark.parametrize("overlap", [False, True])
def test_a_background_checkpoint_has_the_bytes_of_one_step(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    state_format: str,
    overlap: bool,
    snapshot_nbytes: int,
) -> None:
    net, optimizer = make_on_device(
        streams=True, overlap=overlap, snapshot_nbytes=snapshot_nbytes, state_format=state_format
    )
    run(net, optimizer, 0, 2)
    save_checkpoint(tmp_path / "plain", model=net, optimizer=optimizer)
    disk = Disk(monkeypatch)
    pending = begin_checkpoint(tmp_path / "background", model=net, optimizer=optimizer)
    assert disk.reached.wait(WAIT_S)
    if snapshot_nbytes:
        run(net, optimizer, 2, 4)
        assert disk.num_writes == 0  # so the updates have overwritten what is to be saved
        disk.go.set()
    else:
        threading.Timer(0.1, disk.go.set).start()  # updates wait for the disk
        run(net, optimizer, 2, 4)
    pending.wait()
    contents = [
        {file.name: file.read_bytes() for file in (tmp_path / name).glob("*.safetensors")}
        for name in ("plain", "background")
    ]
    assert contents[0] == contents[1]
    run(net, optimizer, 4, NUM_STEPS)
    other, plain = make("plain 1", state_format=state_format)
    run(other, plain)
    check(net, optimizer, values_of(other, plain))
    optimizer.close()
