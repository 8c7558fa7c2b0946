"""Overlapped steps on a GPU give the same bits as sequential steps on a CPU."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from offload_adam import OffloadAdam
from offload_adam.layout.schedule import Lane
from offload_adam.step.build import Backend
from offload_adam.transfer.streams import CudaStreams, Streams, streams_for
from tests.gpu.layers import assert_same_bits, bits, make, train

NUM_STEPS = 12


@pytest.fixture(scope="module")
def expected() -> list[dict[str, torch.Tensor]]:
    model, optimizer = make("cpu", overlap=False)
    train(model, optimizer, range(NUM_STEPS), "cpu")
    return bits(model, optimizer)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"pin": "staging"}, {"pin": "none"}, {"bucket_nbytes": 1 << 30}, {"bucket_nbytes": 1}],
    ids=str,
)
def test_every_option_gives_the_bits_of_the_cpu(
    expected: list[dict[str, torch.Tensor]], overlap: bool, options: dict[str, Any]
) -> None:
    model, optimizer = make("cuda", overlap=overlap, **options)
    train(model, optimizer, range(NUM_STEPS), "cuda")
    assert_same_bits(bits(model, optimizer), expected)
    optimizer.close()


@pytest.mark.parametrize(
    "options",
    [
        {"module": None},
        {"module": None, "pin": "staging"},
        {"module": None, "bucket_nbytes": 1 << 30},
        {"accumulate": "host", "bucket_nbytes": 1 << 30},
    ],
    ids=str,
)
def test_gradients_that_are_packed_for_their_copy_give_the_bits_of_the_cpu(
    expected: list[dict[str, torch.Tensor]], options: dict[str, Any]
) -> None:
    model, optimizer = make("cuda", **options)
    train(model, optimizer, range(NUM_STEPS), "cuda")
    assert_same_bits(bits(model, optimizer), expected)
    optimizer.close()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("pin", ["all", "none"])
def test_kept_state_continues_with_the_bits_of_the_cpu(
    expected: list[dict[str, torch.Tensor]], overlap: bool, pin: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"keep": "shared", "keep_path": str(tmp_path), "pin": pin}
    for steps in (range(NUM_STEPS // 2), range(NUM_STEPS // 2, NUM_STEPS)):
        model, optimizer = make("cuda", overlap=overlap, **options)
        assert (optimizer.resumed_step is None) == (steps.start == 0)
        train(model, optimizer, steps, "cuda")
        found = bits(model, optimizer)
        optimizer.close()
    assert_same_bits(found, expected)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("pin", ["all", "staging"])
@pytest.mark.parametrize("state_format", ["bf16", "mixed", "int8"])
def test_low_precision_has_the_bits_of_the_cpu(overlap: bool, pin: str, state_format: str) -> None:
    results = []
    for device, overlaps in (("cpu", False), ("cuda", overlap)):
        model, optimizer = make(device, overlap=overlaps, state_format=state_format, pin=pin)
        train(model, optimizer, range(NUM_STEPS), device)
        results.append(bits(model, optimizer))
        optimizer.close()
    assert_same_bits(*results)


def test_state_on_the_host_and_on_the_gpu_follows_the_cpu(
    expected: list[dict[str, torch.Tensor]],
) -> None:
    model, optimizer = make("cuda", overlap=True, offload_fraction=0.5)
    train(model, optimizer, range(NUM_STEPS), "cuda")
    states = optimizer._alive().states
    hosted = {name: s.plan.location.is_host for s in states for name in s.names}
    assert set(hosted.values()) == {False, True}
    # The GPU sums the norm of its part in another order, so the clip factor may differ by one ULP.
    found = bits(model, optimizer)
    for (name, parameter), one, other in zip(
        model.named_parameters(), found, expected, strict=True
    ):
        state = optimizer.state[parameter]
        assert state["exp_avg"].is_cuda is not hosted[name]
        for key in ("exp_avg", "exp_avg_sq", "master_weight"):
            assert torch.allclose(one[key], other[key], rtol=1e-5, atol=1e-6), (name, key)


class DelayedStreams(CudaStreams):
    """Streams with random delays before and after the work."""

    random = random.Random(0)

    def launch(
        self,
        lane: Lane,
        action: Callable[[], object],
        *,
        reads: Iterable[torch.Tensor] = (),
        writes: Iterable[torch.Tensor] = (),
    ) -> None:
        def late() -> None:
            if self.random.random() < 0.5:
                torch.cuda._sleep(self.random.randrange(200_000))
            action()
            if self.random.random() < 0.3:
                torch.cuda._sleep(self.random.randrange(100_000))

        if self.random.random() < 0.1 and threading.current_thread() is not threading.main_thread():
            time.sleep(self.random.random() * 1e-3)
        super().launch(lane, late, reads=reads, writes=writes)


def delayed(device: torch.device) -> Streams:
    return DelayedStreams(device) if device.type == "cuda" else streams_for(device)


class Delayed(OffloadAdam):
    _backend = Backend(make_streams=delayed)


@pytest.mark.timeout(600)
def test_a_thousand_steps_with_random_delays_give_the_sequential_bits() -> None:
    steps = range(1000)
    model, optimizer = make("cpu", overlap=False)
    train(model, optimizer, steps, "cpu")
    late_model, late = make("cuda", Delayed, overlap=True)
    train(late_model, late, steps, "cuda")
    assert_same_bits(bits(late_model, late), bits(model, optimizer))
