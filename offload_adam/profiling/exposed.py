"""Finds the exposed time of a step, in which the training thread does not work on the model.

training   | forward | update wait | forward | backward | reduce | agree |
exposed              |-------------|                    |----------------|
"""

from __future__ import annotations

from collections.abc import Iterable

from offload_adam.profiling.phases import EXPOSED, PHASES, Resource
from offload_adam.spans import NO_BUCKET, Span

_MODEL = (Resource.COMPUTE, Resource.DATA)


def exposed_spans(spans: Iterable[Span], end_ns: int) -> list[Span]:
    """Return the time from 0 to `end_ns` that the optimizer takes of a training thread.

    Time in a hook of the optimizer, within forward or backward, counts. On a GPU, kernels of the
    model that were launched before may run meanwhile.

    Args:
        spans: of the training thread, without those of whole steps.
    """
    found: list[Span] = []
    for span in sorted(spans, key=lambda span: span.start_ns):
        of_optimizer = span.name == "step" or (
            span.name in PHASES and PHASES[span.name].resource not in _MODEL
        )
        start_ns, stop_ns = max(span.start_ns, 0), min(span.end_ns, end_ns)
        if not of_optimizer or stop_ns <= start_ns:
            continue
        if found and start_ns <= found[-1].end_ns:
            found[-1] = found[-1]._replace(end_ns=max(found[-1].end_ns, stop_ns))
        else:
            found.append(Span(EXPOSED, NO_BUCKET, span.thread, start_ns, stop_ns))
    return found
