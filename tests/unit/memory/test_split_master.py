"""Split master weights, compared with integer arithmetic in NumPy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from offload_adam.memory.split_master import join, join_to_even, remainder_of

EDGES = np.array(
    [
        *(0x00000000, 0x80000000, 0x00000001, 0x80000001),  # zeros, smallest denormals
        *(0x007FFFFF, 0x00800000, 0x7F7FFFFF, 0xFF7FFFFF),  # largest denormal, normal numbers
        *(0x7F800000, 0xFF800000),  # infinities
        *(0x3F808000, 0x3F818000, 0xBF808000, 0x3F807FFF, 0x3F808001),  # ties and beside them
    ],
    dtype=np.uint32,
)


def some_bits() -> npt.NDArray[np.uint32]:
    """Return edge cases and a million random patterns, without NaN."""
    drawn = np.random.default_rng(0).integers(0, 2**32, 1_000_000, dtype=np.uint32)
    bits = np.concatenate([EDGES, drawn])
    return bits[~np.isnan(bits.view(np.float32))]


def rounded_away(bits: npt.NDArray[np.uint32]) -> torch.Tensor:
    """Return the bfloat16 next to float32 values; of two equally near ones, that of more size."""
    high = ((bits.astype(np.uint64) + 0x8000) >> 16).astype(np.uint16)
    return torch.from_numpy(high.view(np.int16)).view(torch.bfloat16)


def from_bits(bits: npt.NDArray[np.uint32]) -> torch.Tensor:
    return torch.from_numpy(bits.view(np.float32))


def to_bits(values: torch.Tensor) -> npt.NDArray[np.uint32]:
    return values.numpy().view(np.uint32)


def test_a_parameter_and_its_remainder_are_every_master() -> None:
    bits = some_bits()
    high = rounded_away(bits)
    remainder = remainder_of(from_bits(bits), high)
    assert remainder.dtype == torch.int16
    np.testing.assert_array_equal(remainder.numpy(), bits.astype(np.uint16).view(np.int16))
    np.testing.assert_array_equal(to_bits(join(high, remainder)), bits)


def test_parameters_that_torch_has_rounded_keep_all_masters_but_one_of_two_ties() -> None:
    bits = some_bits()
    master = from_bits(bits)
    high = master.bfloat16()  # ties to even
    found = to_bits(join(high, remainder_of(master, high)))
    # A tie that torch rounds toward zero: one unit of float32 below it is the nearest.
    ties = (bits & 0x1FFFF) == 0x8000
    assert 5 < ties.sum() < 20
    np.testing.assert_array_equal(found[~ties], bits[~ties])
    np.testing.assert_array_equal(found[ties], bits[ties] - 1)


def test_masters_that_torch_rounds_to_the_parameter() -> None:
    bits = some_bits()
    high = rounded_away(bits)
    master = join_to_even(high, remainder_of(from_bits(bits), high))
    ties = (bits & 0x1FFFF) == 0x8000
    np.testing.assert_array_equal(to_bits(master), np.where(ties, bits + 1, bits))
    is_kept = torch.from_numpy((bits & 0x7FFFFFFF) < 0x7F7F8000)  # those above round to infinity
    assert torch.equal(master.bfloat16()[is_kept], high[is_kept])


def test_a_remainder_of_parameters_that_are_loaded_later() -> None:
    bits = some_bits()
    remainder = remainder_of(from_bits(bits), torch.zeros(bits.size, dtype=torch.bfloat16))
    is_normal = (bits & 0x7FFFFFFF) > 0xFFFF  # of others, the parameter may be 0
    found = to_bits(join(rounded_away(bits), remainder))
    np.testing.assert_array_equal(found[is_normal], bits[is_normal])


def test_nan_stays_nan() -> None:
    nan = torch.full((2,), torch.nan)
    nan[1] = from_bits(np.array([0x7F800001], dtype=np.uint32))  # whose high half is infinity
    high = nan.bfloat16()
    assert remainder_of(nan, high).tolist() == [0, 0]
    assert join(high, remainder_of(nan, high)).isnan().all()


def test_a_parameter_that_was_set_to_zero_is_no_nan() -> None:
    """0 with a negative remainder would be the pattern of a NaN."""
    high = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1.0]).bfloat16()
    for remainder in (-32768, -1, 1, 32767):
        found = join(high, torch.full((5,), remainder, dtype=torch.int16))
        assert not found.isnan().any()
        # At most half a unit in the last place of bfloat16 away.
        assert (found[:2].abs() < 1e-40).all()
        assert (found[2:4].abs() > 3.3e38).all()
        assert abs(float(found[4]) - 1.0) <= 2**-8
