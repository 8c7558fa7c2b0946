"""Byte counts and numbers of parameters as text."""

from __future__ import annotations


def format_nbytes(nbytes: int) -> str:
    """Return a byte count with a binary unit, such as '1.50 GiB'."""
    value = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024.0:
            return f"{nbytes} B" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1024.0
    return f"{value:.2f} TiB"


def format_count(count: int) -> str:
    """Return a number of parameters or tokens with three digits, such as '11.8 B' or '124 M'."""
    if count < 1000:
        return str(count)
    value = float(count)
    for unit in ("K", "M", "B"):
        value /= 1000.0
        if float(f"{value:.3g}") < 1000.0:
            return f"{value:#.3g}".rstrip(".") + f" {unit}"
    value /= 1000.0
    return f"{value:,.0f} T" if value >= 100 else f"{value:#.3g} T"
