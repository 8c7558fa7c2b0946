"""`state_format` "mixed" and "int8": what is stored, shown, edited and loaded."""

from __future__ import annotations

import copy
import io
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from offload_adam import OffloadAdamW, mindspore
from offload_adam.memory.codes import CodedMoment
from offload_adam.memory.split_master import join, remainder_of
from tests.support.devices import HOST_AS_DEVICE
from tests.unit.test_state_format import (
    BF16,
    FP16,
    FP32,
    assert_same,
    bits_of,
    everything,
    make,
    make_model,
    master_of,
    set_gradients,
    train,
)

FORMATS = ["mixed", "int8"]
KEYS = ["exp_avg", "scaled_exp_avg_sq"]


class OnDevice(OffloadAdamW):
    _backend = HOST_AS_DEVICE


def coded(n: int, *, is_squared: bool) -> CodedMoment:
    blocks = -(-n // 128)
    return CodedMoment(
        torch.zeros(n, dtype=torch.uint8), torch.zeros(blocks, dtype=torch.uint8), is_squared
    )


def by_definition(code: int, exponent: int, *, is_squared: bool) -> float:
    """Return the value of a code in float64, from the formulas alone."""
    if is_squared:
        octave, step = divmod(code, 8)
        return float(2.0 ** (max(exponent, 63) - 127) * 2.0 ** (octave - 31) * (8 + step) / 8)
    smallest = 0.0 if exponent == 0 else 2.0 ** (exponent - 127)
    octave, step = divmod(code & 127, 16)
    value = smallest * ((16 + step) / 16 * 2.0**octave - 1)
    return -value if code >= 128 else value


@pytest.mark.parametrize("is_squared", [False, True])
def test_all_codes_are_exact_bfloat16_values_and_encode_exactly(is_squared: bool) -> None:
    lowest, highest = (63, 227) if is_squared else (8, 219)
    exponents = torch.arange(lowest, highest + 1, dtype=torch.uint8)
    # A block's largest value has one of the highest codes, as the kernel leaves it.
    top = 112 if not is_squared else 247
    codes = torch.arange(256, dtype=torch.uint8).repeat(len(exponents), 1)
    halves = codes.view(-1, 2, 128).clone()
    halves[:, :, -1] = top
    flat = CodedMoment(halves.flatten(), exponents.repeat_interleave(2), is_squared)
    values = flat.values()
    expected = [
        by_definition(code, exponent, is_squared=is_squared)
        for exponent, block in zip(flat.exponents.tolist(), halves.view(-1, 128), strict=True)
        for code in block.tolist()
    ]
    np.testing.assert_array_equal(values.double().numpy(), np.array(expected))
    again = coded(values.numel(), is_squared=is_squared)
    assert again.copy_(values)
    assert torch.equal(again.values(), values)


@pytest.mark.parametrize("is_squared", [False, True])
@pytest.mark.parametrize("n", [1, 127, 128, 129, 2**20 + 130])
def test_float32_is_rounded_to_nearest(n: int, is_squared: bool) -> None:
    generator = torch.Generator().manual_seed(n)
    values = torch.randn(n, generator=generator) * torch.rand(n, generator=generator)
    values = values.square() if is_squared else values
    moment = coded(n, is_squared=is_squared)
    moment.copy_(values)
    found = moment.values().float()
    padded = torch.nn.functional.pad(values.abs(), (0, -n % 128)).view(-1, 128)
    largest = padded.amax(1).repeat_interleave(128)[:n]
    error = (found - values).abs()
    if is_squared:  # half of 1/8 of an octave, or the smallest value of the block
        assert (error <= torch.maximum(values / 16, 2 * largest * 2.0**-31)).all()
        assert (found > 0).all()
    else:  # near zero, steps are even
        assert (error <= values.abs() / 32 + largest / 3900).all()
    single = coded(1, is_squared=is_squared)
    single.copy_(values[:1])
    assert moment.values().numel() == n


@pytest.mark.parametrize(
    ("values", "is_squared", "expected"),
    [
        ([0.0, -0.0], False, [0.0, -0.0]),
        ([2.0**-125, 2.0**-123], False, [0.0, 2.0**-123]),
        ([0.0, 1.0], True, [2.0**-31, 1.0]),
        ([1e-30, 0.0], True, [2.0**-95, 2.0**-95]),
        ([2.0**100, 1.0], True, [2.0**100, 2.0**69]),
        ([3.0, 1e30], False, [0.0, 1e30]),
    ],
)
def test_edge_values(values: list[float], is_squared: bool, expected: list[float]) -> None:
    moment = coded(len(values), is_squared=is_squared)
    moment.copy_(torch.tensor(values))
    found = moment.values()
    torch.testing.assert_close(found.double(), torch.tensor(expected).double(), rtol=1 / 32, atol=0)
    assert torch.equal(found.signbit(), torch.tensor(expected).signbit())


@pytest.mark.parametrize("is_squared", [False, True])
def test_a_rounded_value_in_any_part_is_reported(is_squared: bool) -> None:
    fill = 2.0**-10 if is_squared else 0.0  # each has a code
    values = torch.full((2**15 + 1,), fill)  # several parts
    assert coded(values.numel(), is_squared=is_squared).copy_(values)
    for place in (0, -1):
        values[place] = 1.01
        assert not coded(values.numel(), is_squared=is_squared).copy_(values)
        values[place] = fill


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -float("inf"), 2.0**101])
@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
def test_values_that_no_code_stands_for_are_rejected(key: str, value: float) -> None:
    model = make_model()
    optimizer = make(model, "int8")
    train(model, optimizer, range(1))
    saved = optimizer.full_state_dict()
    saved["state"][0][key][3, 4] = value
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match=f"{key} of parameter 'weight' has values that are not"):
        optimizer.load_state_dict(saved)
    assert_same(everything(model, optimizer), before)
    if key == "exp_avg":
        with pytest.raises(ValueError, match="The moment has values that are not finite"):
            optimizer.state[model.get_parameter("weight")][key].fill_(value)


def test_negative_second_moments_are_rejected() -> None:
    model = make_model()
    optimizer = make(model, "int8")
    saved = optimizer.full_state_dict()
    saved["state"][0]["exp_avg_sq"][3, 4] = -1.0
    with pytest.raises(ValueError, match="exp_avg_sq of parameter 'weight' has negative values"):
        optimizer.load_state_dict(saved)


def test_the_upper_byte_of_a_remainder() -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (10**6,), generator=generator).to(torch.int32)
    master = bits.view(FP32)
    master = master[~master.isnan() & (master.abs() < 3e38)]
    rounded = (master.view(torch.int32) + 0x80) & ~0xFF
    high = ((rounded + 0x8000) >> 16).to(torch.int16).view(BF16)
    remainder = remainder_of(master, high, torch.int8)
    assert torch.equal(join(high, remainder).view(torch.int32), rounded)
    # A parameter that torch has rounded to even: the nearest remainder that there is.
    even = master.bfloat16()
    error = bits_of(join(even, remainder_of(master, even, torch.int8))) - bits_of(master)
    assert error.abs().max() <= 256


@pytest.mark.parametrize(
    ("state_format", "dtype", "on_device", "nbytes"),
    [
        *(("mixed", BF16, False, 4), ("mixed", FP16, False, 7), ("mixed", FP32, False, 3)),
        *(("int8", BF16, False, 3), ("int8", FP16, False, 6), ("int8", FP32, False, 2)),
        # With a copy of the parameter, and a gradient shard.
        *(("mixed", BF16, True, 8), ("mixed", FP16, True, 9), ("mixed", FP32, True, 11)),
        *(("int8", BF16, True, 7), ("int8", FP16, True, 8), ("int8", FP32, True, 10)),
    ],
)
def test_host_bytes_per_parameter(
    state_format: str, dtype: torch.dtype, on_device: bool, nbytes: int
) -> None:
    parameter = nn.Parameter(torch.zeros(1024, 128, dtype=dtype))
    kind: Any = OnDevice if on_device else OffloadAdamW
    optimizer = kind([parameter], state_format=state_format, max_grad_norm=1.0)
    ledger = [entry for entry in optimizer.memory_ledger() if entry.bucket is not None]
    found = {entry.category: entry.nbytes for entry in ledger if entry.category != "parameters"}
    assert found["exp_avg"] == parameter.numel() * (2 if state_format == "mixed" else 1)
    assert found["exp_avg_sq"] == parameter.numel()
    assert found["exponents"] == 2 * parameter.numel() // 128
    total = nbytes * parameter.numel() + found["exponents"]
    assert sum(found.values()) == optimizer.host_nbytes["state"] == total


@pytest.mark.parametrize("state_format", FORMATS)
def test_what_is_shown(state_format: str) -> None:
    model = make_model()
    optimizer = make(model, state_format)
    train(model, optimizer, range(3))
    matrix, vector = (optimizer.state[parameter] for parameter in model.parameters())
    assert sorted(vector) == ["exp_avg", "exp_avg_sq", "master_weight", "step"]
    assert {key: value.dtype for key, value in matrix.items()} == {
        "step": FP32,
        "exp_avg_sq_scale": torch.float64,
        "exp_avg": BF16,
        "scaled_exp_avg_sq": BF16,
        "master_remainder": torch.int8,
    }
    saved = optimizer.state_dict()
    assert saved["offload_adam"]["state_formats"] == {0: state_format}
    full = optimizer.full_state_dict()
    for key in KEYS:
        assert type(saved["state"][0][key]) is torch.Tensor
        assert torch.equal(matrix[key].clone(), saved["state"][0][key])
    scale = float(matrix["exp_avg_sq_scale"])
    assert 1 <= scale < 2
    assert torch.equal(full["state"][0]["exp_avg"], saved["state"][0]["exp_avg"].float())
    second = saved["state"][0]["scaled_exp_avg_sq"].float() * scale
    assert torch.equal(full["state"][0]["exp_avg_sq"], second)
    torch.optim.AdamW(model.parameters()).load_state_dict(full)


@pytest.mark.parametrize("state_format", FORMATS)
def test_a_parameter_without_an_update_has_a_second_moment_of_zero(state_format: str) -> None:
    model = make_model()
    optimizer = make(model, state_format)
    full = optimizer.full_state_dict()
    assert not full["state"][0]["exp_avg"].any()
    assert not full["state"][0]["exp_avg_sq"].any()
    # Its memory is all 0, which stands for the smallest code of the smallest exponent.
    shown = optimizer.state[model.get_parameter("weight")]["scaled_exp_avg_sq"]
    assert set(shown.flatten().tolist()) == {2.0**-95}


def test_moments_in_codes_can_be_edited() -> None:
    model = make_model()
    optimizer = make(model, "int8")
    train(model, optimizer, range(3))
    entry = optimizer.state[model.get_parameter("weight")]
    moment = entry["exp_avg"]
    before = moment.clone()
    assert type(before) is torch.Tensor
    moment.mul_(0.5)
    assert torch.equal(entry["exp_avg"].clone(), before / 2)
    moment[3] = 0
    assert not moment[3].any()
    assert torch.equal(moment[4:].clone(), before[4:] / 2)
    with pytest.raises(NotImplementedError, match="cannot be modified in place"):
        moment[4:].zero_()
    moment.zero_()
    assert not moment.any()
    torch._foreach_zero_([moment])
    assert not moment.any()
    torch._foreach_copy_([moment], [before])
    assert torch.equal(moment.clone(), before)
    for wrong in (
        lambda: moment.t_(),
        lambda: moment.resize_(3),
        lambda: moment.share_memory_(),
        lambda: torch._foreach_zero_([moment[4:]]),
    ):
        with pytest.raises(NotImplementedError, match="8-bit codes"):
            wrong()
    assert f"{moment[4, 4]:.3f}" == f"{before[4, 4]:.3f}"
    # Assignments are copied at the next step, or at the next state dict.
    entry["exp_avg"] = before.float()
    assert torch.equal(optimizer.state_dict()["state"][0]["exp_avg"], before)
    assert entry["exp_avg"] is moment
    assert torch.equal(copy.deepcopy(moment), before)
    saved = io.BytesIO()
    torch.save(moment, saved)
    saved.seek(0)
    assert torch.equal(torch.load(saved, weights_only=True), before)
    assert repr(moment) == f"CodedTensor({before!r})"


def test_a_moment_in_codes_has_the_order_of_elements_of_its_parameter() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, 5, 5, generator=generator).to(BF16)
    parameter = nn.Parameter(images.to(memory_format=torch.channels_last))
    optimizer = OffloadAdamW([parameter], state_format="int8", num_threads=1)
    parameter.grad = parameter.detach().clone()
    optimizer.step()
    moment = optimizer.state[parameter]["exp_avg"]
    assert moment.stride() == parameter.stride()
    before = moment.clone().contiguous()
    moment.neg_()
    assert torch.equal(moment.clone(), -before)
    torch.abs(before, out=moment)
    assert torch.equal(moment.clone(), before.abs())
    saved = copy.deepcopy(optimizer.state_dict())
    for key in (*KEYS, "master_remainder"):
        saved["state"][0][key] = saved["state"][0][key].contiguous()
    moment.zero_()
    optimizer.load_state_dict(saved)
    assert torch.equal(moment.clone(), before.abs())


def test_keys_of_other_formats_are_not_ignored() -> None:
    model = make_model()
    entry = make(model, "int8").state[model.get_parameter("weight")]
    with pytest.raises(KeyError, match="the product of 'scaled_exp_avg_sq' and 'exp_avg_sq_scale'"):
        entry["exp_avg_sq"]
    with pytest.raises(ValueError, match="the product of 'scaled_exp_avg_sq' and"):
        entry["exp_avg_sq"] = torch.zeros(65, 129)
    with pytest.raises(ValueError, match=r"'master_weight' is not in .* has 'master_remainder'"):
        entry["master_weight"] = torch.zeros(65, 129)
    entry["of a user"] = 1
    with pytest.raises(KeyError, match=r"^'nothing'$"):
        entry["nothing"]


@pytest.mark.parametrize("loaded", [False, True])
def test_the_first_update_has_no_second_moment_to_add_to(loaded: bool) -> None:
    """With a small eps, the smallest code would already be too large."""
    parameter = nn.Parameter(torch.zeros(4, 128))
    options: dict[str, Any] = {"lr": 1e-2, "eps": 1e-20, "state_format": "int8"}
    optimizer = OffloadAdamW([parameter], **options)
    if loaded:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    parameter.grad = torch.full_like(parameter, 1e-14)
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), torch.full((4, 128), -1e-2), rtol=1e-5, atol=0)


def test_only_a_change_of_blocks_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    model = make_model()
    source = make(model, "bf16")
    train(model, source, range(2))
    other = make_model()
    plain = torch.optim.AdamW(model.parameters())
    train(model, plain, range(2))  # torch's moments are bfloat16, too
    optimizer = make(other, "int8")
    with caplog.at_level("INFO", logger="offload_adam"):
        optimizer.load_state_dict(source.state_dict(), convert=True)
        optimizer.load_state_dict(plain.state_dict())
        entry = optimizer.state[other.get_parameter("weight")]
        entry["exp_avg"] = torch.rand(65, 129).bfloat16()
        optimizer.state_dict()
    assert "Rounded" not in caplog.text


def exact_update(
    weight: torch.Tensor, entry: dict[str, torch.Tensor], gradient: torch.Tensor, step: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return weight and moments after one step of `make`'s AdamW, in float64."""
    weight, g = weight.double(), gradient.double()
    m = 0.9 * entry["exp_avg"].double() + 0.1 * g
    v = 0.999 * entry["exp_avg_sq"].double() + 0.001 * g * g
    root = (v / (1 - 0.999**step)).sqrt() + 1e-8
    updated = weight * (1 - 1e-2 * 1e-2) - 1e-2 / (1 - 0.9**step) * m / root
    return updated, m, v


@pytest.mark.parametrize("state_format", FORMATS)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_one_step_from_the_stored_state(state_format: str, dtype: torch.dtype) -> None:
    """The weight is updated with unrounded moments; what is stored is one of the neighbours."""
    model = make_model(dtype)
    optimizer = make(model, state_format)
    weight = model.get_parameter("weight")
    for step in range(1, 5):
        before = optimizer.full_state_dict()["state"][0]
        before = {key: value.clone() for key, value in before.items()}
        master = master_of(optimizer, weight)
        set_gradients(model, step)
        assert weight.grad is not None
        expected, first, second = exact_update(master, before, weight.grad, step)
        optimizer.step()
        found = master_of(optimizer, weight).double()
        unit = 2.0**-15 if dtype == BF16 else 2.0**-23  # of 24 bits, or of fp32
        # The terms of the first moment may cancel, but their rounding does not.
        terms = (before["exp_avg"].double().abs() + weight.grad.double().abs()) / second.sqrt()
        bound = found.abs() * unit + (expected - master.double()).abs() * 2.0**-20
        bound += 1e-2 * terms * 2.0**-23
        assert ((found - expected).abs() <= bound).all()
        after = optimizer.full_state_dict()["state"][0]
        steps = 2.0**-7 if state_format == "mixed" else 2.0**-4
        largest = first.abs().max() if state_format == "int8" else 0.0
        bound = first.abs() * steps + largest / 2000 + weight.grad.double().abs() * 2.0**-23
        assert ((after["exp_avg"] - first).abs() <= bound).all()
        assert ((after["exp_avg_sq"] - second).abs() <= second / 8 + second.max() * 2**-31).all()


@pytest.mark.parametrize("state_format", FORMATS)
@pytest.mark.parametrize("betas", [(0.9, 0.0), (0.0, 0.5), (0.9, 0.95), (0.9, 0.9999)])
def test_the_second_moment_decays_exactly(state_format: str, betas: tuple[float, float]) -> None:
    """Without gradients, codes stay and the scale decays: also over many powers of 2."""
    model = make_model()
    optimizer = make(model, state_format, betas=betas)
    train(model, optimizer, range(2))
    start = optimizer.full_state_dict()["state"][0]["exp_avg_sq"].double()
    num_steps = 60
    for _ in range(num_steps):
        set_gradients(model, 0, scale=0.0)
        optimizer.step()
    found = optimizer.full_state_dict()["state"][0]["exp_avg_sq"].double()
    expected = (start * betas[1] ** num_steps).clamp(min=2.0**-95)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=2.0**-93)


def test_with_a_beta2_of_zero_nothing_is_left_of_an_earlier_gradient() -> None:
    parameter = nn.Parameter(torch.ones(3, 64, dtype=FP32))
    optimizer = OffloadAdamW(
        [parameter], betas=(0.9, 0.0), state_format="int8", max_grad_norm=None, num_threads=1
    )
    for gradient in (1.0, 2.0**-25, 2.0**-10):
        parameter.grad = torch.full_like(parameter, gradient)
        optimizer.step()
        found = optimizer.full_state_dict()["state"][0]["exp_avg_sq"]
        assert torch.equal(found, torch.full_like(found, gradient**2))


def test_second_moments_decay_by_the_updates_of_their_own_parameters() -> None:
    """Groups have their own beta2, and a parameter without a gradient does not decay."""
    parameters = [nn.Parameter(torch.ones(3, 64, dtype=BF16)) for _ in range(3)]
    groups: Any = [
        {"params": [parameter], "betas": (0.9, beta2)}
        for parameter, beta2 in zip(parameters, (0.5, 0.9, 0.9), strict=True)
    ]
    optimizer = OffloadAdamW(groups, state_format="int8", num_threads=1)
    assert len(optimizer._alive().states) == 1  # all in one bucket
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    before = optimizer.full_state_dict()
    for parameter in parameters[:2]:
        parameter.grad = torch.zeros_like(parameter)
    parameters[2].grad = None
    for _ in range(3):
        optimizer.step()
    after = optimizer.full_state_dict()
    for i, factor in enumerate((0.5**3, 0.9**3, 1.0)):
        first, last = (each["state"][i]["exp_avg_sq"] for each in (before, after))
        torch.testing.assert_close(last, first * factor, rtol=1e-6, atol=0)
    # The first dict is a copy, which the later steps have not changed.
    assert before["offload_adam"]["exp_avg_sq_scale"] == {0: 1.0, 1: 1.0, 2: 1.0}


def test_formats_of_groups_do_not_mix() -> None:
    parameters = [nn.Parameter(torch.ones(3, 64, dtype=BF16)) for _ in range(3)]
    groups: Any = [
        {"params": [parameter], "state_format": state_format}
        for parameter, state_format in zip(parameters, ("mixed", "int8", "bf16"), strict=True)
    ]
    optimizer = OffloadAdamW(groups, num_threads=1)
    found = optimizer.state_dict()["offload_adam"]["state_formats"]
    assert found == {0: "mixed", 1: "int8", 2: "bf16"}


@pytest.mark.parametrize("state_format", FORMATS)
@pytest.mark.parametrize("dtype", [BF16, FP32])  # fp32 weights show a change of the last bit
@pytest.mark.parametrize("variant", ["threads", "streamed", "state_dict", "full", "local"])
def test_how_the_work_is_divided_does_not_change_a_bit(
    state_format: str, dtype: torch.dtype, variant: str
) -> None:
    results = []
    for varied in (False, True):
        model = make_model(dtype)
        options: dict[str, Any] = {}
        if varied:
            changes: dict[str, dict[str, Any]] = {
                "threads": {"num_threads": 2},
                "streamed": {"module": model},
            }
            options = changes.get(variant, {})
        optimizer = make(model, state_format, **options)
        train(model, optimizer, range(30))
        if varied and variant in ("state_dict", "full", "local"):
            name = {"full": "full_state_dict", "local": "local_state_dict"}.get(variant, variant)
            file = io.BytesIO()
            torch.save({"model": model.state_dict(), "state": getattr(optimizer, name)()}, file)
            file.seek(0)
            loaded = torch.load(file, weights_only=True)
            model = make_model(dtype)
            optimizer = make(model, state_format)
            train(model, optimizer, range(7, 8))
            model.load_state_dict(loaded["model"])
            optimizer.load_state_dict(loaded["state"])
        train(model, optimizer, range(30, 33))
        results.append(everything(model, optimizer))
        optimizer.close()
    assert_same(*results)


@pytest.mark.parametrize("state_format", FORMATS)
def test_a_skipped_step_changes_nothing(state_format: str) -> None:
    model = make_model()
    optimizer = make(model, state_format)
    train(model, optimizer, range(2))
    before = everything(model, optimizer)
    set_gradients(model, 2)
    gradient = model.get_parameter("weight").grad
    assert gradient is not None
    gradient[3, 4] = torch.inf
    optimizer.step()
    assert optimizer.last_step.skipped
    assert_same(everything(model, optimizer), before)


@pytest.mark.parametrize("own", ["fp32", "bf16", "mixed", "int8"])
@pytest.mark.parametrize("saved", ["fp32", "bf16", "mixed", "int8"])
def test_conversions(saved: str, own: str) -> None:
    model = make_model()
    source = make(model, saved)
    train(model, source, range(3))
    other = make_model()
    optimizer = make(other, own)
    train(other, optimizer, range(7, 8))
    other.load_state_dict(model.state_dict())
    state = source.state_dict()
    if saved not in ("fp32", own):
        before = everything(other, optimizer)
        expected = f"state_format='{saved}', but this optimizer stores it with '{own}'"
        with pytest.raises(ValueError, match=re.escape(expected)):
            optimizer.load_state_dict(state)
        assert_same(everything(other, optimizer), before)
    optimizer.load_state_dict(state, convert=True)
    found, exact = (each.full_state_dict()["state"][0] for each in (optimizer, source))
    assert found["step"] == exact["step"] == 3
    first = {"fp32": 0.0, "bf16": 2.0**-8, "mixed": 2.0**-8, "int8": 2.0**-5}[own]
    second = {"fp32": 0.0, "bf16": 2.0**-8, "mixed": 2.0**-4, "int8": 2.0**-4}[own]
    is_exact = saved == own
    bound = exact["exp_avg"].abs() * first + (exact["exp_avg"].abs().max() / 4080) * (own == "int8")
    assert ((found["exp_avg"] - exact["exp_avg"]).abs() <= bound * (not is_exact)).all()
    error = (found["exp_avg_sq"] - exact["exp_avg_sq"]).abs()
    floor = exact["exp_avg_sq"].max() * 2.0**-30 * (second > 2**-8)
    assert (error <= (exact["exp_avg_sq"] * second + floor + 1e-12) * (not is_exact)).all()
    weights = [m.get_parameter("weight") for m in (other, model)]
    masters = [master_of(o, w) for o, w in zip((optimizer, source), weights, strict=True)]
    # Of 24 bits if there is a byte for the rest; ties of bfloat16 may move by one.
    unit = 256 if own in FORMATS else 1
    assert (bits_of(masters[0]) - bits_of(masters[1])).abs().max() <= unit * (not is_exact)
    # The step keeps the masters: it does not take the parameters for edited ones.
    optimizer.param_groups[0]["lr"] = 0.0
    train(other, optimizer, range(3, 4))
    assert torch.equal(master_of(optimizer, weights[0]), masters[0])


@pytest.mark.parametrize("name", ["state_dict", "full_state_dict", "torch"])
def test_a_state_before_the_first_update_is_loaded_as_such(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model()
    optimizer = make(model, "int8")
    source = torch.optim.AdamW(model.parameters()) if name == "torch" else optimizer
    saved = copy.deepcopy(getattr(source, name.replace("torch", "state_dict"))())
    train(model, optimizer, range(1))
    with caplog.at_level("INFO", "offload_adam"):
        optimizer.load_state_dict(saved)
    assert "Rounded" not in caplog.text
    assert optimizer.state[model.get_parameter("weight")]["exp_avg_sq_scale"] == 0
    entry = optimizer.full_state_dict()["state"][0]
    assert not any(entry[key].any() for key in ("step", "exp_avg", "exp_avg_sq"))
    if name == "torch":  # without master weights, so that they take the parameter's value
        assert not optimizer.state[model.get_parameter("weight")]["master_remainder"].any()


@pytest.mark.parametrize("own", ["fp32", "bf16", "mixed", "int8"])
def test_the_planes_alone_show_that_a_state_is_in_codes(own: str) -> None:
    """Torch's state dict functions drop the entry that has the formats."""
    model = make_model()
    optimizer = make(model, "int8")
    train(model, optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["offload_adam"]
    other = make_model()
    loaded = make(other, own)
    if own in FORMATS:  # nothing shows which of the two was saved
        loaded.load_state_dict(saved)
        return
    with pytest.raises(ValueError, match=f"stores it with '{own}'"):
        loaded.load_state_dict(saved)


def test_only_a_state_with_codes_has_scales() -> None:
    model = make_model()
    assert "exp_avg_sq_scale" not in make(model, "bf16").full_state_dict()["offload_adam"]
    optimizer = make(model, "int8")
    saved = optimizer.full_state_dict()
    saved["offload_adam"]["exp_avg_sq_scale"] = [1.0]
    with pytest.raises((TypeError, ValueError), match="state dict"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("dtype", [FP16, FP32])
def test_a_remainder_means_nothing_for_a_parameter_of_another_dtype(dtype: torch.dtype) -> None:
    model = make_model()
    optimizer = make(model, "int8")
    train(model, optimizer, range(2))
    other = make_model(dtype)
    loaded = make(other, "int8")
    other.load_state_dict(model.state_dict())
    loaded.load_state_dict(optimizer.state_dict())
    weight = other.get_parameter("weight")
    assert torch.equal(master_of(loaded, weight), weight.detach().float())


def test_a_state_after_one_update_is_loaded() -> None:
    model = make_model()
    optimizer = make(model, "int8")
    train(model, optimizer, range(1))
    before = everything(model, optimizer)
    weights, saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    assert saved["state"][0]["exp_avg_sq_scale"] == 1
    train(model, optimizer, range(1, 2))
    model.load_state_dict(weights)
    optimizer.load_state_dict(saved)
    assert_same(everything(model, optimizer), before)


def test_moments_that_a_load_rounds_once_more_are_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = make_model()
    optimizer = make(model, "int8")
    train(model, optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    full = copy.deepcopy(optimizer.full_state_dict())
    exact = make(make_model(), "fp32")
    exact.step()
    with caplog.at_level("INFO", "offload_adam"):
        for state in (saved, full, exact.state_dict()):
            optimizer.load_state_dict(state)
        assert "Rounded" not in caplog.text
        saved["state"][0]["exp_avg"] = saved["state"][0]["exp_avg"] * 1.01
        optimizer.load_state_dict(saved)
    assert "Rounded 1 moment(s) in 8-bit codes once more" in caplog.text


@pytest.mark.parametrize("scale", [0.5, 2.0, -1.0, float("nan"), "one", None])
def test_a_scale_that_cannot_be_is_rejected(scale: Any) -> None:
    model = make_model()
    optimizer = make(model, "int8")
    train(model, optimizer, range(1))
    saved = optimizer.state_dict()
    saved["state"][0]["exp_avg_sq_scale"] = scale
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match=r"exp_avg_sq_scale of parameter 'weight' must be 0, or"):
        optimizer.load_state_dict(saved)
    assert_same(everything(model, optimizer), before)


@pytest.mark.parametrize("state_format", FORMATS)
def test_lazy_sparse_gradients_are_rejected(state_format: Any) -> None:
    table = nn.Embedding(50, 32, sparse=True, dtype=BF16)
    optimizer = mindspore.Adam([("table", table.weight)], state_format=state_format, use_lazy=True)
    table(torch.tensor([3, 7])).float().sum().backward()
    before = everything(table, optimizer)
    with pytest.raises(ValueError, match=r"'table' has a sparse gradient.*state_format='bf16'"):
        optimizer.step()
    assert_same(everything(table, optimizer), before)


@pytest.mark.parametrize("state_format", FORMATS)
def test_sparse_gradients_that_are_not_lazy(state_format: Any) -> None:
    results = []
    for is_sparse in (True, False):
        table = nn.Embedding(50, 33, sparse=is_sparse, dtype=BF16)
        with torch.no_grad():
            table.weight.copy_(torch.arange(50 * 33).view(50, 33) / 1000)
        optimizer = mindspore.Adam([("weight", table.weight)], state_format=state_format)
        for _ in range(3):
            table(torch.tensor([3, 7, 7, 49])).float().square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(everything(table, optimizer))
    assert_same(*results)


def test_many_tiny_parameters_do_not_share_blocks() -> None:
    model = nn.ParameterList([nn.Parameter(torch.ones(3, 2)) for _ in range(1001)])
    optimizer = OffloadAdamW(list(model.named_parameters()), state_format="int8", num_threads=1)
    for position, parameter in enumerate(model):
        parameter.grad = torch.full_like(parameter, 2.0 ** (position % 60 - 30))
    optimizer.step()
    for parameter in model:
        # Of one block of its own, so that a large neighbour does not round it to 0.
        assert parameter.grad is not None
        found = optimizer.state[parameter]["exp_avg"].clone().float()
        torch.testing.assert_close(found, 0.1 * parameter.grad, rtol=1 / 16, atol=0)
