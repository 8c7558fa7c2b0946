"""Compile the kernels of each dtype into the cache: `python -m tests.gpu.warm_up`."""

from __future__ import annotations

import torch

from offload_adam import OffloadAdam

DTYPES = (torch.bfloat16, torch.float32, torch.float16)


def warm_up(device: str) -> None:
    """Construct a streaming optimizer for each dtype; this compiles its kernels."""
    for dtype in DTYPES:
        model = torch.nn.Linear(64, 64, device=device, dtype=dtype)
        OffloadAdam(model.parameters(), module=model).close()


if __name__ == "__main__":
    warm_up("cuda" if torch.cuda.is_available() else "cpu")
