"""Weights between steps: changed from outside, replaced, saved, read by stale graphs."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch

from offload_adam import OffloadAdam, ParameterReplacedError


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_replaced_storage_is_refused_by_name(dtype: torch.dtype) -> None:
    model, optimizer = make(dtype)
    model.get_parameter("0.bias").data = torch.zeros_like(model.get_parameter("0.bias"))
    with pytest.raises(ParameterReplacedError, match=r"'0.bias'.*storage was replaced.*\.to"):
        optimizer.step()
    model, optimizer = make(dtype)
    model.to(torch.float64)
    with pytest.raises(ParameterReplacedError, match=r"'0.weight'"):
        optimizer.step()


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
    assert message.startswith("no gradient in 10 steps for parameter 'weight': they are not")
    optimizer.add_param_group({"params": [("new", torch.nn.Parameter(torch.ones(1)))]})
    assert train(9) == []
    (message,) = train(10)
    assert "for parameter 'weight', 'new': they" in message
