"""The cases of torch's own tests of optimizer state dicts and their hooks."""

from __future__ import annotations

import copy
import io
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from tests.support.torch_cases import (
    PAIRS,
    Affine,
    assert_equal,
    assert_equal_state,
    info_of,
    inputs_of,
    make_pair,
)

pytestmark = pytest.mark.parametrize("name", PAIRS)


def train(model: Affine, optimizer: torch.optim.Optimizer, num_steps: int = 3) -> None:
    for _ in range(num_steps):
        optimizer.step(model.closure_of(optimizer))


def twin_of(model: Affine) -> Affine:
    """Return a model of the same values in other parameters."""
    twin = Affine()
    for mine, other in zip(twin.parameters, model.parameters, strict=True):
        mine.data = other.detach().clone()
    return twin


def without_names(saved: dict[str, Any]) -> dict[str, Any]:
    """Return a state dict without the parameters' names, which may differ."""
    copied = copy.deepcopy(saved)
    copied.pop("offload_adam", None)
    for group in copied["param_groups"]:
        group.pop("param_names", None)
    return copied


def assert_same(ours: Any, theirs: Any) -> None:
    """Compare nested values to the bit."""
    if isinstance(theirs, Mapping):
        assert ours.keys() == theirs.keys()
        assert_same([*map(ours.get, theirs)], [*theirs.values()])
    elif isinstance(theirs, list | tuple):
        for our, their in zip(ours, theirs, strict=True):
            assert_same(our, their)
    elif isinstance(theirs, torch.Tensor):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    else:
        assert ours == theirs


@pytest.mark.parametrize("second_named", [False, True])
@pytest.mark.parametrize("first_named", [False, True])
def test_a_loaded_optimizer_goes_on_to_the_same_bits(
    name: str, first_named: bool, second_named: bool
) -> None:
    """With names on both sides, on one or on none, as in torch; loading changes no argument."""
    for kwargs in inputs_of(name):
        model = Affine()
        optimizer = PAIRS[name](model.named if first_named else model.parameters, **kwargs)
        train(model, optimizer)
        twin = twin_of(model)
        loaded = PAIRS[name](twin.named if second_named else twin.parameters, **kwargs)
        given = copy.deepcopy(optimizer.state_dict())
        before = copy.deepcopy(given)
        loaded.load_state_dict(given)
        assert_same(given, before)
        train(model, optimizer)
        train(twin, loaded)
        assert_same(model.parameters, twin.parameters)
        assert_same(without_names(optimizer.state_dict()), without_names(loaded.state_dict()))
        if first_named or second_named:
            (group,) = loaded.state_dict()["param_groups"]
            assert group["param_names"] == ["weight", "bias"]
        # A list that holds the groups twice saves the same group twice.
        loaded.param_groups.extend(loaded.param_groups)
        first, second = loaded.state_dict()["param_groups"]
        assert first == second


def test_state_of_torch_is_taken_over_and_goes_on_like_torch(name: str) -> None:
    for kwargs in inputs_of(name):
        ours, theirs = Affine(), Affine()
        optimizer, reference = make_pair(name, ours.parameters, theirs.parameters, **kwargs)
        train(theirs, reference)
        given = copy.deepcopy(reference.state_dict())
        optimizer.load_state_dict(given)
        with torch.no_grad():
            for our, their in zip(ours.parameters, theirs.parameters, strict=True):
                our.copy_(their)
        assert_equal_state(optimizer, reference)
        train(ours, optimizer)
        train(theirs, reference)
        assert_equal(ours.parameters, theirs.parameters)
        # And back: torch goes on with ours.
        twin = twin_of(ours)
        again = getattr(torch.optim, name)(twin.parameters, foreach=False, **kwargs)
        again.load_state_dict(optimizer.full_state_dict())
        train(ours, optimizer)
        train(twin, again)
        assert_equal(ours.parameters, twin.parameters)


def test_a_state_without_later_options_loads(name: str) -> None:
    """Older versions of torch saved no foreach, fused, maximize, ..."""
    flags = info_of(name).not_og_supported_flags
    assert "maximize" in flags
    for kwargs in inputs_of(name):
        model = Affine()
        optimizer = PAIRS[name](model.parameters, **kwargs)
        train(model, optimizer)
        twin = twin_of(model)
        loaded = PAIRS[name](twin.parameters, **kwargs)
        old = copy.deepcopy(optimizer.state_dict())
        for group in old["param_groups"]:
            for flag in flags:
                group.pop(flag, None)
        loaded.load_state_dict(old)
        train(model, optimizer)
        train(twin, loaded)
        assert_same(model.parameters, twin.parameters)


@pytest.mark.parametrize("named", [False, True])
def test_a_saved_file_holds_the_same_state(name: str, named: bool) -> None:
    """Also read with `weights_only`, which accepts plain types alone."""
    for kwargs in inputs_of(name):
        model = Affine()
        optimizer = PAIRS[name](model.named if named else model.parameters, **kwargs)
        train(model, optimizer)
        for saved in (optimizer.state_dict(), optimizer.full_state_dict()):
            file = io.BytesIO()
            torch.save(saved, file)
            file.seek(0)
            assert_same(torch.load(file, weights_only=True), saved)


def test_a_step_count_that_is_a_number_loads(name: str) -> None:
    for kwargs in inputs_of(name):
        model = Affine()
        optimizer = PAIRS[name](model.parameters, **kwargs)
        train(model, optimizer)
        saved = copy.deepcopy(optimizer.state_dict())
        for entry in saved["state"].values():
            entry["step"] = entry["step"].item()
        twin = twin_of(model)
        loaded = PAIRS[name](twin.parameters, **kwargs)
        loaded.load_state_dict(saved)
        train(model, optimizer)
        train(twin, loaded)
        assert_same(model.parameters, twin.parameters)
        assert [float(entry["step"]) for entry in loaded.state.values()] == [6.0, 6.0]


def test_state_is_never_empty(name: str) -> None:
    for kwargs in inputs_of(name):
        model = Affine()
        optimizer = PAIRS[name](model.parameters, **kwargs)
        for num_steps in (0, 1):
            train(model, optimizer, num_steps)
            assert set(optimizer.state) == {*model.parameters}
            keys = {"step", "exp_avg", "exp_avg_sq"}
            keys |= {"max_exp_avg_sq"} if kwargs.get("amsgrad") else set()
            assert [set(entry) for entry in optimizer.state.values()] == [keys, keys]


def test_a_state_dict_shares_memory_from_the_start(name: str) -> None:
    model = Affine()
    optimizer = PAIRS[name](model.parameters)
    shared = optimizer.state_dict()["state"]
    copied = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, 2)
    assert [int(entry["step"]) for entry in shared.values()] == [2, 2]
    assert all(bool(entry["exp_avg"].any()) for entry in shared.values())
    optimizer.load_state_dict(copied)
    for entry in optimizer.state_dict()["state"].values():
        assert not any(bool(value.any()) for value in entry.values())


@pytest.mark.parametrize("save", ["state_dict", "local_state_dict", "full_state_dict"])
def test_hooks_of_saving_see_and_change_what_is_saved(name: str, save: str) -> None:
    """In torch's order: a value that a pre-hook adds to `state` is in what a post-hook gets."""
    model = Affine()
    optimizer = PAIRS[name](model.parameters)
    calls: list[str] = []

    def pre(made: Any) -> None:
        calls.append("pre")
        made.param_groups[0]["note"] = len(calls)

    def post(made: Any, saved: dict[str, Any]) -> dict[str, Any]:
        calls.append("post")
        assert made is optimizer
        return {"saved": saved, "keys": sorted(saved)}

    optimizer.register_state_dict_pre_hook(pre)
    handle = optimizer.register_state_dict_post_hook(post)
    saved = getattr(optimizer, save)()
    assert calls == ["pre", "post"]
    assert saved["keys"] == ["offload_adam", "param_groups", "state"]
    assert saved["saved"]["param_groups"][0]["note"] == 1
    handle.remove()
    assert getattr(optimizer, save)()["param_groups"][0]["note"] == 3
    train(model, optimizer)


def state_of(optimizer: torch.optim.Optimizer) -> dict[Any, Any]:
    state: dict[Any, Any] = optimizer.state
    return state


def put(optimizer: torch.optim.Optimizer, **values: Any) -> None:
    state_of(optimizer).update(values)


def test_values_that_hooks_put_into_the_state_are_kept(name: str) -> None:
    """As torch's own hook tests do this; such keys are no parameters."""
    ours, theirs = Affine(), Affine()
    optimizer, reference = make_pair(name, ours.parameters, theirs.parameters)
    for made in (optimizer, reference):
        made.register_state_dict_pre_hook(lambda o: put(o, counted=1))
        made.register_load_state_dict_post_hook(lambda o: put(o, loaded={"a": 2}))
    for _ in range(2):
        for model, made in ((ours, optimizer), (theirs, reference)):
            train(model, made)
            assert made.state_dict()["state"]["counted"] == 1
            made.load_state_dict(made.state_dict())
            assert state_of(made)["loaded"] == {"a": 2}
            assert state_of(made)["counted"] == 1
    train(ours, optimizer)
    train(theirs, reference)
    assert_equal(ours.parameters, theirs.parameters)
    assert optimizer.full_state_dict()["state"].keys() == {0, 1, "counted", "loaded"}
    # Tensors that a user assigned are still found beside such values.
    for made, model in ((optimizer, ours), (reference, theirs)):
        made.state[model.weight]["exp_avg"] = torch.full((10, 5), 0.5)
    train(ours, optimizer)
    train(theirs, reference)
    assert_equal(ours.parameters, theirs.parameters)


def test_hooks_of_loading_run_in_torchs_order(name: str) -> None:
    optimizer = PAIRS[name](Affine().parameters)
    saved = optimizer.state_dict()

    def in_place(made: Any, given: dict[str, Any]) -> None:
        given["param_groups"][0]["lr"] = 0.002

    def replaced(made: Any, given: dict[str, Any]) -> dict[str, Any]:
        given = copy.deepcopy(given)
        given["param_groups"][0]["lr"] = 0.003
        return given

    seen: list[float] = []
    optimizer.register_load_state_dict_post_hook(lambda made: seen.append(rate_of(made)))
    optimizer.register_load_state_dict_pre_hook(in_place)
    optimizer.load_state_dict(saved)
    first = optimizer.register_load_state_dict_pre_hook(replaced, prepend=True)
    optimizer.load_state_dict(saved)
    first.remove()
    optimizer.register_load_state_dict_pre_hook(replaced)
    optimizer.load_state_dict(saved)
    assert seen == [0.002, 0.002, 0.003]
    assert rate_of(optimizer) == 0.003


def rate_of(optimizer: torch.optim.Optimizer) -> float:
    rate: float = optimizer.param_groups[0]["lr"]
    return rate


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_state_of_fp32_parameters_loads_for_16_bit_ones(name: str, dtype: torch.dtype) -> None:
    """The state stays fp32, while torch rounds it to the parameter's dtype."""
    for kwargs in inputs_of(name):
        model = Affine()
        optimizer = PAIRS[name](model.parameters, **kwargs)
        train(model, optimizer)
        narrow = [torch.nn.Parameter(p.detach().to(dtype)) for p in model.parameters]
        loaded = PAIRS[name](narrow, **kwargs)
        loaded.load_state_dict(optimizer.state_dict())
        for wide, other in zip(model.parameters, narrow, strict=True):
            for key in ("step", "exp_avg", "exp_avg_sq"):
                assert_same(loaded.state[other][key], optimizer.state[wide][key])
            gradient = torch.ones_like(other)
            other.grad, wide.grad = gradient, gradient.float()
            with torch.no_grad():
                wide.copy_(other)  # the master weight started at the rounded value
        loaded.step()
        optimizer.step()
        assert_equal([loaded.state[p]["master_weight"] for p in narrow], model.parameters)


def test_an_unnamed_optimizer_keeps_the_names_that_it_loads(name: str) -> None:
    """As in torch, while names that it has already are kept."""
    model = Affine()
    named = PAIRS[name]([{"params": [pair]} for pair in model.named])
    train(model, named)
    twin = twin_of(model)
    loaded = PAIRS[name]([{"params": [parameter]} for parameter in twin.parameters])
    loaded.load_state_dict(named.state_dict())
    assert [group["param_names"] for group in loaded.param_groups] == [["weight"], ["bias"]]
    train(model, named)
    train(twin, loaded)
    assert_same(model.parameters, twin.parameters)
    other = Affine()
    renamed = PAIRS[name]([("a", other.weight), ("b", other.bias)])
    plain = PAIRS[name](Affine().parameters)
    renamed.load_state_dict(plain.state_dict())
    assert renamed.param_groups[0]["param_names"] == ["a", "b"]
