"""Moments in 8-bit codes: blocks of 128 elements with one exponent byte each.

    exp_avg       sign, and 7 bits of magnitude: linear near 0, then 16 steps an octave (mu-law)
                  |m| = c0 * (16 + low 4 bits) / 16 * 2**(high 3 bits) - c0,  c0 = 2**(e - 127)
    exp_avg_sq    5 bits of exponent and 3 of mantissa, without zero: 32 octaves, 8 steps each
                  v = scale * 2**(e - 127) * 2**(high 5 bits - 31) * (8 + low 3 bits) / 8

e is the exponent byte of a block. `scale` is one float64 of a parameter, in [1, 2). It decays with
beta2 in every update, so the decay of a second moment is exact, and only what gradients add to it
is rounded. If the codes themselves decayed, their error would double after a fall of the gradients.

Both decode to exact bfloat16 values, a second moment if it is divided by `scale`. These values are
what checkpoints and state dicts hold. So saved state does not depend on blocks, and any rank of any
world can encode its part of it again. The result is exact if a block has the elements that it had.
If the blocks change, as with FSDP2 on another mesh, a first moment is rounded to the new block's
steps, and a second moment below 2**-31 of its block's scale becomes that bound.

Source: ITU-T G.711 (mu-law).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from offload_adam.kernels.codes import (
    AVG_CARRY,
    AVG_MIN_EXPONENT,
    AVG_OCTAVES,
    AVG_SHIFT,
    CODE_SHIFT,
    FIRST_CODE,
    LARGEST_MAGNITUDE,
    SQ_MAX_EXPONENT,
    SQ_MIN_EXPONENT,
)
from offload_adam.layout.flat import BLOCK_NUMEL, blocks_of

_CHUNK_NUMEL = 2**14
"""Elements that are converted at once: so few that temporary tensors stay in the cache."""

_END = 2.0 ** (SQ_MAX_EXPONENT - 126)
"""All values that may be encoded are smaller, 2**101."""

_SQ_STEPS = 8  # of an octave
_AVG_STEPS = 16
_BIAS = 127  # of a float32's exponent


@dataclass(frozen=True, slots=True)
class CodedMoment:
    """A flat moment in codes, which reads and copies as if it were a bfloat16 tensor.

    codes: (n,) uint8.
    exponents: (blocks of n,) uint8, a column.
    is_squared: it is a second moment, and its values are divided by the parameter's scale.
    """

    codes: torch.Tensor
    exponents: torch.Tensor
    is_squared: bool

    dtype = torch.bfloat16
    """Of its values."""

    def __getitem__(self, part: slice) -> CodedMoment:
        """Return a part that starts at a whole block, without a copy."""
        start, stop, _ = part.indices(self.numel())
        assert start % BLOCK_NUMEL == 0 or start >= stop, "a part must start at a whole block"
        first = start // BLOCK_NUMEL
        exponents = self.exponents[first : first + blocks_of(max(stop - start, 0))]
        return CodedMoment(self.codes[part], exponents, self.is_squared)

    def numel(self) -> int:
        """Return the number of elements."""
        return self.codes.numel()

    def element_size(self) -> int:
        """Return the bytes of a value."""
        return self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        return self.numel() * self.dtype.itemsize

    @property
    def device(self) -> torch.device:
        """The device of the codes."""
        return self.codes.device

    def values(self) -> torch.Tensor:
        """Return the values, (n,) bfloat16."""
        whole = torch.empty(self.numel(), dtype=self.dtype, device="cpu")
        for part, values in zip(whole.split(_CHUNK_NUMEL), self.chunks(), strict=False):
            part.copy_(values)
        return whole

    def chunks(self) -> Iterator[torch.Tensor]:
        """Yield the values in order, in parts of at most 32 KiB."""
        decode = _decode_second if self.is_squared else _decode_first
        for part in self._parts():
            yield decode(_blocks(part.codes), part.exponents)[: part.numel()]

    def copy_(self, values: torch.Tensor) -> bool:
        """Encode values, rounded to nearest.

        Args:
            values: (n,) of any floating dtype and device, or a 0-d tensor.

        Returns:
            Whether the codes have exactly these values.

        Raises:
            ValueError: see `check_storable`. Values before a wrong one have been encoded.
        """
        is_exact = True
        encode = _encode_second if self.is_squared else _encode_first
        values = values.expand(self.codes.shape) if values.dim() == 0 else values.reshape(-1)
        for start, part in zip(range(0, self.numel(), _CHUNK_NUMEL), self._parts(), strict=True):
            given = values[start : start + part.numel()].to("cpu", torch.float32)
            check_storable("The moment", given, is_squared=self.is_squared)
            codes, exponents = encode(_blocks(given))
            part.codes.copy_(codes[: part.numel()])
            part.exponents.copy_(exponents)
            # A comparison of each part until one differs.
            is_exact = is_exact and torch.equal(part.values().float(), given)
        return is_exact

    def _parts(self) -> Iterator[CodedMoment]:
        for start in range(0, self.numel(), _CHUNK_NUMEL):
            yield self[start : start + _CHUNK_NUMEL]


def check_storable(what: str, values: torch.Tensor, *, is_squared: bool) -> None:
    """Check that codes can represent all values of a moment.

    Args:
        what: name of the values, for the error message.
        is_squared: it is a second moment.

    Raises:
        ValueError: a value is not finite, too large, or a negative second moment.
    """
    if values.numel() == 0:
        return
    smallest, largest = map(float, torch.aminmax(values))
    if not (smallest > -_END and largest < _END):  # NaN is not smaller, either
        raise ValueError(
            f"{what} has values that are not finite, or too large for 8-bit codes. Load another "
            "state, or, if they are finite, use state_format='bf16'."
        )
    if is_squared and smallest < 0:
        raise ValueError(f"{what} has negative values, but it is a second moment.")


Plane = torch.Tensor | CodedMoment
"""A flat plane of state."""


def values_of(plane: Plane) -> torch.Tensor:
    """Return the elements of a plane: itself, or the decoded values."""
    return plane.values() if isinstance(plane, CodedMoment) else plane


def _blocks(flat: torch.Tensor) -> torch.Tensor:
    """Return (blocks, 128) of a flat tensor, padded with zeros."""
    padding = -flat.numel() % BLOCK_NUMEL
    return torch.nn.functional.pad(flat, (0, padding)).view(-1, BLOCK_NUMEL)


def _decode_first(codes: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    exponent_bits = exponents.to(torch.int32).unsqueeze(1) << 23
    magnitudes = (codes & LARGEST_MAGNITUDE).to(torch.int32) << AVG_SHIFT
    smallest = exponent_bits.view(torch.float32)
    values = (exponent_bits + magnitudes).view(torch.float32) - smallest
    return torch.where(codes > LARGEST_MAGNITUDE, -values, values).bfloat16().view(-1)


def _encode_first(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode (blocks, 128) float32; return (n,) codes and (blocks,) exponents."""
    largest = values.abs().amax(dim=1).view(torch.int32) + AVG_CARRY >> 23
    exponents = (largest - AVG_OCTAVES).clamp(min=AVG_MIN_EXPONENT).to(torch.uint8)
    codes = _first_codes(values, exponents)
    # The largest value may have been rounded down past the point where a smaller exponent is used.
    # The block is then exact only with the exponent with which it was encoded. Values that are not
    # bfloat16 had no codes.
    had_codes = ~(values.view(torch.int32) & 0xFFFF).bool().any(dim=1)
    tried = (had_codes & ~_is_exact(codes, exponents, values)).nonzero().view(-1)
    larger = (exponents[tried] + 1).to(torch.uint8)
    other_codes = _first_codes(values[tried], larger)
    better = _is_exact(other_codes, larger, values[tried])
    codes[tried[better]], exponents[tried[better]] = other_codes[better], larger[better]
    return codes.view(-1), exponents


def _is_exact(codes: torch.Tensor, exponents: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return for each block whether the codes of a first moment have exactly these values."""
    return (_decode_first(codes, exponents).view_as(values) == values).all(dim=1)


def _first_codes(values: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    wide = exponents.to(torch.int32).unsqueeze(1)
    sums = (values.abs() + (wide << 23).view(torch.float32)).view(torch.int32)
    magnitudes = ((sums + (1 << (AVG_SHIFT - 1))) >> AVG_SHIFT) - _AVG_STEPS * wide
    signs = torch.signbit(values).to(torch.uint8) << 7
    return magnitudes.to(torch.uint8) | signs


def _decode_second(codes: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    shifts = exponents.to(torch.int32).unsqueeze(1) - _BIAS
    bits = (codes.to(torch.int32) + FIRST_CODE << CODE_SHIFT) + (shifts << 23)
    return bits.view(torch.float32).bfloat16().view(-1)


def _encode_second(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode (blocks, 128) float32; return (n,) codes and (blocks,) exponents."""
    bits = values.view(torch.int32)
    rounded = (bits + (1 << (CODE_SHIFT - 1))) >> CODE_SHIFT
    exponents = (rounded.amax(dim=1) >> 3).clamp(SQ_MIN_EXPONENT, SQ_MAX_EXPONENT)
    lowest = FIRST_CODE + _SQ_STEPS * (exponents - _BIAS)
    codes = (rounded - lowest.unsqueeze(1)).clamp(0, 255)
    return codes.to(torch.uint8).view(-1), exponents.to(torch.uint8)
