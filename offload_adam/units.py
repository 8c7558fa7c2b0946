"""Byte counts, times and numbers of parameters as text."""

from __future__ import annotations


def format_nbytes(nbytes: int) -> str:
    """Return a byte count with a binary unit, such as '1.50 GiB'."""
    value = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024.0:
            return f"{nbytes} B" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1024.0
    return f"{value:.2f} TiB"


def format_seconds(seconds: float) -> str:
    """Return a time with four digits, such as '3.958 s' or '18.2 ms'."""
    return f"{seconds:.4g} s" if seconds >= 1 else f"{1e3 * seconds:.4g} ms"


def format_count(count: float) -> str:
    """Return a count with three digits and a unit, such as '10.8 M'; below 1,000 as it is."""
    for unit in ("", " K", " M", " B"):
        text = f"{count:.3g}"
        if float(text) < 1000:  # 999,999 is '1 M', not '1e+03 K'
            return text + unit
        count /= 1000
    return f"{count:,.3g} T"
