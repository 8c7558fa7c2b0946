"""8-bit codes of moments and master weights: their constants. See `adam_8bit_plain` for their use.

Codes are in blocks of 128 elements. Each block has two exponent bytes, e and q:

    exp_avg_sq   D * 2**(q - 127) * val(c)     val(c) is the float32 with the bits (768 + c) << 20
    exp_avg      sign * (a - 2**(e - 127))     a is the float32 with the bits
                                               (e << 23) + (magnitude << 19)

D is a float32 scale in [1, 2), one for each parameter. It decays by beta2 in every update. If it
falls below 1, the host multiplies it by a power of 2, and the update decreases q by the exponent of
this power. So codes do not decay, and only new gradients are rounded. All stored second moments
divided by D are exact in bfloat16.

val(c) has 5 bits of exponent and 3 bits of mantissa, from 2**-31 to 1.875. No code stands for 0: if
the second moment of an element were 0 and its first moment were not, its weight would change
without bound.

In the format "mixed", `exp_avg` is bfloat16, and e is not used.

This module imports neither Numba nor torch.
"""

from __future__ import annotations

EXP_AVG, EXP_AVG_SQ = range(2)
"""Columns of the table of exponents, (num_blocks, 2) uint8: e, which starts at 0, and q, which
starts at its smallest value."""

FIRST_CODE = 768
CODE_SHIFT = 20
"""val(c) is the float32 with the bits (FIRST_CODE + c) << CODE_SHIFT."""

TOP_CODE = 248
"""The first code of the highest octave. Each update sets q so that the largest code of the block is
in this octave. So q is a function of the values of the block, also after a load."""

SQ_MIN_EXPONENT, SQ_MAX_EXPONENT = 63, 227
"""Limits of q, for scales from 2**-64 to 2**100."""

AVG_MIN_EXPONENT = 8
"""The smallest e. The smallest magnitude above 0 is then 2**-123, which is not denormal."""

AVG_OCTAVES = 7
"""Octaves between 2**(e - 127) and the octave of the largest magnitude of a block. Magnitudes below
2**(e - 127) are evenly spaced."""

AVG_CARRY = 0x8FFFF
"""Added to the bits of the largest magnitude before its exponent is taken. The highest code is
247/256 of the octave's end, 0x770000 in the mantissa. Above it, the next e is used, so that no
magnitude saturates."""

AVG_SHIFT = 19
"""Bits of float32 that a magnitude drops; 4 bits of mantissa remain."""

MOST_LOST_OCTAVES = 64
"""If q would fall below its limit, the codes of the block fall instead, by 8 for each octave. After
this many octaves, nothing is left of them."""

LARGEST_MAGNITUDE = 127
SIGN_BIT = 128

GRADIENT_LIMIT = 2.0**30
"""Gradient elements above this magnitude count as 0. One such element would set the exponents of
its block so high that all other elements round to the smallest code."""
