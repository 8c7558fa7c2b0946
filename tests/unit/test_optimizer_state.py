"""State dicts: our own, a full one, and torch's, in both directions."""

from __future__ import annotations

import copy
import io
import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch

from offload_adam import OffloadAdam


def make_parameters(dtype: torch.dtype = torch.bfloat16) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 5), (), (0, 4), (140,)]
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def train(optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                gradient = torch.randn(parameter.shape, generator=generator)
                parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()


def bits(optimizer: OffloadAdam) -> list[list[Any]]:
    return [
        [parameter.tolist(), *(value.tolist() for value in entry.values())]
        for parameter, entry in optimizer.state.items()
    ]


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_training_goes_on_to_the_same_bits_after_a_load(full: bool, dtype: torch.dtype) -> None:
    parameters = make_parameters(dtype)
    optimizer = OffloadAdam(parameters, lr=1e-2, weight_decay=0.1)
    train(optimizer, range(3))
    buffer = io.BytesIO()
    saved = optimizer.full_state_dict() if full else optimizer.state_dict()
    torch.save([saved, [p.detach() for p in parameters]], buffer)
    optimizer.param_groups[0]["lr"] = 3e-3
    train(optimizer, range(3, 6))

    buffer.seek(0)
    loaded, weights = torch.load(buffer, weights_only=True)
    others = make_parameters(dtype)
    fresh = OffloadAdam(others, lr=7.0)
    with torch.no_grad():
        for parameter, weight in zip(others, weights, strict=True):
            parameter.copy_(weight)
    fresh.load_state_dict(loaded)
    assert fresh.param_groups[0]["lr"] == 1e-2
    assert fresh.param_groups[0]["weight_decay"] == 0.1
    fresh.param_groups[0]["lr"] = 3e-3
    train(fresh, range(3, 6))
    assert bits(fresh) == bits(optimizer)


def test_loading_its_own_state_dict_changes_nothing() -> None:
    optimizer = OffloadAdam(make_parameters())
    train(optimizer, range(2))
    before = bits(optimizer)
    addresses = [v.data_ptr() for entry in optimizer.state.values() for v in entry.values()]
    optimizer.load_state_dict(optimizer.state_dict())
    assert bits(optimizer) == before
    after = [v.data_ptr() for entry in optimizer.state.values() for v in entry.values()]
    assert after == addresses


def test_a_full_state_loads_into_torchs_adamw_and_goes_on_like_it() -> None:
    parameters = make_parameters(torch.float32)
    optimizer = OffloadAdam(parameters, lr=1e-2, decoupled_weight_decay=True, weight_decay=0.1)
    train(optimizer, range(3))
    references = [torch.nn.Parameter(p.detach().clone()) for p in parameters]
    adamw = torch.optim.AdamW(references, foreach=False)
    adamw.load_state_dict(optimizer.full_state_dict())
    assert adamw.param_groups[0]["lr"] == 1e-2
    assert adamw.param_groups[0]["weight_decay"] == 0.1
    train(adamw, range(3, 6))
    train(optimizer, range(3, 6))
    for parameter, reference in zip(parameters, references, strict=True):
        assert adamw.state[reference]["step"] == 6
        assert torch.allclose(parameter, reference, rtol=0, atol=1e-6)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_torchs_state_loads_and_goes_on_like_torch(amsgrad: bool) -> None:
    references = make_parameters(torch.float32)
    adam = torch.optim.Adam(references, lr=1e-2, amsgrad=amsgrad, foreach=False)
    train(adam, range(3))
    parameters = [torch.nn.Parameter(p.detach().clone()) for p in references]
    optimizer = OffloadAdam(parameters, amsgrad=amsgrad)
    optimizer.load_state_dict(copy.deepcopy(adam.state_dict()))
    train(adam, range(3, 6))
    train(optimizer, range(3, 6))
    for parameter, reference in zip(parameters, references, strict=True):
        assert optimizer.state[parameter]["step"] == 6
        assert torch.allclose(parameter, reference, rtol=0, atol=1e-6)


def test_state_is_filled_from_construction_with_the_same_keys_as_later() -> None:
    """Invariant 10."""
    parameters = make_parameters()
    optimizer = OffloadAdam(parameters, amsgrad=True)
    keys = {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master_weight"}
    for parameter in parameters:
        entry = optimizer.state[parameter]
        assert entry.keys() == keys
        assert all(value.shape == parameter.shape for k, value in entry.items() if k != "step")
    nbytes = dict(optimizer.host_nbytes)
    train(optimizer, range(2))
    assert optimizer.host_nbytes == nbytes
    assert all(optimizer.state[parameter].keys() == keys for parameter in parameters)


def test_what_does_not_fit_is_refused_and_nothing_changes() -> None:
    optimizer = OffloadAdam(make_parameters())
    train(optimizer, range(2))
    before = bits(optimizer)
    good = copy.deepcopy(optimizer.state_dict())
    broken = copy.deepcopy(good)
    broken["state"][3]["exp_avg"] = torch.zeros(7)
    with pytest.raises(
        ValueError, match=r"exp_avg of parameter .*shape \(7,\) instead of \(140,\)"
    ):
        optimizer.load_state_dict(broken)
    other_world = copy.deepcopy(good)
    other_world["offload_adam"] = {"world_size": 4, "rank": 1}
    with pytest.raises(ValueError, match=r"rank 1 of 4 .* full_state_dict\(\)"):
        optimizer.load_state_dict(other_world)
    fewer = copy.deepcopy(good)
    fewer["param_groups"][0]["params"] = [0, 1]
    with pytest.raises(ValueError, match=r"\[2\] parameters, but .* groups of \[4\]"):
        optimizer.load_state_dict(fewer)
    amsgrad = copy.deepcopy(good)
    amsgrad["param_groups"][0]["amsgrad"] = True
    with pytest.raises(ValueError, match="amsgrad=True"):
        optimizer.load_state_dict(amsgrad)
    bad_lr = copy.deepcopy(good)
    bad_lr["param_groups"][0]["lr"] = math.nan
    with pytest.raises(ValueError, match="lr must be finite"):
        optimizer.load_state_dict(bad_lr)
    with pytest.raises(ValueError, match="not an optimizer's state dict"):
        optimizer.load_state_dict({"model": 1})
    assert bits(optimizer) == before
    optimizer.load_state_dict(good)
    assert bits(optimizer) == before


def test_state_dict_hooks_run() -> None:
    optimizer = OffloadAdam(make_parameters())
    calls: list[str] = []
    optimizer.register_load_state_dict_pre_hook(lambda _, state: calls.append("pre"))
    optimizer.register_load_state_dict_post_hook(lambda _: calls.append("post"))
    optimizer.register_state_dict_post_hook(lambda _, state: calls.append("saved"))
    optimizer.register_step_post_hook(lambda *_: calls.append("step"))
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    assert calls == ["saved", "pre", "post", "step"]


def trained_state(make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]) -> Any:
    optimizer = make(make_parameters(torch.float32))
    train(optimizer, range(1))
    return optimizer.state_dict()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9), "group 0 has no 'betas'"),
        (torch.optim.Adagrad, "group 0 has no 'betas'"),
        (torch.optim.NAdam, "group 0 has no 'amsgrad'"),
        (torch.optim.RAdam, "group 0 has no 'amsgrad'"),
        (torch.optim.Adamax, "group 0 has no 'amsgrad'"),
    ],
)
def test_another_optimizers_state_is_refused(make: Any, words: str) -> None:
    optimizer = OffloadAdam(make_parameters(torch.float32))
    train(optimizer, range(1))
    before = bits(optimizer)
    saved = trained_state(make)
    with pytest.raises(ValueError, match=f"{words}.*saved by Adam, AdamW"):
        optimizer.load_state_dict(saved)
    saved["param_groups"][0] |= optimizer.state_dict()["param_groups"][0]
    if set(saved["state"][0]) != {"step", "exp_avg", "exp_avg_sq"}:
        with pytest.raises(ValueError, match=r"state of parameter 0 has '\w+', which Adam"):
            optimizer.load_state_dict(saved)
    assert bits(optimizer) == before


@pytest.mark.parametrize("count", [-1.0, 0.5, math.nan, math.inf])
def test_a_step_that_is_no_count_is_refused(count: float) -> None:
    optimizer = OffloadAdam(make_parameters())
    train(optimizer, range(1))
    before = bits(optimizer)
    saved = copy.deepcopy(optimizer.full_state_dict())
    saved["state"][1]["step"] = torch.tensor(count)
    words = r"step of parameter 1 must be a whole number of updates of at most 16,777,216, not "
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_dict(saved)
    assert bits(optimizer) == before


@pytest.mark.parametrize("adam_type", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize(
    "options",
    [
        {"fused": True},
        {"foreach": True},
        {"lr": torch.tensor(1e-3), "foreach": False},
        {"decoupled_weight_decay": True, "weight_decay": 0.1},
        {"amsgrad": True, "maximize": True},
    ],
)
def test_every_adam_of_torch_loads(adam_type: Any, options: dict[str, Any]) -> None:
    if adam_type is torch.optim.AdamW:
        options = {key: value for key, value in options.items() if "decoupled" not in key}
    saved = trained_state(lambda params: adam_type(params, **options))
    saved["param_groups"][0] |= {"initial_lr": 1e-3, "capturable": True, "a user's": "own"}
    optimizer = OffloadAdam(make_parameters(torch.float32), amsgrad=options.get("amsgrad", False))
    optimizer.load_state_dict(saved)
    for index, entry in enumerate(optimizer.state_dict()["state"].values()):
        assert entry.keys() - {"master_weight"} == saved["state"][index].keys()
        for key, value in saved["state"][index].items():
            assert torch.equal(entry[key], value)


def named(order: list[str], values: dict[str, torch.Tensor], prefix: str = "") -> Any:
    return [(prefix + name, torch.nn.Parameter(values[name].clone())) for name in order]


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("make", [OffloadAdam, torch.optim.AdamW])
def test_state_goes_to_the_parameter_of_the_same_name(make: Any, prefix: str, full: bool) -> None:
    """Two parameters of one shape, given in another order."""
    values = {name: torch.full((4,), float(i)) for i, name in enumerate("abc")}
    saving = make(named(["a", "b", "c"], values, prefix))
    for number, parameter in enumerate(saving.param_groups[0]["params"]):
        parameter.grad = torch.full((4,), number + 1.0)
    saving.step()
    is_ours = make is OffloadAdam
    saved = saving.full_state_dict() if full and is_ours else saving.state_dict()
    loading = OffloadAdam(named(["c", "a", "b"], values))
    loading.load_state_dict(saved)
    found = [entry["exp_avg"][0].item() for entry in loading.state.values()]
    assert found == pytest.approx([0.3, 0.1, 0.2])

    other = OffloadAdam([*named(["c", "a"], values), ("d", torch.nn.Parameter(torch.zeros(4)))])
    with pytest.raises(ValueError, match=r"missing \['d'\], unexpected \['b'\]"):
        other.load_state_dict(saved)
    unnamed = OffloadAdam([torch.nn.Parameter(torch.zeros(4)) for _ in range(3)])
    unnamed.load_state_dict(saved)  # by position, as torch
    found = [entry["exp_avg"][0].item() for entry in unnamed.state.values()]
    assert found == pytest.approx([0.1, 0.2, 0.3])


def test_a_modules_names_count_as_names() -> None:
    """Also where the modules register their parameters in different orders."""

    def model_of(order: str) -> torch.nn.Module:
        model = torch.nn.Module()
        for name in order:
            model.register_parameter(name, torch.nn.Parameter(torch.zeros(4)))
        return model

    first, second = model_of("ab"), model_of("ba")
    assert [name for name, _ in second.named_parameters()] == ["b", "a"]
    saving = OffloadAdam(first.parameters(), module=first, gradient_reduction="optimizer")
    first.get_parameter("a").grad = torch.ones(4)
    first.get_parameter("b").grad = torch.full((4,), 2.0)
    saving.step()
    loading = OffloadAdam(second.parameters(), module=second, gradient_reduction="optimizer")
    loading.load_state_dict(saving.state_dict())
    found = [loading.state[second.get_parameter(name)]["exp_avg"][0].item() for name in "ab"]
    assert found == pytest.approx([0.1, 0.2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("before_step", [False, True])
def test_tensors_put_into_the_state_are_used(dtype: torch.dtype, before_step: bool) -> None:
    """Like an optimizer whose state was written in place."""
    replaced, written = OffloadAdam(make_parameters(dtype)), OffloadAdam(make_parameters(dtype))
    for optimizer in (replaced, written):
        train(optimizer, range(2))
    for entry in replaced.state.values():
        for key, value in list(entry.items()):
            entry[key] = value.clone()
    replaced.state[replaced.param_groups[0]["params"][0]]["exp_avg"] = torch.full((3, 5), 0.5)
    written.state[written.param_groups[0]["params"][0]]["exp_avg"].fill_(0.5)
    whole = replaced.param_groups[0]["params"][3]
    replaced.state[whole] = {key: value.clone() for key, value in replaced.state[whole].items()}
    if not before_step:
        assert_same_state(replaced.state_dict(), written.state_dict())
    for optimizer in (replaced, written):
        train(optimizer, range(2, 4))
    assert_same_state(replaced.state_dict(), written.state_dict())
    assert_same_state(replaced.full_state_dict(), written.full_state_dict())
    assert bits(replaced) == bits(written)


class OnAnotherDevice(torch.Tensor):
    """A tensor that says it is on another device."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda")


def test_state_cannot_be_moved_to_another_device() -> None:
    """Lightning moves the state of every optimizer to the GPU, where it may not fit."""
    optimizer, written = OffloadAdam(make_parameters()), OffloadAdam(make_parameters())
    for each in (optimizer, written):
        train(each, range(2))
    first, *_ = optimizer.state
    for entry in optimizer.state.values():
        own = dict(entry)
        for key, value in list(entry.items()):
            if key != "step":
                entry[key] = value.clone().as_subclass(OnAnotherDevice)
        assert all(entry[key] is own[key] for key in own)
    optimizer.state[first]["exp_avg"] = torch.full((3, 5), 0.5).as_subclass(OnAnotherDevice)
    written.state[written.param_groups[0]["params"][0]]["exp_avg"].fill_(0.5)
    assert_same_state(optimizer.state_dict(), written.state_dict())
    # A tensor of another shape is kept, and reported by the step.
    optimizer.state[first]["exp_avg"] = torch.full((5,), 0.5).as_subclass(OnAnotherDevice)
    with pytest.raises(ValueError, match=r"exp_avg of parameter .*shape"):
        train(optimizer, range(2, 3))


def test_entries_are_copied_and_saved_as_ordered_dicts() -> None:
    optimizer = OffloadAdam(make_parameters())
    entry = optimizer.state[optimizer.param_groups[0]["params"][0]]
    buffer = io.BytesIO()
    torch.save(entry, buffer)
    buffer.seek(0)
    for copied in (torch.load(buffer, weights_only=True), copy.deepcopy(entry), copy.copy(entry)):
        assert type(copied) is OrderedDict
        assert copied.keys() == entry.keys()
        assert torch.equal(copied["master_weight"], entry["master_weight"])


def assert_same_state(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["state"].keys() == expected["state"].keys()
    for packed, entry in expected["state"].items():
        for key, value in entry.items():
            assert torch.equal(found["state"][packed][key], value), (packed, key)


def test_an_entry_that_lost_a_key_is_refused() -> None:
    optimizer = OffloadAdam(make_parameters())
    train(optimizer, range(1))
    del optimizer.state[optimizer.param_groups[0]["params"][0]]["exp_avg"]
    for use in (optimizer.state_dict, optimizer.full_state_dict, optimizer.step):
        with pytest.raises(ValueError, match=r"optimizer\.state has lost its key .exp_avg."):
            use()


def test_entries_that_no_group_lists_are_rejected() -> None:
    """As after JSON, whose keys are text; the moments would be zero."""
    optimizer = OffloadAdam(make_parameters(torch.float32))
    train(optimizer, range(2))
    saved = optimizer.state_dict()
    saved["state"] = {str(packed): entry for packed, entry in saved["state"].items()}
    with pytest.raises(ValueError, match=r"entries that no group lists: \['0', '1', '2'"):
        optimizer.load_state_dict(saved)


SHAPE = (7, 5)
ODD_PLANES: list[tuple[Any, str]] = [
    (lambda: torch.zeros(SHAPE).to_sparse(), "torch.float32, torch.sparse_coo on cpu"),
    (lambda: torch.zeros(SHAPE).to_sparse_csr(), "torch.float32, torch.sparse_csr on cpu"),
    (lambda: torch.zeros(SHAPE, device="meta"), "on meta"),
    (lambda: torch.zeros(SHAPE, dtype=torch.bool), "tensor of torch.bool"),
    (lambda: torch.zeros(SHAPE, dtype=torch.int64), "tensor of torch.int64"),
    (lambda: torch.zeros(SHAPE, dtype=torch.complex64), "tensor of torch.complex64"),
    (lambda: torch.zeros(SHAPE).to(torch.float8_e4m3fn), "tensor of torch.float8_e4m3fn"),
    (lambda: torch.zeros(SHAPE, dtype=torch.uint8).view(torch.bits8), "tensor of torch.bits8"),
    (lambda: torch.quantize_per_tensor(torch.zeros(SHAPE), 1.0, 0, torch.qint8), "torch.qint8"),
    (lambda: torch.full(SHAPE, 1e300, dtype=torch.float64), "beyond the range of float32"),
    (lambda: None, "must be a tensor, not None"),
    (lambda: 3.0, "must be a tensor, not 3.0"),
    (lambda: [0.0] * 10**6, r"must be a tensor, not \[0.0, "),
]


@pytest.mark.filterwarnings("ignore")  # of torch, about prototypes of layouts
@pytest.mark.parametrize(("make", "words"), ODD_PLANES, ids=lambda value: str(value)[:20])
@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
def test_values_that_are_no_state_are_rejected_before_anything_is_loaded(
    make: Any, words: str, key: str
) -> None:
    """The last parameter is at fault: those before it must not be loaded either."""
    optimizer = OffloadAdam(torch.nn.Parameter(torch.ones(SHAPE)) for _ in range(3))
    optimizer.step()
    saved = copy.deepcopy(optimizer.full_state_dict())
    for entry in saved["state"].values():
        entry["exp_avg"] += 1.0
    saved["param_groups"][0]["lr"] = 0.5
    saved["state"][2][key] = make()
    before = bits(optimizer)
    with pytest.raises((TypeError, ValueError), match=words) as caught:
        optimizer.load_state_dict(saved)
    assert len(str(caught.value)) < 500
    assert f"{key} of parameter " in str(caught.value)
    assert bits(optimizer) == before
    assert optimizer.param_groups[0]["lr"] == 1e-3


def test_missing_moments_are_zeros_only_before_the_first_update() -> None:
    optimizer = OffloadAdam([torch.nn.Parameter(torch.ones(SHAPE))])
    saved = copy.deepcopy(optimizer.full_state_dict())
    del saved["state"][0]["exp_avg"]
    optimizer.load_state_dict(saved)
    saved["state"][0]["step"] += 5
    with pytest.raises(ValueError, match=r"has no exp_avg of parameter .*counts 5 update\(s\)"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_state_of_other_float_dtypes_is_rounded_once(dtype: torch.dtype) -> None:
    optimizer = OffloadAdam([torch.nn.Parameter(torch.ones(SHAPE))])
    saved = copy.deepcopy(optimizer.full_state_dict())
    values = torch.randn(SHAPE, dtype=torch.float64).to(dtype)
    values[0, 0] = float("inf")
    saved["state"][0] |= {"exp_avg": values, "step": torch.tensor(3.0)}
    optimizer.load_state_dict(saved)
    assert torch.equal(optimizer.full_state_dict()["state"][0]["exp_avg"], values.float())


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("state", [], "not an optimizer's state dict"),
        ("state", None, "not an optimizer's state dict"),
        ("state.0", 5, "state of parameter 0 must be a dict, not 5"),
        ("state.0.step", 10**400, "step of parameter 0 must be a whole number"),
        ("state.0.step", 2**24 + 1, "at most 16,777,216, not 16777217"),
        ("state.0.step", torch.tensor(1.0, device="meta"), "step of parameter 0 must be"),
        ("state.0.step", torch.tensor(1j), "step of parameter 0 must be"),
        ("state.0.step", "x", "step of parameter 0 must be a whole number .*not 'x'"),
        ("param_groups", {}, "not an optimizer's state dict"),
        ("param_groups", [5], "not an optimizer's state dict"),
        ("param_groups.0.params", 5, "not an optimizer's state dict"),
        ("param_groups.0.amsgrad", torch.zeros(2), "amsgrad=tensor"),
        ("param_groups.0.lr", 10**400, "lr is too large for a float"),
        ("param_groups.0.lr", "x" * 10**6, "lr must be a number, not 'xxx"),
        ("param_groups.0.lr", torch.tensor(1.0, device="meta"), "lr must be a number"),
        ("param_groups.0.betas", (10**400, 0.9), r"betas\[0\] is too large"),
        ("state.0.step", "3", "must be a whole number .*not '3'"),
        ("offload_adam", {"world_size": 1}, "not an optimizer's state dict"),
        ("offload_adam", None, "not an optimizer's state dict"),
        ("offload_adam", {"saved_apart": 5}, "refers to a folder in an unknown way: 5"),
        ("offload_adam", {"saved_apart": {"label": 1, "parent": "/"}}, "unknown way"),
    ],
)
def test_a_state_dict_of_another_form_is_rejected(path: str, value: Any, words: str) -> None:
    optimizer = OffloadAdam(make_parameters())
    train(optimizer, range(1))
    before = bits(optimizer)
    saved = copy.deepcopy(optimizer.full_state_dict())
    *keys, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    at: Any = saved
    for key in keys:
        at = at[key]
    at[last] = value
    with pytest.raises((TypeError, ValueError), match=words) as caught:
        optimizer.load_state_dict(saved)
    assert len(str(caught.value)) < 500
    assert bits(optimizer) == before
