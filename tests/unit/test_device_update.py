"""The update in torch's operations against the float64 reference, by element, on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_adam.kernels.formats import FloatFormat
from offload_adam.kernels.scalars import Hyperparameters
from offload_adam.step.foreach_update import DeviceSegments, foreach_update
from tests.support.device_segments import copied, wide
from tests.support.dispatched import Dispatched
from tests.support.kernel_reference import ReferenceState, reference_update, round_to
from tests.unit.kernel_cases import MODES

Float64Array = npt.NDArray[np.float64]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def random_segments(
    rng: np.random.Generator,
    numels: Sequence[int],
    dtype: torch.dtype,
    *,
    amsgrad: bool = False,
    param_out: torch.dtype | None = None,
) -> DeviceSegments:
    """Return segments in mid-training; in every third, gradients all but cancel exp_avg."""
    gradients = [torch.from_numpy(rng.normal(0, 1, n)).to(dtype) for n in numels]
    moments = [torch.from_numpy(rng.normal(0, 0.3, n)).float() for n in numels]
    for moment, gradient in list(zip(moments, gradients, strict=True))[::3]:
        nudge = torch.from_numpy(1 + rng.integers(-4, 5, moment.numel()) * 2.0**-20)
        moment.copy_(-gradient.double() / 9 * nudge)  # 0.9 m + 0.1 g is then close to 0

    def squares() -> list[torch.Tensor]:
        return [torch.from_numpy(np.square(rng.normal(0, 0.3, n))).float() for n in numels]

    return DeviceSegments(
        gradients,
        [torch.from_numpy(rng.normal(0, 1, n)).float() for n in numels],
        moments,
        squares(),
        squares() if amsgrad else None,
        None if param_out is None else [torch.zeros(n, dtype=param_out) for n in numels],
    )


def expected_state(
    segments: DeviceSegments, hyper: Hyperparameters, step: int, scale: float
) -> ReferenceState:
    largest = segments.max_exp_avg_sqs
    state = ReferenceState(
        wide(segments.master_weights),
        wide(segments.exp_avgs),
        wide(segments.exp_avg_sqs),
        None if largest is None else wide(largest),
    )
    reference_update(state, wide(segments.gradients), hyper, step, scale)
    return state


def assert_within_one_ulp(
    tensors: Sequence[torch.Tensor], expected: Float64Array, terms: Float64Array
) -> None:
    """Compare each element with the float64 result that the same float32 inputs give.

    Rounded once, a value is at most half an ULP off. What is left is for results that lie on the
    edge of rounding, and for the float64 errors of both sides: 2**-49 of the terms, at most.
    """
    ulp = np.spacing(np.abs(expected).astype(np.float32)).astype(np.float64)
    assert np.all(np.abs(wide(tensors) - expected) <= ulp + 2.0**-49 * terms)


def assert_close(
    before: DeviceSegments, after: DeviceSegments, hyper: Hyperparameters, step: int, scale: float
) -> None:
    expected = expected_state(before, hyper, step, scale)
    l2 = 0.0 if hyper.decoupled_weight_decay else hyper.weight_decay
    old_weight = np.abs(wide(before.master_weights))
    g = np.abs(wide(before.gradients) * scale) + l2 * old_weight
    m = np.abs(wide(before.exp_avgs)) + g
    v = wide(before.exp_avg_sqs) + g * g
    second = expected.exp_avg_sq if expected.max_exp_avg_sq is None else expected.max_exp_avg_sq
    step_size = hyper.lr / (1 - hyper.beta1**step)
    change = step_size * m / (np.sqrt(second) + hyper.eps)
    assert_within_one_ulp(after.exp_avgs, expected.exp_avg, m)
    assert_within_one_ulp(after.exp_avg_sqs, expected.exp_avg_sq, v)
    if after.max_exp_avg_sqs is not None and expected.max_exp_avg_sq is not None:
        assert_within_one_ulp(after.max_exp_avg_sqs, expected.max_exp_avg_sq, v)
    assert_within_one_ulp(after.master_weights, expected.master_weight, old_weight + change)


@pytest.mark.parametrize("amsgrad", [False, True], ids=["", "amsgrad"])
@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=15)
@given(
    seed=st.integers(0, 2**32 - 1),
    numels=st.lists(st.sampled_from([0, 1, 5, 64, 301]), max_size=5),
    dtype=st.sampled_from(DTYPES),
    step=st.sampled_from([1, 2, 7, 100_000]),
    scale=st.sampled_from([1.0, 0.37, 2.0**-16]),
    run_numel=st.sampled_from([1, 7, 128, 1 << 20]),
)
def test_every_element_is_the_rounded_float64_result(
    seed: int,
    numels: list[int],
    dtype: torch.dtype,
    step: int,
    scale: float,
    run_numel: int,
    mode: str,
    amsgrad: bool,
) -> None:
    rng = np.random.default_rng(seed)
    before = random_segments(rng, [130, *numels], dtype, amsgrad=amsgrad)
    after = copied(before)
    foreach_update(after, MODES[mode], step, scale, run_numel=run_numel)
    assert_close(before, after, MODES[mode], step, scale)
    for old, new in zip(before.gradients, after.gradients, strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize(
    ("param_out", "target"),
    [(torch.bfloat16, FloatFormat.BFLOAT16), (torch.float16, FloatFormat.FLOAT16)],
)
def test_the_16_bit_parameter_is_the_master_weight_rounded(
    param_out: torch.dtype, target: FloatFormat
) -> None:
    segments = random_segments(
        np.random.default_rng(0), (300, 5), torch.bfloat16, param_out=param_out
    )
    foreach_update(segments, MODES["decoupled"], 3, 1.0, run_numel=128)
    assert segments.param_out is not None
    expected = round_to(wide(segments.master_weights), target)
    np.testing.assert_array_equal(wide(segments.param_out), expected)


def test_without_segments_nothing_happens() -> None:
    foreach_update(DeviceSegments([], [], [], []), MODES["adam"], 1, 1.0)


def test_temporaries_are_bounded_and_nothing_waits_for_the_device() -> None:
    segments = random_segments(np.random.default_rng(0), (5_000, 700, 3_000), torch.bfloat16)
    with Dispatched() as seen:
        foreach_update(segments, MODES["together"], 3, 1.0, run_numel=1_000)
    assert seen.largest_numel == 4 * 1_000
    assert seen.num_waits == 0


def one_segment(**changes: list[torch.Tensor]) -> DeviceSegments:
    names = ("gradients", "master_weights", "exp_avgs", "exp_avg_sqs")
    return DeviceSegments(**{**{name: [torch.zeros(4)] for name in names}, **changes})


def test_a_run_of_no_elements_is_refused() -> None:
    with pytest.raises(ValueError, match=r"run_numel is 0.*at least 1"):
        foreach_update(one_segment(), MODES["adam"], 1, 1.0, run_numel=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exp_avgs": []}, r"exp_avgs has 0 tensors, but gradients has 1\. Pass"),
        ({"master_weights": [torch.zeros(1)]}, r"master_weights\[0\] has shape \(1,\).*4 elements"),
        ({"gradients": [torch.zeros(2, 2)]}, r"gradients\[0\] has shape \(2, 2\)"),
        ({"exp_avg_sqs": [torch.zeros(4).half()]}, r"exp_avg_sqs\[0\] is torch.float16.*float32"),
        ({"gradients": [torch.zeros(4).int()]}, r"gradients\[0\] is torch.int32.*floating"),
        ({"max_exp_avg_sqs": [torch.zeros(3)]}, r"max_exp_avg_sqs\[0\] has shape \(3,\)"),
        ({"param_out": [torch.zeros(4, device="meta")]}, r"param_out\[0\] .* on meta.*on cpu"),
    ],
)
def test_segments_that_do_not_fit_are_refused(
    changes: dict[str, list[torch.Tensor]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        one_segment(**changes)
