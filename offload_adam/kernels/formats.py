"""The formats that gradients and parameters may have, and how NumPy carries their bits."""

from __future__ import annotations

from enum import Enum

import numpy as np
import numpy.typing as npt


class FloatFormat(Enum):
    """One element format, by torch's name for the dtype.

    Numba has neither bfloat16 nor a float16 that vectorises, so both travel as 16-bit integers. The
    signedness tells the two apart at compile time: unsigned is bfloat16, signed is float16.
    """

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"

    @property
    def carrier(self) -> np.dtype[np.generic]:
        """The NumPy dtype in which the kernels see the bits of this format."""
        return np.dtype(_CARRIERS[self.value])

    @property
    def itemsize(self) -> int:
        """Bytes an element."""
        return int(self.carrier.itemsize)

    def tag(self) -> npt.NDArray[np.generic]:
        """Return an empty array whose dtype selects a kernel's specialisation."""
        return np.empty(0, dtype=self.carrier)


_CARRIERS: dict[str, type[np.generic]] = {
    "float32": np.float32,
    "bfloat16": np.uint16,
    "float16": np.int16,
}
