"""Byte counts for people to read."""

from __future__ import annotations


def format_nbytes(nbytes: int) -> str:
    """Return a byte count with a binary unit, such as '1.50 GiB'."""
    value = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024.0:
            return f"{nbytes} B" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1024.0
    return f"{value:.2f} TiB"


_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}


def parse_nbytes(text: str) -> int:
    """Return the bytes of a text such as '80GiB', '512 GB' or '1e9'.

    Raises:
        ValueError: it is no number with one of these units, or below 0.
    """
    stripped = text.strip().lower()
    number = stripped.rstrip("abcdefghijklmnopqrstuvwxyz").strip()
    unit = stripped[len(number) :].strip()
    try:
        nbytes = float(number) * _UNITS[unit]
        if not 0 <= nbytes < float("inf"):
            raise ValueError
    except (KeyError, ValueError):
        raise ValueError(
            f"{text!r} is no size: write a number and a unit such as 80GiB or 512GB"
        ) from None
    return int(nbytes)
