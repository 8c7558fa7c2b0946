"""Shows text and values of unknown content in messages: on any terminal, and of bounded length."""

from __future__ import annotations

import reprlib

MAX_MESSAGE_LENGTH = 4000
"""Characters of an error message, which may quote a file."""
_MAX_VALUE_LENGTH = 200


def printable(text: str, limit: int | None = None) -> str:
    """Return text with escaped control characters, cut in the middle to `limit` characters.

    A control character could move the cursor or hide text: ESC becomes \\x1b. The same goes for
    other characters without a glyph, such as those that reverse the direction of writing, and for
    lone surrogates, which cannot be written as UTF-8. Line breaks and tabs are kept.
    """
    if not text.isprintable():
        text = "".join(
            character
            if character.isprintable() or character in "\n\t"
            else character.encode("unicode_escape").decode("ascii")
            for character in text
        )
    if limit is None or len(text) <= limit:
        return text
    half = (limit - 5) // 2
    return f"{text[:half]} ... {text[-half:]}"  # the end often says what to do


def show(value: object) -> str:
    """Return the `repr` of a value on one line, cut to a few items, levels and characters.

    The work is bounded, too, for a list that contains another one many times. A value whose `repr`
    fails is shown by its type.
    """
    return printable(_REPR.repr(value).replace("\n", " "), _MAX_VALUE_LENGTH)


class _Repr(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxstring = self.maxlong = self.maxother = _MAX_VALUE_LENGTH

    def repr_int(self, x: int, level: int) -> str:
        # Python converts at most 4,300 digits to text by default.
        return super().repr_int(x, level) if x.bit_length() < 4096 else "an int too large to show"


_REPR = _Repr()
