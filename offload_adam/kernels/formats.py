"""The element formats of gradients and parameters, and the NumPy dtypes that carry their bits."""

from __future__ import annotations

from enum import Enum

import numpy as np
import numpy.typing as npt


class FloatFormat(Enum):
    """One element format; the value is torch's name of the dtype.

    Numba has no bfloat16, and its float16 code is not vectorised. So 16-bit integers hold the bits
    of both: uint16 for bfloat16 and int16 for float16, which selects the code at compile time.
    """

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"

    @property
    def bits_dtype(self) -> np.dtype[np.generic]:
        """The NumPy dtype that carries the bits of this format to the kernels."""
        return np.dtype(_BITS_DTYPES[self.value])

    def dtype_tag(self) -> npt.NDArray[np.generic]:
        """Return an empty array whose dtype selects a kernel's specialisation."""
        return np.empty(0, dtype=self.bits_dtype)


_BITS_DTYPES: dict[str, type[np.generic]] = {
    "float32": np.float32,
    "bfloat16": np.uint16,
    "float16": np.int16,
}
