"""Weights between steps: changed from outside, replaced, saved, read by stale graphs."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from offload_adam import Adam, OffloadAdam, OffloadPolicy, ParameterReplacedError
from offload_adam.step.external_edits import differing, sample_differs
from tests.support.devices import HOST_AS_DEVICE


def make(dtype: torch.dtype = torch.bfloat16) -> tuple[torch.nn.Sequential, OffloadAdam]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.Linear(30, 4)).to(dtype)
    return model, OffloadAdam(model.named_parameters(), lr=1e-3)


def train(model: torch.nn.Module, optimizer: OffloadAdam, steps: int = 1) -> None:
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optimizer.step()
        optimizer.zero_grad()


def masters(optimizer: OffloadAdam) -> list[torch.Tensor]:
    return [state["master_weight"].clone() for state in optimizer.state.values()]


def test_clamp_moves_exactly_the_masters_whose_rounding_changed() -> None:
    model, optimizer = make()
    train(model, optimizer, 5)
    weight = model.get_parameter("0.weight")
    before = optimizer.state[weight]["master_weight"].clone()
    with torch.no_grad():
        weight.clamp_(-0.1, 0.1)
    clamped = before.to(torch.bfloat16) != weight
    assert 0 < clamped.sum() < clamped.numel()
    low_bits = (before != before.to(torch.bfloat16).float()) & ~clamped
    assert low_bits.any()
    weight.grad = torch.zeros_like(weight)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    after = optimizer.state[weight]["master_weight"]
    assert torch.equal(after[~clamped], before[~clamped])
    assert torch.equal(after[clamped], weight.detach()[clamped].float())


@pytest.mark.parametrize("model_first", [True, False])
def test_loading_model_and_optimizer_in_any_order_loses_no_low_bits(model_first: bool) -> None:
    model, optimizer = make()
    train(model, optimizer, 3)
    saved_model = {key: value.clone() for key, value in model.state_dict().items()}
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    expected_before = masters(optimizer)
    train(model, optimizer, 2)
    expected = masters(optimizer)

    other, fresh = make()
    train(other, fresh, 1)
    buffer.seek(0)
    saved_optimizer = torch.load(buffer, weights_only=True)
    if model_first:
        other.load_state_dict(saved_model)
        fresh.load_state_dict(saved_optimizer)
    else:
        fresh.load_state_dict(saved_optimizer)
        other.load_state_dict(saved_model)
    for found, wanted in zip(masters(fresh), expected_before, strict=True):
        assert torch.equal(found, wanted)
    train(other, fresh, 2)
    for found, wanted in zip(masters(fresh), expected, strict=True):
        assert torch.equal(found, wanted)


def test_new_weights_are_taken_over_by_the_masters() -> None:
    model, optimizer = make()
    train(model, optimizer, 2)
    with torch.no_grad():
        model.get_parameter("1.weight").fill_(0.25)
    model.get_parameter("1.weight").grad = torch.zeros_like(model.get_parameter("1.weight"))
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    master = optimizer.state[model.get_parameter("1.weight")]["master_weight"]
    assert torch.equal(master, torch.full_like(master, 0.25))


def test_a_skipped_step_leaves_an_outside_change_to_the_next_one() -> None:
    model, optimizer = make()
    with torch.no_grad():
        model.get_parameter("1.bias").fill_(0.5)
    model.get_parameter("1.bias").grad = torch.full((4,), torch.nan, dtype=torch.bfloat16)
    before = masters(optimizer)
    optimizer.step()
    for found, wanted in zip(masters(optimizer), before, strict=True):
        assert torch.equal(found, wanted)
    model.get_parameter("1.bias").grad = torch.zeros(4, dtype=torch.bfloat16)
    optimizer.step()
    master = optimizer.state[model.get_parameter("1.bias")]["master_weight"]
    assert torch.equal(master, torch.full((4,), 0.5))


def test_a_new_group_does_not_hide_an_outside_change() -> None:
    model, optimizer = make()
    with torch.no_grad():
        model.get_parameter("1.bias").fill_(0.5)
    optimizer.add_param_group({"params": [("new", torch.nn.Parameter(torch.ones(3)))]})
    model.get_parameter("1.bias").grad = torch.zeros(4, dtype=torch.bfloat16)
    optimizer.step()
    master = optimizer.state[model.get_parameter("1.bias")]["master_weight"]
    assert torch.equal(master, torch.full((4,), 0.5))


def test_refresh_master_sees_writes_that_no_version_counter_sees() -> None:
    model, optimizer = make()
    train(model, optimizer, 2)
    weight = model.get_parameter("0.weight")
    before = optimizer.state[weight]["master_weight"].clone()
    weight.data[0, 0] = 3.0
    optimizer.refresh_master()
    after = optimizer.state[weight]["master_weight"]
    assert after[0, 0] == 3.0
    assert torch.equal(after.flatten()[1:], before.flatten()[1:])


class OffloadedAdam(OffloadAdam):
    """Treats parameters in host memory as if they were on a device."""

    _backend = HOST_AS_DEVICE


class DeviceAdam(Adam):
    """Treats state as if it were on a device, beside the parameters."""

    _backend = HOST_AS_DEVICE


WATCHED: list[tuple[Any, torch.dtype]] = [
    (OffloadAdam, torch.bfloat16),
    (OffloadAdam, torch.float16),
    (OffloadedAdam, torch.bfloat16),
    (OffloadedAdam, torch.float32),
    (Adam, torch.bfloat16),
    (DeviceAdam, torch.bfloat16),
]
NUMEL = 200_000  # a sample is a tenth of it


def run_with_writes(
    make_optimizer: Any,
    dtype: torch.dtype,
    write: Callable[[torch.Tensor, int], None],
    *,
    through_data: bool,
    num_steps: int = 15,
    before: Callable[[Any, int], None] = lambda optimizer, step: None,
) -> tuple[list[torch.Tensor], int]:
    """Write to a parameter before each step; return it and its master, and how often a log warns.

    Args:
        write: is given the parameter and the step that follows.
        through_data: give it `parameter.data`, whose version counter nobody sees.
        before: what to do before the write.
    """
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("offload_adam").addHandler(handler)
    generator = torch.Generator().manual_seed(0)
    parameter = torch.nn.Parameter((0.1 * torch.randn(NUMEL, generator=generator)).to(dtype))
    optimizer = make_optimizer([parameter], 1e-3)
    try:
        for step in range(num_steps):
            before(optimizer, step)
            with torch.no_grad():
                write(parameter.data if through_data else parameter, step)
            parameter.grad = torch.randn(NUMEL, generator=generator).to(dtype)
            optimizer.step()
    finally:
        logging.getLogger("offload_adam").removeHandler(handler)
    master = optimizer.state[parameter].get("master_weight", parameter.detach())
    return [parameter.detach(), master], sum(".data or NumPy" in text for text in messages)


def copy_at(*steps: int) -> Callable[[torch.Tensor, int], None]:
    def write(weights: torch.Tensor, step: int) -> None:
        if step in steps:
            weights.copy_(torch.linspace(-2.0, 2.0, NUMEL))

    return write


def clamp_after_every_step(weights: torch.Tensor, step: int) -> None:
    if step > 0:
        weights.clamp_(-0.01, 0.01)


def write_one_element(step_of_write: int) -> Callable[[torch.Tensor, int], None]:
    def write(weights: torch.Tensor, step: int) -> None:
        if step == step_of_write:
            weights[NUMEL - 1] = 3.0

    return write


def write_all_and_then_one(weights: torch.Tensor, step: int) -> None:
    copy_at(8)(weights, step)
    write_one_element(12)(weights, step)  # the sample of this step does not have it


@pytest.mark.parametrize(("make_optimizer", "dtype"), WATCHED)
@pytest.mark.parametrize(
    ("write", "num_warnings"),
    [
        (copy_at(0), 0),
        (write_one_element(0), 0),
        (copy_at(8, 12), 1),
        (write_all_and_then_one, 1),
        (clamp_after_every_step, 1),
    ],
    ids=["before_the_first_step", "one_element", "later", "a_smaller_one", "after_every_step"],
)
def test_writes_through_data_are_followed_as_those_with_a_version_are(
    make_optimizer: Any, dtype: torch.dtype, write: Any, num_warnings: int
) -> None:
    expected, _ = run_with_writes(make_optimizer, dtype, write, through_data=False)
    found, warned = run_with_writes(make_optimizer, dtype, write, through_data=True)
    assert all(map(torch.equal, found, expected))
    assert warned == num_warnings
    without, _ = run_with_writes(make_optimizer, dtype, lambda _, __: None, through_data=True)
    assert not torch.equal(found[0], without[0])


def load_its_own_state(optimizer: Any, step: int) -> None:
    if step == 8:
        optimizer.load_state_dict(optimizer.state_dict())


def add_a_group(optimizer: Any, step: int) -> None:
    if step == 8:
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})


@pytest.mark.parametrize("before", [load_its_own_state, add_a_group])
def test_everything_is_compared_after_a_load_and_a_new_group(
    before: Callable[[Any, int], None],
) -> None:
    write = write_one_element(8)
    options: dict[str, Any] = {"num_steps": 10, "before": before}
    expected, _ = run_with_writes(OffloadAdam, torch.bfloat16, write, through_data=False, **options)
    found, _ = run_with_writes(OffloadAdam, torch.bfloat16, write, through_data=True, **options)
    assert all(map(torch.equal, found, expected))


def test_samples_visit_every_block() -> None:
    parameter = torch.nn.Parameter(torch.zeros(128 * 700, dtype=torch.bfloat16))
    optimizer = OffloadAdam([parameter])
    state = optimizer._alive().states[0]
    for block in (0, 1, 128, 353, 698, 699):
        parameter.data[128 * block + 5] = 1.0
        found = [sample_differs(state, turn) for turn in range(5)]
        assert found.count(True) == 1
        parameter.data.zero_()


def test_padding_is_not_compared() -> None:
    """Buckets share staging slots, so that H2D copies fill the padding of parameters."""
    sizes = [300, 400, 100, 500, 333, 128, 257, 5000]
    parameters = [torch.nn.Parameter(torch.ones(n, dtype=torch.bfloat16)) for n in sizes]
    optimizer = OffloadedAdam(parameters, offload=OffloadPolicy(bucket_nbytes=3000))
    for _ in range(3):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    states = optimizer._alive().states
    gaps = [
        state.flat[one.end : other.start]
        for state in states
        for one, other in pairwise(state.layout.placements)
    ]
    assert torch.cat(gaps).any()
    assert [sample_differs(state, 0) for state in states] == [False] * len(states)
    assert [differing(state) for state in states] == [[]] * len(states)
    for state in states:
        for position, placed in enumerate(state.layout.placements):
            for element in (placed.start, placed.end - 1):
                before = float(state.flat[element])
                state.flat[element] = 7.0
                assert sample_differs(state, 0)
                assert differing(state) == [position]
                state.flat[element] = before


def test_buckets_are_sampled_in_turns() -> None:
    """Of 100 buckets one step samples a quarter, and that shows a write to all of them."""
    parameters = [torch.nn.Parameter(torch.zeros(128, dtype=torch.bfloat16)) for _ in range(100)]
    optimizer = OffloadAdam(parameters, lr=0.0, offload=OffloadPolicy(bucket_nbytes=256))
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    for _ in range(3):
        optimizer.step()
    watched = optimizer._alive().external_edits
    parameters[0].data.fill_(1.0)
    found = []
    for _ in range(8):
        found.append(watched.find_unseen([]))
        watched._num_applied += 1
    assert sorted(found) == 6 * [[]] + 2 * [[0]]
    for parameter in parameters:
        parameter.data.fill_(1.0)
    optimizer.step()
    for parameter in parameters:
        assert torch.equal(optimizer.state[parameter]["master_weight"], torch.ones(128))


def test_an_optimizer_without_state_takes_steps() -> None:
    optimizer = OffloadAdam([torch.nn.Parameter(torch.ones(3), requires_grad=False)])
    for _ in range(4):
        optimizer.step()


def test_weights_that_are_nan_are_no_write() -> None:
    def write(weights: torch.Tensor, step: int) -> None:
        if step == 0:
            weights.view(torch.int16)[::7] = 0x7FD6  # torch would round a NaN to other bits

    _, warned = run_with_writes(OffloadAdam, torch.bfloat16, write, through_data=True)
    assert warned == 0


def test_a_skipped_step_leaves_a_write_through_data_to_the_next_one() -> None:
    model, optimizer = make()
    train(model, optimizer, 5)
    bias = model.get_parameter("1.bias")
    bias.data.fill_(0.5)
    bias.grad = torch.full((4,), torch.nan, dtype=torch.bfloat16)
    optimizer.step()
    assert optimizer.skipped_steps == 1
    bias.grad = torch.zeros(4, dtype=torch.bfloat16)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert torch.equal(optimizer.state[bias]["master_weight"], torch.full((4,), 0.5))


def test_an_object_replaced_in_the_module_is_refused_by_name() -> None:
    model, drop_in = make()
    drop_in.close()
    optimizer = OffloadAdam(model.parameters(), module=model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    with pytest.raises(ParameterReplacedError, match=r"'0.weight'.*assign=True"):
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_graph_older_than_the_step_raises_torchs_own_error(dtype: torch.dtype) -> None:
    """Invariant 8: forward A, forward B, backward A, step, backward B."""
    model, optimizer = make(dtype)
    data = torch.randn(2, 20).to(dtype)
    first, second = model(data).sum(), model(data).sum()
    first.backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        second.backward()


def test_a_parameter_that_was_not_updated_keeps_its_version() -> None:
    used, unused = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    optimizer = OffloadAdam([used, unused])
    before = used._version, unused._version
    used.grad = torch.ones(3)
    optimizer.step()
    assert used._version > before[0]
    assert unused._version == before[1]


def test_saving_a_model_or_one_parameter_writes_no_whole_bucket(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(500, 500), torch.nn.Linear(500, 2))
    optimizer = OffloadAdam(model.parameters())
    torch.save(model.get_parameter("1.bias"), tmp_path / "bias.pt")
    torch.save(model[1].state_dict(), tmp_path / "layer.pt")
    torch.save(optimizer.state[model.get_parameter("1.bias")], tmp_path / "state.pt")
    for name in ("bias", "layer", "state"):
        assert (tmp_path / f"{name}.pt").stat().st_size < 20_000, name
    torch.save(model.state_dict(), tmp_path / "model.pt")
    num_bytes = sum(p.numel() * 4 for p in model.parameters())
    assert (tmp_path / "model.pt").stat().st_size < num_bytes + 20_000
    loaded = torch.load(tmp_path / "layer.pt", weights_only=True)
    assert torch.equal(loaded["bias"], model.get_parameter("1.bias"))


def test_tied_weights_stay_tied_and_are_updated_once() -> None:
    embedding = torch.nn.Embedding(7, 5)
    head = torch.nn.Linear(5, 7, bias=False)
    head.weight = embedding.weight
    model = torch.nn.Sequential(embedding, head)
    reference = torch.nn.Parameter(embedding.weight.detach().double())
    optimizer = OffloadAdam(model.parameters(), lr=0.1, module=model)
    oracle = torch.optim.Adam([reference], lr=0.1, foreach=False)
    tokens = torch.tensor([1, 2, 3])
    for _ in range(3):
        model(tokens).square().sum().backward()
        (reference[tokens] @ reference.t()).square().sum().backward()
        optimizer.step()
        oracle.step()
        oracle.zero_grad()
    assert model.get_parameter("1.weight") is model.get_parameter("0.weight")
    assert (model.get_parameter("0.weight") - reference).abs().max() < 1e-5


def test_parameters_that_overlap_in_memory_are_refused_by_both_names() -> None:
    base = torch.zeros(10)
    first, second = torch.nn.Parameter(base[:6]), torch.nn.Parameter(base[4:])
    with pytest.raises(ValueError, match="'a' and 'b' overlap"):
        OffloadAdam([("a", first), ("b", second)])
    apart = torch.nn.Parameter(base[:5]), torch.nn.Parameter(base[5:])
    optimizer = OffloadAdam(apart)
    assert len(optimizer.state) == 2
    with pytest.raises(ValueError, match=r"overlap|more than one"):
        OffloadAdam([{"params": [first]}, {"params": [first]}])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_host_bytes_a_parameter(dtype: torch.dtype) -> None:
    """12 bytes a parameter for a bf16 model on a CPU, 8 for fp32, and a bounded rest."""
    model = torch.nn.Sequential(*(torch.nn.Linear(301, 203) for _ in range(20))).to(dtype)
    optimizer = OffloadAdam(model.parameters(), module=model)
    numel = sum(parameter.numel() for parameter in model.parameters())
    num_tensors = len(list(model.parameters()))
    per_parameter = 12 if dtype == torch.bfloat16 else 8
    # At most 127 elements of padding a tensor, and 1/16 byte an element for the block sums of the
    # largest bucket.
    state = optimizer.host_nbytes["state"]
    assert per_parameter * numel <= state <= per_parameter * (numel + 127 * num_tensors)
    assert optimizer.host_nbytes["block_sums"] <= (numel + 127 * num_tensors) / 16
    assert optimizer.host_nbytes["staging"] == 0
    # Counted by what the tensors themselves hold, too.
    held = sum(
        value.numel() * 4
        for entry in optimizer.state.values()
        for key, value in entry.items()
        if key != "step"
    )
    assert held == per_parameter * numel


def test_parameters_that_never_have_a_gradient_are_named_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = torch.nn.Linear(2, 1)
    frozen_later = torch.nn.Parameter(torch.ones(1))
    optimizer = OffloadAdam([*model.named_parameters(), ("later", frozen_later)], lr=0.1)
    frozen_later.requires_grad_(False)
    model.load_state_dict({"weight": torch.ones(1, 2)}, strict=False, assign=True)

    def train(num_steps: int) -> list[str]:
        caplog.clear()
        for _ in range(num_steps):
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
        return [record.getMessage() for record in caplog.records]

    assert train(9) == []
    (message,) = train(10)
    assert message.startswith("No gradient in 10 steps for parameter(s) 'weight': they are not")
    optimizer.add_param_group({"params": [("new", torch.nn.Parameter(torch.ones(1)))]})
    assert train(9) == []
    (message,) = train(10)
    assert "for parameter(s) 'weight', 'new': they" in message


def test_an_edit_of_one_of_many_parameters_is_followed() -> None:
    parameters = [torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16)) for _ in range(500)]
    references = [torch.nn.Parameter(p.detach().double()) for p in parameters]
    optimizer = OffloadAdam(parameters, lr=1e-2)
    oracle = torch.optim.Adam(references, lr=1e-2, foreach=False)
    for step in range(6):
        if step == 4:
            with torch.no_grad():
                parameters[400].fill_(0.5)
                references[400].fill_(0.5)
        for parameter, reference in zip(parameters, references, strict=True):
            parameter.grad = torch.full_like(parameter, step - 2.5)
            reference.grad = torch.full_like(reference, step - 2.5)
        optimizer.step()
        oracle.step()
    for parameter, reference in zip(parameters, references, strict=True):
        assert (optimizer.state[parameter]["master_weight"] - reference).abs().max() < 1e-6


@pytest.mark.parametrize("block", range(5))
def test_a_write_through_data_to_one_element_is_found_in_a_few_steps(block: int) -> None:
    """A sample has one block in five of this parameter, which no update overwrites."""
    still = torch.nn.Parameter(torch.zeros(128 * 700, dtype=torch.bfloat16))
    moving = torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    optimizer = OffloadAdam([still, moving])

    def step() -> None:
        moving.grad = torch.ones_like(moving)
        optimizer.step()

    for _ in range(3):
        step()
    still.data[128 * block + 5] = 1.0
    for _ in range(10):
        step()
    assert torch.equal(optimizer.state[still]["master_weight"], still.detach().float())
