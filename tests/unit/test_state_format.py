"""`state_format="bf16"`: what is stored, what an update computes, and what is loaded."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from offload_adam import OffloadAdam, OffloadAdamW, OffloadPolicy, mindspore
from offload_adam.memory import planes
from offload_adam.memory.split_master import join
from tests.support.devices import HOST_AS_DEVICE

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHAPES = {"weight": (65, 129), "bias": (70,)}


class OnDevice(OffloadAdamW):
    _backend = HOST_AS_DEVICE


def make_model(dtype: torch.dtype = BF16) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    model = nn.Module()
    for name, shape in SHAPES.items():
        value = torch.randn(shape, generator=generator).to(dtype)
        model.register_parameter(name, nn.Parameter(value))
    return model


def make(
    model: nn.Module, state_format: Any = "bf16", kind: Any = OffloadAdamW, **options: Any
) -> Any:
    options = {"lr": 1e-2, "num_threads": 1, **options}
    return kind(list(model.named_parameters()), state_format=state_format, **options)


def set_gradients(model: nn.Module, number: int, scale: float = 1.0) -> None:
    for position, parameter in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(100 * number + position)
        gradient = torch.randn(parameter.shape, generator=generator) * scale
        parameter.grad = gradient.to(parameter.dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> None:
    for number in numbers:
        set_gradients(model, number)
        optimizer.step()


def master_of(optimizer: Any, parameter: torch.Tensor) -> torch.Tensor:
    """Return the fp32 master weight of a parameter."""
    entry = optimizer.state[parameter]
    if "master_remainder" in entry:
        return join(parameter.detach(), entry["master_remainder"])
    master: torch.Tensor = entry.get("master_weight", parameter.detach())
    return master.clone()


def bits_of(master: torch.Tensor) -> torch.Tensor:
    return master.view(torch.int32).long()


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Return copies of all parameters and all state."""
    return [
        tensor.detach().clone()
        for parameter in model.parameters()
        for tensor in (parameter, *optimizer.state[parameter].values())
    ]


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_what_is_stored() -> None:
    model = make_model()
    optimizer = make(model)
    matrix, vector = (optimizer.state[parameter] for parameter in model.parameters())
    assert {key: value.dtype for key, value in matrix.items()} == {
        "step": FP32,
        "exp_avg": BF16,
        "exp_avg_sq": BF16,
        "master_remainder": torch.int16,
    }
    assert {key: value.dtype for key, value in vector.items()} == {
        "step": FP32,
        "exp_avg": FP32,
        "exp_avg_sq": FP32,
        "master_weight": FP32,
    }
    assert all(value.shape == (65, 129) for key, value in matrix.items() if key != "step")


@pytest.mark.parametrize(
    ("dtype", "on_device", "nbytes"),
    [
        *((BF16, False, 6), (FP16, False, 8), (FP32, False, 4)),
        # With a copy of the parameter, and a gradient shard.
        *((BF16, True, 10), (FP16, True, 10), (FP32, True, 12)),
    ],
)
def test_host_bytes_per_parameter(dtype: torch.dtype, on_device: bool, nbytes: int) -> None:
    parameter = nn.Parameter(torch.zeros(1024, 128, dtype=dtype))
    kind = OnDevice if on_device else OffloadAdamW
    optimizer = kind([parameter], state_format="bf16", max_grad_norm=1.0)
    ledger = [entry for entry in optimizer.memory_ledger() if entry.bucket is not None]
    found = {entry.category: entry.nbytes for entry in ledger if entry.category != "parameters"}
    assert found["exp_avg"] == found["exp_avg_sq"] == 2 * parameter.numel()
    assert sum(found.values()) == optimizer.host_nbytes["state"] == nbytes * parameter.numel()


def test_a_group_decides_for_its_vectors_and_embeddings() -> None:
    model = make_model()
    weight, bias = model.parameters()
    groups = [
        {"params": [weight], "state_format": "fp32"},
        {"params": [bias], "state_format": "bf16"},
    ]
    optimizer = OffloadAdam(groups, state_format="bf16")
    assert optimizer.state[weight]["exp_avg"].dtype == FP32
    assert optimizer.state[bias]["exp_avg"].dtype == BF16


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "kind": OffloadAdam},
        {"nesterov": True},
        {"maximize": True, "eps": 1e-3},
        {"max_grad_norm": 0.5},
        {"betas": (0.0, 0.5)},
    ],
)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_an_update_of_equal_state_computes_the_masters_of_fp32_state(
    dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """Only what is stored is rounded: the weight is updated with the unrounded moments."""
    low, high = make_model(dtype), make_model(dtype)
    ours, reference = make(low, **options), make(high, "fp32", **options)
    train(low, ours, range(3))
    # The reference continues from the decoded state.
    high.load_state_dict(low.state_dict())
    reference.load_state_dict(ours.state_dict(), convert=True)
    # Here a tie of bfloat16 rounds to even, so it becomes the float32 next to it.
    is_tie = [(bits_of(master_of(ours, one)) & 0xFFFF) == 0x8000 for one in low.parameters()]
    for model, optimizer in ((low, ours), (high, reference)):
        train(model, optimizer, range(3, 4))
    for one, other, tie in zip(low.parameters(), high.parameters(), is_tie, strict=True):
        difference = bits_of(master_of(ours, one)) - bits_of(master_of(reference, other))
        assert not difference[~tie].any()
        assert (difference[tie].abs() <= 2).all()
        for key in ("exp_avg", "exp_avg_sq"):  # one of the two neighbours
            stored, exact = ours.state[one][key].float(), reference.state[other][key]
            assert ((stored - exact).abs() <= exact.abs() * 2**-7).all()


def test_the_example_of_the_documentation_runs() -> None:
    path = Path(__file__).parents[2] / "docs/internals/state-formats.md"
    (example,) = re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(example, names)
    stored = [names["optimizer"].state[p]["exp_avg"].dtype for p in names["model"].parameters()]
    assert stored == [FP32, BF16, FP32, FP32, FP32]  # table; weight and bias; weight and bias


def test_a_bf16_parameter_is_its_rounded_master() -> None:
    model = make_model()
    optimizer = make(model)
    train(model, optimizer, range(5))
    weight = model.get_parameter("weight")
    bits = master_of(optimizer, weight).numpy().view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x8000) >> 16).astype(np.uint16)
    found = weight.detach().view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(found, rounded)


def test_small_updates_add_up() -> None:
    """At 1e-4 of the weight's spacing in bf16, none would ever move a weight without its master."""
    model = make_model()
    weight = model.get_parameter("weight")
    with torch.no_grad():
        weight.fill_(1.0)
    optimizer = make(model, lr=1e-6, weight_decay=0.0)
    for _ in range(100):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    # Each of the updates is rounded to a multiple of 2**-24.
    error = master_of(optimizer, weight) - (1 - 1e-4)
    assert error.abs().max() < 100 * 2**-25 + 1e-7


@pytest.mark.parametrize("variant", ["threads", "buckets", "streamed", "resumed"])
def test_how_the_work_is_divided_does_not_change_a_bit(variant: str) -> None:
    options: dict[str, Any] = {
        "threads": {"num_threads": 2},
        "buckets": {"bucket_nbytes": 1},
        "streamed": {},
        "resumed": {},
    }[variant]
    results = []
    for varied in (False, True):
        model = make_model()
        module: dict[str, Any] = {"module": model} if varied and variant == "streamed" else {}
        if "bucket_nbytes" in options and varied:
            module = {"offload": OffloadPolicy(bucket_nbytes=1)}
        more = options if varied and "num_threads" in options else {}
        optimizer = make(model, **more, **module)
        if varied and variant == "resumed":
            train(model, optimizer, range(2))
            saved = io.BytesIO()
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, saved)
            saved.seek(0)
            loaded = torch.load(saved, weights_only=True)
            model = make_model()
            optimizer = make(model)
            train(model, optimizer, range(7, 8))
            optimizer.load_state_dict(loaded["optimizer"])
            model.load_state_dict(loaded["model"])  # in the unusual order
            train(model, optimizer, range(2, 5))
        else:
            train(model, optimizer, range(5))
        results.append(everything(model, optimizer))
        optimizer.close()
    assert_same(*results)


def test_wrappers_of_a_model_do_not_change_a_bit() -> None:
    results = []
    for prefix in ("", "module.", "_orig_mod.", "module._orig_mod."):
        model = make_model()
        named = [(prefix + name, parameter) for name, parameter in model.named_parameters()]
        optimizer = OffloadAdamW(named, state_format="bf16", num_threads=1)
        train(model, optimizer, range(3))
        results.append(everything(model, optimizer))
    for found in results[1:]:
        assert_same(found, results[0])


def test_two_parameters_round_differently() -> None:
    model = nn.ParameterList([nn.Parameter(torch.ones(64, 64, dtype=BF16)) for _ in range(2)])
    optimizer = OffloadAdamW(list(model.named_parameters()), state_format="bf16", num_threads=1)
    for parameter in model:
        parameter.grad = torch.linspace(1, 2, 4096).view(64, 64).to(BF16)
    optimizer.step()
    one, other = (optimizer.state[parameter] for parameter in model)
    for key in ("exp_avg", "exp_avg_sq"):
        assert not torch.equal(one[key], other[key])
    assert torch.equal(one["master_remainder"], other["master_remainder"])


def test_a_skipped_step_changes_nothing() -> None:
    model = make_model()
    optimizer = make(model)
    train(model, optimizer, range(2))
    before = everything(model, optimizer)
    set_gradients(model, 2)
    gradient = model.get_parameter("weight").grad
    assert gradient is not None
    gradient[3, 4] = torch.inf
    optimizer.step()
    assert optimizer.last_step is not None
    assert optimizer.last_step.skipped
    assert_same(everything(model, optimizer), before)


@pytest.mark.parametrize("seen", [True, False], ids=["version", "data"])
def test_weights_that_the_user_sets_are_kept_to_half_a_unit(seen: bool) -> None:
    model = make_model()
    optimizer = make(model)
    train(model, optimizer, range(3))
    weight = model.get_parameter("weight")
    master = master_of(optimizer, weight)
    target = weight if seen else weight.data
    with torch.no_grad():
        target[:5] = 0.0
        target[5:9] = 1.5
    set_gradients(model, 3, scale=0.0)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    found = master_of(optimizer, weight)
    assert (found[:5].abs() < 1e-38).all()
    assert ((found[5:9] - 1.5).abs() <= 2**-8).all()
    assert torch.equal(found[9:], master[9:])  # no other weight lost its low bits
    assert (weight[:5] == 0).all()
    assert (weight[5:9] == 1.5).all()


def test_a_clamp_after_every_step_does_not_stop_small_updates() -> None:
    model = make_model()
    weight = model.get_parameter("weight")
    with torch.no_grad():
        weight.fill_(1.0)
    optimizer = make(model, lr=1e-6, weight_decay=0.0)
    for _ in range(100):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        with torch.no_grad():
            weight.clamp_(-2, 2)
    assert master_of(optimizer, weight).max() < 1 - 9e-5


def test_full_state_dict_is_fp32_and_loads_into_torch() -> None:
    model = make_model()
    optimizer = make(model)
    train(model, optimizer, range(3))
    full = optimizer.full_state_dict()
    weight = model.get_parameter("weight")
    own, saved = optimizer.state[weight], full["state"][0]
    for key in ("exp_avg", "exp_avg_sq"):
        assert saved[key].dtype == FP32
        assert torch.equal(saved[key], own[key].float())
    assert torch.equal(full["offload_adam"]["master_weight"][0], master_of(optimizer, weight))
    torch.optim.AdamW(model.parameters()).load_state_dict(full)


def test_a_full_state_dict_loads_without_loss() -> None:
    model = make_model()
    optimizer = make(model)
    train(model, optimizer, range(3))
    full, weights = optimizer.full_state_dict(), model.state_dict()
    weights = {name: value.clone() for name, value in weights.items()}
    train(model, optimizer, range(3, 5))
    expected = everything(model, optimizer)
    again = make_model()
    resumed = make(again)
    again.load_state_dict(weights)
    resumed.load_state_dict(full)
    train(again, resumed, range(3, 5))
    assert_same(everything(again, resumed), expected)


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_fp32_state_is_rounded_to_nearest(dtype: torch.dtype) -> None:
    model = make_model(dtype)
    source = make(model, "fp32")
    train(model, source, range(3))
    low = make_model(dtype)
    optimizer = make(low)
    low.load_state_dict(model.state_dict())
    optimizer.load_state_dict(source.state_dict())
    for one, other in zip(low.parameters(), model.parameters(), strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            exact = source.state[other][key]
            assert torch.equal(optimizer.state[one][key], exact.to(optimizer.state[one][key].dtype))
        assert torch.equal(master_of(optimizer, one), master_of(source, other))


def test_another_format_needs_convert() -> None:
    model = make_model()
    low = make(model)
    train(model, low, range(3))
    other = make_model()
    other.load_state_dict(model.state_dict())
    optimizer = make(other, "fp32")
    expected = (
        "The state of parameter 'weight' was saved with state_format='bf16', but this optimizer "
        "stores it with 'fp32'. Construct the optimizer with the saved format, or pass convert=True"
    )
    before = everything(other, optimizer)
    with pytest.raises(ValueError, match=re.escape(expected)):
        optimizer.load_state_dict(low.state_dict())
    assert_same(everything(other, optimizer), before)
    optimizer.load_state_dict(low.state_dict(), convert=True)
    weight = other.get_parameter("weight")
    assert torch.equal(
        optimizer.state[weight]["exp_avg"],
        low.state[model.get_parameter("weight")]["exp_avg"].float(),
    )


@pytest.mark.parametrize("stored", ["fp8", None, [1]])
def test_an_unknown_format_is_rejected_also_with_convert(stored: object) -> None:
    model = make_model()
    optimizer = make(model)
    saved = optimizer.state_dict()
    assert saved["offload_adam"]["state_formats"] == {0: "bf16"}
    saved["offload_adam"]["state_formats"] = {0: stored}
    with pytest.raises(
        ValueError, match="The saved state_format of parameter 0 must be one of 'fp32', 'bf16'"
    ):
        optimizer.load_state_dict(saved, convert=True)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"state_format": "int4"},
            "state_format must be one of 'fp32', 'bf16', 'mixed', 'int8', not 'int4'",
        ),
        ({"amsgrad": True}, "Parameter 'weight' has amsgrad=True and state_format='bf16'"),
    ],
)
def test_errors(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=re.escape(expected)):
        make(make_model(), **{"state_format": "bf16", **options})


def test_the_format_of_a_group_cannot_change() -> None:
    model = make_model()
    optimizer = make(model)
    optimizer.param_groups[0]["state_format"] = "fp32"
    set_gradients(model, 0)
    with pytest.raises(ValueError, match=r"was changed to 'fp32'.* allocated for None"):
        optimizer.step()


def test_mindspore_adam() -> None:
    model = make_model()
    optimizer = mindspore.Adam(list(model.named_parameters()), state_format="bf16")
    train(model, optimizer, range(2))
    assert optimizer.state[model.get_parameter("weight")]["exp_avg"].dtype == BF16


def test_a_sparse_step_joins_only_the_touched_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table may have many more rows than a step touches."""
    joined: list[int] = []

    def counted(high: torch.Tensor, remainder: torch.Tensor) -> torch.Tensor:
        joined.append(high.numel())
        return join(high, remainder)

    monkeypatch.setattr(planes, "join", counted)
    table = nn.Embedding(1000, 8, sparse=True, dtype=BF16)
    optimizer = mindspore.Adam(
        [("weight", table.weight)], state_format="bf16", use_lazy=True, weight_decay=0.1
    )
    table(torch.tensor([3, 7, 7])).float().sum().backward()
    optimizer.step()
    assert joined == [3 * 8]


@pytest.mark.parametrize("lazy", [False, True])
def test_sparse_gradients(lazy: bool) -> None:
    """The touched rows get the bits of a dense update; with `use_lazy`, other rows keep theirs."""
    results = []
    for is_sparse in (True, False):
        table = nn.Embedding(50, 33, sparse=is_sparse, dtype=BF16)
        with torch.no_grad():
            table.weight.copy_(torch.arange(50 * 33).view(50, 33) / 1000)
        optimizer = mindspore.Adam(
            [("weight", table.weight)], state_format="bf16", use_lazy=lazy, learning_rate=0.1
        )
        for _ in range(3):
            table(torch.tensor([3, 7, 7, 49])).float().square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(everything(table, optimizer))
    (*sparse,), (*dense,) = results
    touched = [3, 7, 49]
    for one, other in zip(sparse, dense, strict=True):
        assert torch.equal(
            one[touched] if one.dim() else one, other[touched] if one.dim() else other
        )
    if not lazy:
        assert_same(sparse, dense)
