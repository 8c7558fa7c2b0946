"""`accumulate="auto"` on one rank takes memory for sums once; the bits are those of "host"."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from offload_adam import HostMemoryError, OffloadAdam, OffloadPolicy
from offload_adam.coordinator import node_memory
from offload_adam.errors import StreamedGradientError
from offload_adam.layout.flat import ParameterSpec
from offload_adam.params.selection import bucket_key_of
from offload_adam.plan.inputs import Training
from offload_adam.plan.prediction import predict
from tests.support.accumulation import SHAPES, THREE, Step, gradients, make, train
from tests.support.reference import Weights

BF16, FP32 = torch.bfloat16, torch.float32

PLACES: dict[str, dict[str, Any]] = {
    "host": {},
    "host overlapped": {"overlap": True},
    "offloaded": {"on_device": True, "overlap": False},
    "offloaded overlapped": {"on_device": True, "overlap": True},
    "one bucket": {"on_device": True, "overlap": True, "offload": {"bucket_nbytes": 1 << 20}},
    "staging": {"on_device": True, "overlap": True, "offload": {"pin": "staging"}},
    "not pinned": {"on_device": True, "overlap": False, "offload": {"pin": "none"}},
    "device": {"on_device": True, "offload": {"offload_fraction": 0.0}},
    "partly": {"on_device": True, "overlap": True, "offload": {"offload_fraction": 0.5}},
}


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("place", PLACES)
def test_the_bits_are_those_of_memory_that_was_planned(place: str, dtype: torch.dtype) -> None:
    options = PLACES[place]
    auto = train(0, 1, dtype, options)
    host = train(0, 1, dtype, {**options, "accumulate": "host"})
    assert auto.steps == host.steps
    assert [skipped for _, _, skipped in auto.steps] == [number == 2 for number in range(9)]
    assert auto.weights == host.weights
    assert auto.state == host.state
    assert host.bytes_taken == 0
    # fp32 shards that receive no direct copies hold the sums themselves.
    in_shard = dtype == FP32 and place in ("staging", "not pinned", "device")
    assert (auto.bytes_taken == 0) == in_shard


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("place", PLACES)
def test_the_sums_are_those_of_torch_in_fp32(place: str, dtype: torch.dtype) -> None:
    model = Weights(SHAPES, dtype)
    options = {"offload": {}, "on_device": False, **PLACES[place]}
    optimizer = make(model, betas=(0.0, 0.9), **options)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    for number in range(2):
        sums: list[torch.Tensor | None] = [None] * len(SHAPES)
        for count, backward in enumerate(THREE):
            given = gradients(model, (1, number + 1, count), backward, 1.0)
            model(given).backward()
            for position, gradient in enumerate(given):
                if gradient is not None:
                    before = sums[position]
                    sums[position] = (
                        gradient.float() if before is None else before + gradient.float()
                    )
        optimizer.step()
        optimizer.synchronize()
        for weight, expected in zip(model.all, sums, strict=True):
            assert expected is not None
            assert torch.equal(optimizer.state[weight]["exp_avg"], expected)
    optimizer.close()


@pytest.mark.parametrize("place", PLACES)
def test_memory_is_taken_once_logged_and_predicted(
    place: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = Weights(SHAPES, BF16)
    options = {"offload": {}, "on_device": False, **PLACES[place]}
    optimizer = make(model, **options)
    model(gradients(model, (1, 1, 1), THREE[0], 1.0)).backward()
    optimizer.step()
    assert optimizer.host_nbytes["accumulated gradients"] == 0
    caplog.set_level(logging.INFO, "offload_adam")
    before = sum(entry.nbytes for entry in optimizer.memory_ledger())
    caplog.clear()
    for number in range(2):
        for count in range(2):
            model(gradients(model, (1, number + 2, count), THREE[0], 1.0)).backward()
        optimizer.step()
    optimizer.synchronize()
    ledger = optimizer.memory_ledger()
    taken = [entry for entry in ledger if entry.category == "accumulated gradients"]
    nbytes = sum(entry.nbytes for entry in taken)
    lines = [r.getMessage() for r in caplog.records if "several backwards" in r.getMessage()]
    assert len(lines) == 1
    assert f"({nbytes} bytes) to add up their gradients in fp32" in lines[0]
    # Each bucket's elements are a multiple of 128, and each has 4 bytes.
    numels = {e.bucket: e.nbytes // 2 for e in ledger if e.category == "parameters" and e.nbytes}
    assert {entry.bucket: entry.nbytes for entry in taken} == {
        bucket: 4 * numel for bucket, numel in numels.items()
    }
    assert sum(entry.nbytes for entry in ledger) == before + nbytes

    specs = [
        ParameterSpec(i, p.numel(), p.element_size(), bucket_key_of(p))
        for i, p in enumerate(model.all)
    ]
    offload = OffloadPolicy(**{"bucket_nbytes": 700, **options["offload"]})
    training = Training(on_device=options["on_device"], offload=offload, accumulates_later=True)
    plan = predict(specs, training)
    on_host = optimizer.host_nbytes["accumulated gradients"]
    assert plan.host.get("accumulated gradients", 0) == on_host
    on_device = plan.device.get("accumulated gradients", 0)
    assert on_device + on_host == nbytes
    state = ("gradient shards", "master_weight", "exp_avg", "exp_avg_sq")
    assert sum(plan.host.get(key, 0) for key in state) == optimizer.host_nbytes["state"]
    optimizer.close()


def test_parameters_that_are_added_later_get_their_own_memory(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "offload_adam")
    module = torch.nn.ParameterList(torch.nn.Parameter(torch.ones(300)) for _ in range(2))
    first, second = module
    optimizer = OffloadAdam([first], betas=(0.0, 0.9), module=module)
    for _ in range(2):
        (first.sum() * 3.0).backward()
    optimizer.step()
    optimizer.add_param_group({"params": [second]})
    for _ in range(3):
        (first.sum() * 3.0 + second.sum()).backward()
    optimizer.step()
    assert torch.equal(optimizer.state[first]["exp_avg"], torch.full((300,), 9.0))
    assert torch.equal(optimizer.state[second]["exp_avg"], torch.full((300,), 3.0))
    lines = [r.getMessage() for r in caplog.records if "several backwards" in r.getMessage()]
    assert ["(1536 bytes)" in line for line in lines] == [True, True]
    assert optimizer.host_nbytes["accumulated gradients"] == 2 * 1536
    optimizer.close()


def test_a_node_without_memory_is_protected(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for allowed in (False, True):
        model = Weights(SHAPES)
        offload = {"allow_overcommit": allowed}
        optimizer = make(model, on_device=True, overlap=False, offload=offload)
        given = gradients(model, (1, 1, 1), THREE[0], 1.0)
        model(given).backward()
        with monkeypatch.context() as patch:
            patch.setattr(node_memory, "available_memory", lambda: (2047, "of the machine"))
            if allowed:
                model(given).backward()
                assert "only 2.00 KiB are available (of the machine)" in caplog.text
            else:
                with pytest.raises(HostMemoryError, match=r"several backwards.*no_sync\(\)"):
                    model(given).backward()
                optimizer.zero_grad()
        assert (optimizer.host_nbytes["accumulated gradients"] > 0) == allowed
        for _ in range(2):  # the optimizer is intact
            model(given).backward()
        optimizer.step()
        assert optimizer.host_nbytes["accumulated gradients"] > 0
        optimizer.close()


def test_without_streaming_gradients_accumulate_in_grad() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    for accumulate in ("auto", None):
        optimizer = OffloadAdam([parameter], betas=(0.0, 0.9), accumulate=accumulate)
        for _ in range(2):
            parameter.sum().backward()
        optimizer.step()
        assert torch.equal(optimizer.state[parameter]["exp_avg"], torch.full((3,), 2.0))
        assert optimizer.host_nbytes["accumulated gradients"] == 0
        optimizer.zero_grad()
        optimizer.close()
    with pytest.raises(ValueError, match=r"accumulate='error' needs module="):
        OffloadAdam([parameter], accumulate="error")


def test_gradients_set_by_hand_take_no_memory() -> None:
    model = Weights(SHAPES)
    optimizer = make(model, on_device=True, overlap=True, offload={}, betas=(0.0, 0.9))
    for _ in range(2):
        given = gradients(model, (1, 1, 0), THREE[0], 1.0)  # without the last parameter's
        model(given).backward()
        model.get_parameter("w5").grad = torch.full_like(model.get_parameter("w5"), 0.5)
        optimizer.step()
    assert optimizer.host_nbytes["accumulated gradients"] == 0
    optimizer.close()


def test_parameters_without_elements_take_no_memory(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "offload_adam")
    model = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(0, 4))])
    optimizer = OffloadAdam(model.parameters(), module=model)
    before = optimizer.memory_ledger()
    for _ in range(3):
        model[0].square().sum().backward()
    optimizer.step()
    assert optimizer.memory_ledger() == before
    assert "several backwards" not in caplog.text


def test_the_models_zero_grad_between_backwards_is_an_error() -> None:
    model = Weights(SHAPES)
    optimizer = make(model, on_device=False, offload={})
    given = gradients(model, (1, 1, 1), THREE[0], 1.0)
    for _ in range(2):
        model(given).backward()
    model.zero_grad()
    with pytest.raises(ValueError, match=r"has already left \.grad"):
        model(given).backward()
    optimizer.zero_grad()
    optimizer.close()


def test_none_means_auto() -> None:
    options = {"on_device": True, "overlap": False}
    steps = [Step(THREE)]
    assert train(0, 1, BF16, {**options, "accumulate": None}, steps=steps) == train(
        0, 1, BF16, options, steps=steps
    )


@pytest.mark.parametrize("accumulate", ["auto", "host", "error"])
def test_a_backward_may_reach_any_one_of_many_parameters(accumulate: str) -> None:
    """A bucket of more than 64 parameters, in which most hooks do not deliver their gradients."""

    def make_model() -> torch.nn.ParameterList:
        generator = torch.Generator().manual_seed(1)
        return torch.nn.ParameterList([torch.randn(3, generator=generator) for _ in range(70)])

    for reached in (0, 1, 7, 40, 69):
        model, expected = make_model(), make_model().double()
        optimizer = OffloadAdam(
            model.named_parameters(), module=model, accumulate=accumulate, eps=1e-3
        )
        oracle = torch.optim.Adam(expected.parameters(), foreach=False, eps=1e-3)
        for one in (model, expected):
            torch.stack([parameter.square().sum() for parameter in one]).sum().backward()
        expected[reached].sum().backward()

        def reach(
            weight: torch.nn.Parameter = model[reached], optimizer: OffloadAdam = optimizer
        ) -> None:
            weight.sum().backward()
            optimizer.clip_grad_norm_(1e6)

        if accumulate == "error":
            with pytest.raises(ValueError, match=rf"'{reached}'.*no_sync\(\)"):
                reach()
            continue
        reach()
        for one, stepper in ((model, optimizer), (expected, oracle)):
            stepper.step()
            stepper.zero_grad()
            # A step whose only backward reaches this parameter.
            one[reached].square().sum().backward()
            stepper.step()
        for ours, theirs in zip(model, expected, strict=True):
            assert (ours - theirs).abs().max() < 1e-6
        optimizer.close()


def test_a_backward_to_few_parameters_is_kept_by_no_sync_and_rejected_after_zero_grad() -> None:
    model = torch.nn.ParameterList([torch.ones(3) for _ in range(70)])
    optimizer = OffloadAdam(model.named_parameters(), module=model, betas=(0.0, 0.9))

    def run() -> None:
        torch.stack([parameter.sum() for parameter in model]).sum().backward()
        model[7].sum().backward()

    run()
    with optimizer.no_sync():
        pass
    optimizer.step()
    for position, parameter in enumerate(model):
        expected = torch.full((3,), 2.0 if position == 7 else 1.0)
        assert torch.equal(optimizer.state[parameter]["exp_avg"], expected)
    optimizer.zero_grad()
    torch.stack([parameter.sum() for parameter in model]).sum().backward()
    model.zero_grad()
    model[7].sum().backward()
    with pytest.raises(ValueError, match=r"was set to None, but its gradient has already left"):
        optimizer.step()


def test_torchs_clipping_is_rejected_after_a_backward_to_few_parameters() -> None:
    model = torch.nn.ParameterList([torch.ones(3) for _ in range(70)])
    optimizer = OffloadAdam(model.named_parameters(), module=model, betas=(0.0, 0.9))
    torch.stack([parameter.sum() for parameter in model]).sum().backward()
    model[7].sum().backward()
    with pytest.raises(StreamedGradientError, match=r"optimizer.clip_grad_norm_\(\)"):
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    norm = optimizer.clip_grad_norm_(1.0)
    assert norm == pytest.approx((3 * 69 + 3 * 4) ** 0.5)


def test_no_sync_finds_gradients_that_were_set_to_none() -> None:
    model = torch.nn.ParameterList([torch.ones(3) for _ in range(2)])
    optimizer = OffloadAdam(model.named_parameters(), module=model)
    torch.stack([parameter.sum() for parameter in model]).sum().backward()
    model.zero_grad()
    with pytest.raises(ValueError, match=r"was set to None, but its gradient has already left"):
        optimizer.no_sync()
