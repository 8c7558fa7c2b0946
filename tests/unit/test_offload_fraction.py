"""A share of the state stays on the device and is updated there; the host's part does not notice.

Parameters in host memory stand for those on a device, as elsewhere.
"""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offload_adam import Adam, OffloadAdam, OffloadPolicy, load_checkpoint, save_checkpoint
from offload_adam.kernels.scalars import Hyperparameters
from offload_adam.layout.flat import ParameterSpec, plan_buckets
from offload_adam.layout.state_plan import StateLocation, kept_on_device
from offload_adam.step.ledger import by_category
from tests.support.devices import HOST_AS_DEVICE
from tests.support.kernel_reference import ReferenceState, reference_update
from tests.support.policies import in_policies
from tests.support.scenario import Offloading

NUM_STEPS = 6
NUMEL = 384  # of each of four layers' parameters, three blocks: a bucket each


class Layers(torch.nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.weights = torch.nn.ParameterList(
            torch.nn.Parameter(torch.randn(NUMEL, generator=generator).to(dtype)) for _ in range(4)
        )

    def forward(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        terms = [(w * g).sum().float() for w, g in zip(self.weights, gradients, strict=True)]
        return torch.stack(terms).sum()


def gradients_of(step: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(NUMEL, generator=generator).to(dtype) for _ in range(4)]


def make(dtype: torch.dtype, fraction: float, **options: Any) -> tuple[Layers, OffloadAdam]:
    model = Layers(dtype)
    settings: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "max_grad_norm": 3.0}
    settings |= {"module": model, "overlap": False, "bucket_nbytes": NUMEL * dtype.itemsize}
    settings |= options
    settings["offload_fraction"] = fraction
    return model, Offloading(model.parameters(), **in_policies(**settings))


def take_step(model: Layers, optimizer: OffloadAdam, step: int) -> None:
    model(gradients_of(step, model.weights[0].dtype)).backward()
    optimizer.step()


def state_of(model: Layers, optimizer: OffloadAdam, number: int) -> dict[str, torch.Tensor]:
    """Return copies of one layer's state, whatever it is called."""
    weight = model.weights[number]
    entry = optimizer.state[weight]
    named = {"weight": weight, "master_weight": weight, **entry}
    return {key: value.detach().clone() for key, value in named.items()}


@given(
    sizes=st.lists(st.integers(0, 2000), min_size=1, max_size=12),
    world_size=st.integers(1, 3),
    fraction=st.floats(0, 1),
    data=st.data(),
)
def test_the_share_is_a_run_of_the_first_needed_and_never_too_large(
    sizes: list[int], world_size: int, fraction: float, data: st.DataObject
) -> None:
    specs = [ParameterSpec(i, size, 4, "f") for i, size in enumerate(sizes)]
    buckets = plan_buckets(specs, world_size=world_size, bucket_nbytes=2000)
    on_device = data.draw(st.sets(st.sampled_from(range(len(buckets)))))
    buckets = tuple(replace(b, on_device=b.index in on_device) for b in buckets)
    kept = kept_on_device(buckets, fraction)
    # Buckets are in backward order, so the forward needs the last of them first.
    candidates = [bucket for bucket in buckets[::-1] if bucket.index in on_device]
    assert [bucket.index for bucket in candidates[: len(kept)]] == sorted(kept, reverse=True)
    total = sum(bucket.numel for bucket in candidates)
    held = sum(bucket.numel for bucket in candidates[: len(kept)])
    assert total - held >= fraction * total
    if len(kept) < len(candidates):  # one more would have been too many
        assert total - held - candidates[len(kept)].numel < fraction * total


def test_all_and_nothing() -> None:
    buckets = plan_buckets(
        [ParameterSpec(i, 100, 4, "f", on_device=True) for i in range(5)],
        world_size=1,
        bucket_nbytes=1,
    )
    assert kept_on_device(buckets, 1.0) == frozenset()
    empty = ParameterSpec(9, 0, 2, "a", on_device=True)
    (without_elements,) = plan_buckets([empty], world_size=1, bucket_nbytes=1, first_index=9)
    assert kept_on_device([*buckets, without_elements], 1.0) == frozenset()
    assert kept_on_device(buckets, 0.0) == frozenset(range(5))
    assert kept_on_device(buckets, 0.5) == {3, 4}


def test_the_first_bucket_that_does_not_fit_ends_the_search() -> None:
    sizes = [100, 1000, 100, 100]
    specs = [ParameterSpec(i, size, 4, "f", on_device=True) for i, size in enumerate(sizes)]
    buckets = plan_buckets(specs, world_size=1, bucket_nbytes=1)
    # 704 of 1408 elements may stay: the forward needs bucket 3 first, and bucket 2 is too large.
    assert [bucket.numel for bucket in buckets] == [128, 128, 1024, 128]
    assert kept_on_device(buckets, 0.5) == {3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("drop_in", [False, True])
@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"nesterov": True}], ids=str)
def test_the_host_part_has_its_bits_and_the_rest_the_references(
    dtype: torch.dtype, drop_in: bool, options: dict[str, Any]
) -> None:
    if drop_in:
        options = {**options, "module": None}
    whole_model, whole = make(dtype, 1.0, **options)
    model, optimizer = make(dtype, 0.5, **options)
    kept = [0, 1]  # in forward order, the first layers
    for step in range(NUM_STEPS):
        before = [state_of(model, optimizer, number) for number in range(4)]
        take_step(whole_model, whole, step)
        take_step(model, optimizer, step)
        whole.zero_grad()
        optimizer.zero_grad()
        assert optimizer.last_step is not None
        assert whole.last_step is not None
        scale = optimizer.last_step.clip_factor
        assert scale < 1.0
        assert scale == pytest.approx(whole.last_step.clip_factor, rel=1e-7)
        for number in range(4):
            found = state_of(model, optimizer, number)
            if number not in kept:
                for key, value in state_of(whole_model, whole, number).items():
                    assert torch.equal(found[key], value), (step, number, key)
                continue
            expected = reference(before[number], gradients_of(step, dtype)[number], scale, options)
            for key, float64 in expected.items():
                assert_within_two_ulp(found[key], float64)
            assert torch.equal(found["weight"], found["master_weight"].to(dtype))
            assert float(found["step"]) == step + 1


def reference(
    before: dict[str, torch.Tensor], gradient: torch.Tensor, scale: float, options: dict[str, Any]
) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
    """Return the state after one float64 update of the float32 state before it."""
    keys = ["master_weight", "exp_avg", "exp_avg_sq"]
    keys += ["max_exp_avg_sq"] * bool(options.get("amsgrad"))
    state = ReferenceState(*(before[key].double().numpy() for key in keys))
    hyper = Hyperparameters(
        lr=1e-2,
        beta1=0.9,
        beta2=0.999,
        eps=1e-8,
        weight_decay=0.1,
        decoupled_weight_decay=False,
        nesterov=bool(options.get("nesterov")),
        maximize=False,
    )
    reference_update(state, gradient.float().numpy(), hyper, int(before["step"]) + 1, scale)
    return {key: getattr(state, key) for key in keys}


def assert_within_two_ulp(
    found: torch.Tensor, expected: np.ndarray[Any, np.dtype[np.float64]]
) -> None:
    ulp = np.spacing(np.abs(expected).astype(np.float32)).astype(np.float64)
    assert np.all(np.abs(found.double().numpy() - expected) <= 2 * ulp)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("fraction", "num_kept"), [(1.0, 0), (0.6, 1), (0.5, 2), (0.0, 4)])
def test_what_stays_takes_no_host_memory_and_stands_in_the_ledger(
    dtype: torch.dtype, fraction: float, num_kept: int
) -> None:
    _, optimizer = make(dtype, fraction)
    states = optimizer._alive().states
    offloaded_and_kept = (4 - num_kept) * [StateLocation.OFFLOADED] + num_kept * [
        StateLocation.DEVICE
    ]
    assert [state.plan.location for state in states] == offloaded_and_kept
    hosted = 4 * 3 + dtype.itemsize
    # On its device an fp32 parameter is its own master weight.
    kept = 4 * (3 if dtype != torch.float32 else 2) + dtype.itemsize
    assert optimizer.host_nbytes["state"] == (4 - num_kept) * NUMEL * hosted
    totals = by_category(optimizer.memory_ledger())
    planes = ("exp_avg", "exp_avg_sq", "master_weight", "gradient shards")
    assert sum(totals.get(key, 0) for key in planes) == NUMEL * (
        (4 - num_kept) * hosted + num_kept * kept
    )
    for state in states:
        assert state.planes.gradient_shard is not None
        assert state.planes.gradient_shard.device == state.device
    if num_kept == 4:
        assert optimizer.host_nbytes["staging"] == 0
        assert optimizer.host_nbytes["block_sums"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_states_load_whatever_the_share_and_the_buckets(dtype: torch.dtype, tmp_path: Path) -> None:
    model, optimizer = make(dtype, 0.5)
    for step in range(3):
        take_step(model, optimizer, step)
    save_checkpoint(tmp_path / "c", model=model, optimizer=optimizer)
    saved = optimizer.state_dict()
    full = optimizer.full_state_dict()
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    for fraction, num_layers in ((1.0, 1), (0.5, 1), (0.0, 1), (0.5, 2), (1.0, None)):
        for way in ("checkpoint", "local", "full"):
            # None is the default, which puts all layers into one bucket.
            bucket_nbytes = num_layers and num_layers * NUMEL * dtype.itemsize
            other_model, other = make(dtype, fraction, bucket_nbytes=bucket_nbytes)
            assert len(other._alive().states) == 4 // (num_layers or 4)
            take_step(other_model, other, 50)
            if way == "checkpoint":
                load_checkpoint(tmp_path / "c", model=other_model, optimizer=other)
            else:
                other_model.load_state_dict(weights)
                other.load_state_dict(saved if way == "local" else full)
                # A weight that was its own master has none in the state: the step would follow.
                other.refresh_master()
            for number in range(4):
                expected = state_of(model, optimizer, number)
                for key, value in state_of(other_model, other, number).items():
                    assert torch.equal(value, expected[key]), (fraction, way, number, key)


def test_weights_changed_from_outside_are_followed() -> None:
    model, optimizer = make(torch.bfloat16, 0.0)
    take_step(model, optimizer, 0)
    with torch.no_grad():
        model.weights[0].zero_()
    take_step(model, optimizer, 1)
    assert float(optimizer.state[model.weights[0]]["master_weight"].abs().max()) < 0.1


def test_a_gradient_that_is_not_finite_changes_no_bit_and_is_named() -> None:
    model, optimizer = make(torch.bfloat16, 0.5)
    take_step(model, optimizer, 0)
    before = [state_of(model, optimizer, number) for number in range(4)]
    gradients = gradients_of(1, torch.bfloat16)
    gradients[3][7] = torch.inf
    model(gradients).backward()
    optimizer.step()
    assert optimizer.last_step is not None
    assert optimizer.last_step.non_finite == ("weights.3",)
    for number, expected in enumerate(before):
        for key, value in state_of(model, optimizer, number).items():
            assert torch.equal(value, expected[key])


@pytest.mark.parametrize("overlap", [False, True])
def test_gradients_that_stay_are_let_go_while_backward_goes_on(overlap: bool) -> None:
    model = Layers(torch.bfloat16)
    seen: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def look(weight: torch.Tensor) -> None:  # before the optimizer's own hook takes it
        assert weight.grad is not None
        alive.append(sum(one() is not None for one in seen))
        seen.append(weakref.ref(weight.grad))

    for weight in model.weights:
        weight.register_post_accumulate_grad_hook(look)
    optimizer = Offloading(
        model.parameters(),
        module=model,
        offload=OffloadPolicy(bucket_nbytes=2 * NUMEL, offload_fraction=0.0),
        overlap=overlap,
    )
    for step in range(2):
        alive.clear()
        seen.clear()
        model(gradients_of(step, torch.bfloat16)).backward()
        assert len(seen) == 4
        assert max(alive) <= 1
        assert not any(one() is not None for one in seen)
        optimizer.step()


def test_accumulated_gradients_add_up_where_they_stay() -> None:
    results = []
    for fraction in (1.0, 0.0):
        model, optimizer = make(
            torch.bfloat16, fraction, accumulate="host", max_grad_norm=None, weight_decay=0.0
        )
        for step in range(2):
            model(gradients_of(step, torch.bfloat16)).backward()
        optimizer.step()
        results.append(torch.stack([optimizer.state[w]["exp_avg"] for w in model.weights]))
    expected = sum(torch.stack(gradients_of(step, torch.bfloat16)).double() for step in range(2))
    assert isinstance(expected, torch.Tensor)
    for found in results:
        assert torch.allclose(found.double(), 0.1 * expected, rtol=1e-6, atol=1e-9)


def test_sparse_rows_of_kept_tables() -> None:
    class OffloadingAdam(Adam):
        _backend = HOST_AS_DEVICE

    tables = []
    for fraction in (1.0, 0.0):
        torch.manual_seed(0)
        table = torch.nn.Embedding(50, 6, sparse=True)
        optimizer = OffloadingAdam(
            table.parameters(),
            use_offload=True,
            weight_decay=0.1,
            offload=OffloadPolicy(offload_fraction=fraction),
        )
        for step in range(3):
            table(torch.tensor([1, 4, 4, 30 + step])).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        tables.append(table.weight.detach())
    assert torch.allclose(tables[0], tables[1], rtol=1e-6, atol=1e-9)


def test_without_a_device_it_is_a_warning() -> None:
    with pytest.warns(UserWarning, match="no effect, because no parameter is on a GPU"):
        optimizer = OffloadAdam(
            [torch.nn.Parameter(torch.ones(3))], offload=OffloadPolicy(offload_fraction=0.5)
        )
    assert optimizer.host_nbytes["state"] > 0


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_a_share_outside_of_0_and_1_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"offload_fraction must lie in \[0, 1\]"):
        OffloadAdam(
            [torch.nn.Parameter(torch.ones(3))], offload=OffloadPolicy(offload_fraction=value)
        )
    with pytest.raises(TypeError, match="offload_fraction must be a number"):
        OffloadAdam(
            [torch.nn.Parameter(torch.ones(3))],
            offload=OffloadPolicy(offload_fraction="1"),  # type: ignore[arg-type]
        )
