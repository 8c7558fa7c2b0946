"""Exposed time: the union of the optimizer's spans on the training thread, within the step."""

from __future__ import annotations

from offload_adam.profiling.exposed import exposed_spans
from offload_adam.spans import NO_BUCKET, Span


def spans(*members: tuple[str, int, int]) -> list[Span]:
    return [Span(name, NO_BUCKET, "MainThread", begin, end) for name, begin, end in members]


def test_the_optimizers_spans_are_merged_and_cut_to_the_step() -> None:
    found = exposed_spans(
        spans(
            ("gather", -4, 3),  # began in the step before
            ("data", 3, 5),
            ("forward", 5, 30),
            ("update wait", 10, 14),  # in a hook of forward
            ("backward", 30, 60),
            ("pack", 50, 52),
            ("step", 60, 90),
            ("reduce", 62, 70),  # in step()
            ("late rank", 90, 95),  # begins where step() ends
            ("loss", 95, 99),
            ("evaluation", 99, 100),
            ("all-reduce", 98, 130),
        ),
        110,
    )
    assert [(span.start_ns, span.end_ns) for span in found] == [
        (0, 3),
        (10, 14),
        (50, 52),
        (60, 95),
        (98, 110),
    ]
    assert {span.name for span in found} == {"exposed"}


def test_a_step_without_optimizer_has_none() -> None:
    assert exposed_spans(spans(("forward", 0, 10), ("backward", 10, 20)), 20) == []
