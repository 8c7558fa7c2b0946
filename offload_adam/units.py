"""Byte counts as text."""

from __future__ import annotations


def format_nbytes(nbytes: int) -> str:
    """Return a byte count with a binary unit, such as '1.50 GiB'."""
    value = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024.0:
            return f"{nbytes} B" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1024.0
    return f"{value:.2f} TiB"
