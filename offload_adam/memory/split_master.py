"""Master weights in two halves: the bfloat16 parameter, and the lower bits of the fp32 weight.

    fp32 master   bits = (high << 16) + remainder    high: bfloat16 bits, remainder: int16
    1.0           0x3f800000 = 0x3f80 : 0
    1.0 + ulp     0x3f800001 = 0x3f80 : 1
    a tie         0x3f808000 = 0x3f81 : -32768       rounds away from zero

The parameter is the master weight rounded to nearest, with ties away from zero. So every fp32 value
has its own pair, except NaN, whose remainder is 0. torch rounds ties to even, but then an even
parameter would need 65537 remainders.

An int8 remainder is the upper byte of those 16 bits. The master weight then has 24 bits, and the
kernel rounds it to them stochastically.

If a user modifies the parameter, the remainder stays: the master weight is then within half a unit
in the last place of the new parameter. Remainders are not reset, because a loop that clamps weights
after each step would otherwise lose the small updates of all other elements.
"""

from __future__ import annotations

import torch


def join(high: torch.Tensor, remainder: torch.Tensor) -> torch.Tensor:
    """Return fp32 master weights, from bfloat16 parameters and remainders of one shape.

    Args:
        remainder: int16 or int8.
    """
    low = remainder.to(torch.int32)
    if remainder.dtype == torch.int8:
        low = low << 8
    bits = (high.view(torch.int16).to(torch.int32) << 16) + low
    master = bits.view(torch.float32)
    # A user's edit may leave an invalid pair, such as 0 with a negative remainder. The remainder
    # then counts as 0.
    return torch.where(master.isnan(), high.float(), master)


def to_bytes(remainder: torch.Tensor) -> torch.Tensor:
    """Return int16 remainders as uint8 with one more dimension of size 2, over the same memory.

    The backends of torch.distributed do not support int16.
    """
    return remainder.unsqueeze(-1).view(torch.uint8)


def from_bytes(remainder: torch.Tensor) -> torch.Tensor:
    """Return the remainders that `to_bytes` has turned into bytes."""
    return remainder.contiguous().view(torch.int16).squeeze(-1)


def join_to_even(high: torch.Tensor, remainder: torch.Tensor) -> torch.Tensor:
    """Return fp32 master weights that torch's rounding, with ties to even, rounds to `high`.

    They are those of `join`, except ties that torch would round to another value. These become the
    next fp32 value away from zero.

    Args:
        high: bfloat16 parameters.
        remainder: int16 or int8, of the same shape.
    """
    master = join(high, remainder)
    bits = master.view(torch.int32)
    is_kept = master.isnan() | (master.bfloat16() == high)
    return torch.where(is_kept, bits, bits + 1).view(torch.float32)


def remainder_of(
    master: torch.Tensor, high: torch.Tensor, dtype: torch.dtype = torch.int16
) -> torch.Tensor:
    """Return the remainders of fp32 master weights whose bfloat16 parameters are `high`.

    An int8 remainder rounds the master weight to nearest, with ties away from zero.

    `high` may differ from the master rounded by `split`. If torch has rounded it, ties that went to
    the lower even value get the nearest possible remainder. If the parameter is loaded later, its
    new value is not known here, and the remainder is that of the master alone.

    Args:
        master: float32.
        high: bfloat16, of the same shape.
        dtype: of the result, int16 or int8.
    """
    bits, upper = master.view(torch.int32), high.view(torch.int16).to(torch.int32)
    if dtype == torch.int8:
        bits, upper, tie = (bits + 2**7) >> 8, upper << 8, 2**7
    else:
        upper, tie = upper << 16, 2**15
    remainder = bits.to(dtype)  # keeps the low bits
    remainder = torch.where(bits - upper == tie, tie - 1, remainder)
    return torch.where(master.isnan(), 0, remainder).to(dtype)
