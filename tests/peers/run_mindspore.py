"""Runs every case through the real `mindspore.nn.Adam` on its CPU backend.

    python -m tests.peers.run_mindspore RESULT.npz

A process of its own: two libraries' OpenMP and the graph compiler stay out of the tests' way.
"""

from __future__ import annotations

import sys
from typing import Any

import mindspore
import numpy as np
from mindspore import Parameter, Tensor, nn
from mindspore.common.sparse_tensor import RowTensorInner

from tests.peers.adam_cases import (
    CASES,
    NUM_STEPS,
    TABLE,
    Case,
    dense_gradients,
    grouped_names,
    initial,
    rows_and_values,
)


class SparseStep(nn.Cell):  # type: ignore[misc]
    """Hands rows to the optimizer: a graph is the only place where MindSpore makes them."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__()
        self.optimizer = optimizer

    def construct(self, rows: Any, values: Any) -> Any:
        """Take one step."""
        return self.optimizer((RowTensorInner(rows, values, TABLE),))


def run(case: Case) -> dict[str, Any]:
    """Return the parameters after all steps."""
    parameters = {n: Parameter(Tensor(v), name=n) for n, v in initial(case).items()}
    rate = case.rate
    if isinstance(rate, list) and isinstance(rate[0], str):
        rate = getattr(nn, rate[0])(*rate[1:])
    params: list[Any] = list(parameters.values())
    if case.groups:
        params = [
            {"params": [parameters[name] for name in names], **options}
            for names, options in grouped_names(case)
        ]
    optimizer = nn.Adam(params, learning_rate=rate, **case.options)
    if case.sparse:
        sparse = SparseStep(optimizer)
        for step in range(NUM_STEPS):
            rows, values = rows_and_values(step)
            sparse(Tensor(rows), Tensor(values))
    else:
        for step in range(NUM_STEPS):
            found = dense_gradients(case, step)
            optimizer(tuple(Tensor(found[p.name]) for p in optimizer.parameters))
    return {name: parameter.asnumpy() for name, parameter in parameters.items()}


def main(path: str) -> None:
    """Write every case's parameters as `case/name`, or `case/error`."""
    mindspore.set_context(mode=mindspore.GRAPH_MODE)
    mindspore.set_device("CPU")
    results: dict[str, Any] = {"version": np.array(mindspore.__version__)}
    for name, case in CASES.items():
        try:
            results |= {f"{name}/{key}": value for key, value in run(case).items()}
        except Exception as error:
            results[f"{name}/error"] = np.array(f"{type(error).__name__}: {error}")
    np.savez(path, **results)


if __name__ == "__main__":
    main(sys.argv[1])
