"""Text and values of unknown content are shown on one screen, in bounded time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from offload_adam.checkpoint.format import LOAD_ANOTHER
from offload_adam.config import ConfigError, Mistake
from offload_adam.errors import CheckpointError
from offload_adam.printable import MAX_MESSAGE_LENGTH, printable, show


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, \u00e9 and \u65e5\u672c", "plain, \u00e9 and \u65e5\u672c"),
        ("two\n\tlines", "two\n\tlines"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("\x9b2J\x00\x07\r", "\\x9b2J\\x00\\x07\\r"),
        ("a\u202eb\u200b", "a\\u202eb\\u200b"),
        ("\ud800", "\\ud800"),
        ("", ""),
    ],
)
def test_characters_without_a_glyph_are_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown
    printable(text).encode()


def test_long_text_keeps_its_ends() -> None:
    text = "problem" + "x" * 1000 + "remedy"
    shown = printable(text, 50)
    assert len(shown) <= 50
    assert shown.startswith("problemx")
    assert shown.endswith("xremedy")
    assert printable("x" * 50, 50) == "x" * 50


class Broken:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


def bomb(levels: int) -> list[Any]:
    value: list[Any] = ["x"]
    for _ in range(levels):
        value = [value] * 9
    return value


@pytest.mark.parametrize(
    ("value", "part"),
    [
        (bomb(40), "[[["),
        ({"a": bomb(40)}, "{'a': [["),
        (10**5000, "too large to show"),
        ([10**5000], "too large to show"),
        (-(10**20), "-100000000000000000000"),
        ("a" * 10**6, "aaa...aaa"),
        (b"\x1b" * 10**6, "x1b"),
        ("\x1b\u202e", "'\\x1b\\u202e'"),
        (Broken(), "<Broken instance"),
        (torch.zeros(3, 4, device="meta"), "device='meta'"),
        (torch.zeros(4, dtype=torch.uint8).view(torch.bits8), "Tensor"),
        (torch.zeros(100, 100), "tensor([[0., "),
    ],
    ids=lambda value: type(value).__name__,
)
def test_any_value_is_shown_on_one_short_line(value: Any, part: str) -> None:
    shown = show(value)
    assert len(shown) <= 200
    assert "\n" not in shown
    assert shown.isprintable()
    assert part in shown


def test_errors_about_files_are_printable_and_short() -> None:
    error = CheckpointError(f"tensor {'x' * 10**6!r}\x1b[2J is damaged. {LOAD_ANOTHER}")
    assert len(str(error)) <= MAX_MESSAGE_LENGTH
    assert "\x1b" not in str(error)
    assert str(error).endswith(LOAD_ANOTHER)
    mistakes = [Mistake("a\x1b" * 1000, "x" * 1000) for _ in range(1000)]
    lines = str(ConfigError("file\x1b", mistakes)).split("\n")
    assert lines[0] == "file\\x1b: 1000 mistakes"
    assert lines[-1] == "  ... and 950 more"
    assert len(lines) == 52
    assert all(line.isprintable() for line in lines)
    assert max(map(len, lines)) <= 502
