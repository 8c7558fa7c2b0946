"""Read the batches and contenders that a command line names, separated by commas."""

from __future__ import annotations

from offload_adam.bench.training.contenders import CONTENDERS


def parse_batches(text: str) -> tuple[int, ...]:
    """Return numbers of sequences, none for an empty text.

    Raises:
        ValueError: naming the word that is not a whole number of at least 1.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    wrong = [word for word in words if not word.isdecimal() or int(word) < 1]
    if wrong:
        raise ValueError(f"batches must be numbers above 0, such as 48,144, not {', '.join(wrong)}")
    return tuple(int(word) for word in words)


def parse_contenders(text: str) -> tuple[str, ...]:
    """Return names of contenders, in the order given.

    Raises:
        ValueError: naming an unknown one, and those that exist.
    """
    names = [word.strip() for word in text.split(",") if word.strip()]
    unknown = [name for name in names if name not in CONTENDERS]
    if unknown or not names:
        raise ValueError(
            f"unknown contenders: {', '.join(unknown) or 'none given'}; choose from "
            + ", ".join(CONTENDERS)
        )
    return tuple(names)
