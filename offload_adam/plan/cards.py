"""The memory of GPUs by name: what CUDA offers to programs, which is less than the name says."""

from __future__ import annotations

import difflib
import re

_GIB = 2**30
# `torch.cuda.get_device_properties(0).total_memory` in GiB. Where drivers and boards differ, the
# smallest.
_USABLE_GIB = {
    "A10": 22.0,
    "A10G": 22.0,
    "A100-40GB": 39.4,
    "A100-80GB": 79.1,
    "A40": 44.3,
    "B200": 178.3,
    "H100": 79.1,
    "H100-NVL": 93.0,
    "H200": 139.7,
    "L4": 22.0,
    "L40S": 44.4,
    "RTX-3090": 23.6,
    "RTX-4090": 23.6,
    "RTX-5090": 31.3,
    "RTX-A6000": 47.4,
    "RTX-6000-Ada": 47.4,
    "T4": 14.5,
    "V100-16GB": 15.7,
    "V100-32GB": 31.7,
}
CARDS = {name: int(size * _GIB) for name, size in _USABLE_GIB.items()}
"""Usable bytes of each card."""


def find_card(text: str) -> tuple[str, int]:
    """Return the name and the usable bytes of a card.

    Args:
        text: a name in `CARDS`, in any case and with spaces or hyphens or none.

    Raises:
        ValueError: no card has this name, or several do.
    """

    def plain(name: str) -> str:
        return "".join(c for c in name.lower() if c.isalnum())

    names = {plain(name): name for name in CARDS}
    text = re.sub(r"^\s*(nvidia\s*)?(geforce\s*)?", "", text[:100], flags=re.IGNORECASE)
    wanted = plain(text)
    # "H100 80GB" is the H100, of which the list has one size.
    without_size = plain(re.sub(r"[\s-][0-9]+\s*gi?b$", "", text, flags=re.IGNORECASE))
    for exact in (wanted, without_size):
        if exact in names:
            return names[exact], CARDS[names[exact]]
    sizes = [names[key] for key in names if wanted and key.startswith(wanted)]
    if len(sizes) == 1:
        return sizes[0], CARDS[sizes[0]]
    if sizes:
        raise ValueError(f"--gpu {text}: say which one, {' or '.join(sizes)}")
    near = [names[key] for key in difflib.get_close_matches(wanted, names, n=3)]
    hint = f"did you mean {' or '.join(near)}? Otherwise " if near else ""
    raise ValueError(
        f"--gpu {text[:100]} is not a known card: {hint}give --gpu-memory with its size, such as "
        f"80GB. Known are {', '.join(CARDS)}"
    )
