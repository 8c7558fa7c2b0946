"""Sizes, speeds, numbers of parameters and shares, as people write them."""

from __future__ import annotations

import math
import re

from offload_adam.printable import show

_FACTORS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
_SIZE = re.compile(r"[0-9]+(\.[0-9]+)? ?([kmgtp]i?)?b", re.IGNORECASE | re.ASCII)
_COUNT = re.compile(r"\s*([0-9][0-9_]*(?:\.[0-9]*)?(?:e\+?[0-9]+)?)\s*([kmbt]?)\s*", re.IGNORECASE)


def parse_nbytes(option: str, text: str) -> int:
    """Return the bytes of a size such as '80GiB' or '512 GB'.

    Raises:
        ValueError: the text is not a number of at least 0 with a unit that pydantic knows, or the
            size has more than 63 bits.
    """
    from pydantic import ByteSize, TypeAdapter

    from offload_adam.config.declared import MAX_NBYTES

    if re.search(r"[0-9] ?[KMGTP]b$", text.strip(), re.ASCII):
        raise ValueError(f"{option} {show(text)}: a unit in b could mean bits: write B for bytes")
    if _is_number(text):
        raise ValueError(
            f"{option} {show(text)} has no unit: write {text.strip()[:30]}GB or "
            f"{text.strip()[:30]}GiB"
        )
    try:
        if not _SIZE.fullmatch(text.strip()):  # pydantic ignores what follows a size
            raise ValueError
        nbytes = float(TypeAdapter(ByteSize).validate_python(text.strip()))
        if not 0 <= nbytes <= MAX_NBYTES:
            raise ValueError
    except ValueError:
        raise ValueError(
            f"{option} {show(text)} is not a size below 2**63 bytes: give a number and a unit, "
            "such as 80GiB or 512GB"
        ) from None
    return int(nbytes)


def parse_speed(option: str, text: str) -> float:
    """Return the 1e9 bytes a second of a speed such as '400GB/s' or '400Gbit/s'.

    Raises:
        ValueError: the text is not a speed, or its unit could mean bits or bytes.
    """
    amount, slash, second = text.strip().rpartition("/")
    bits = amount.lower().endswith("bit")
    size = amount[:-3] + "B" if bits else amount
    try:
        if slash == "" or second != "s":
            raise ValueError
        return parse_nbytes(option, size) / (8e9 if bits else 1e9)
    except ValueError as error:
        unclear = ". A unit in b could mean bits or bytes" if "in b could" in str(error) else ""
        raise ValueError(
            f"{option} {show(text)}: write a speed such as 50GB/s, or 400Gbit/s for a "
            f"network{unclear}"
        ) from None


def parse_count(option: str, text: str) -> int:
    """Return a number such as '7B', '350M', '1.3e9' or '124_000_000'.

    Raises:
        ValueError: the text is not such a number.
    """
    matched = _COUNT.fullmatch(text) if len(text) <= 100 else None
    if matched is None:
        raise ValueError(
            f"{option} {show(text)} is not a number: write one such as 7B, 350M or 7e9"
        )
    number = float(matched[1].replace("_", "")) * _FACTORS[matched[2].lower()]
    if not math.isfinite(number):
        raise ValueError(f"{option} {show(text)} is too large")
    return round(number)


def parse_share(option: str, text: str) -> float:
    """Return a share such as '1%' or '0.01'.

    Raises:
        ValueError: the text is not a share above 0 and up to 1.
    """
    number = text.strip()
    factor = 0.01 if number.endswith("%") else 1.0
    try:
        share = float(number.removesuffix("%")) * factor
    except ValueError:
        share = math.nan
    if not 0 < share <= 1:
        raise ValueError(
            f"{option} {show(text)} is not a share above 0 and up to 1: write 1% or 0.01"
        )
    return share


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
