"""What is run through MindSpore's Adam and through ours: plain values, known to both processes.

Two modes are left out, because MindSpore's CPU backend was seen to depart from its documentation:
rows that occur twice (it sums the entries for exp_avg, and the squares of the entries for
exp_avg_sq; a lazy update it makes twice), and centralization (it has no kernel for it, and leaves
alone whatever has a second dimension that is no multiple of 16).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

NUM_STEPS = 5
SHAPES = {
    "dense.weight": (6, 4),
    "dense.bias": (6,),
    "norm.gamma": (6,),
    "conv.weight": (3, 2, 2, 2),
}
TABLE = (8, 3)

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Case:
    """One run of `NUM_STEPS` steps.

    options: arguments of both optimizers.
    rate: a number, a list, or a schedule's name and its positional arguments.
    groups: options by the names that begin with a prefix; the rest is a group of its own.
    sparse: the one parameter is a table, and its gradients are rows.
    """

    options: dict[str, Any] = field(default_factory=dict)
    rate: Any = 0.02
    groups: dict[str, dict[str, Any]] = field(default_factory=dict)
    sparse: bool = False


CASES: dict[str, Case] = {
    "plain": Case(),
    "betas": Case({"beta1": 0.8, "beta2": 0.95, "eps": 1e-6}),
    "nesterov": Case({"use_nesterov": True}),
    "amsgrad": Case({"use_amsgrad": True}, rate=0.05),
    "weight_decay": Case({"weight_decay": 0.1}),
    "loss_scale": Case({"loss_scale": 128.0, "weight_decay": 0.1}),
    "groups": Case(
        {"weight_decay": 0.2},
        groups={"dense": {"lr": 0.05, "weight_decay": 0.1}, "norm": {"weight_decay": 0.0}},
    ),
    "lazy_dense": Case({"use_lazy": True}),
    "offload": Case({"use_offload": True, "weight_decay": 0.1}),
    "vector": Case(rate=[0.05, 0.04, 0.03, 0.02, 0.01]),
    "exponential": Case(rate=["ExponentialDecayLR", 0.05, 0.5, 2]),
    "exponential_stair": Case(rate=["ExponentialDecayLR", 0.05, 0.5, 2, True]),
    "natural": Case(rate=["NaturalExpDecayLR", 0.05, 0.3, 2]),
    "natural_stair": Case(rate=["NaturalExpDecayLR", 0.05, 0.3, 2, True]),
    "inverse": Case(rate=["InverseDecayLR", 0.05, 0.5, 2]),
    "inverse_stair": Case(rate=["InverseDecayLR", 0.05, 0.5, 2, True]),
    "cosine": Case(rate=["CosineDecayLR", 0.001, 0.05, 3]),
    "polynomial": Case(rate=["PolynomialDecayLR", 0.05, 0.001, 3, 0.5]),
    "polynomial_longer": Case(rate=["PolynomialDecayLR", 0.05, 0.001, 2, 2.0, True]),
    "warm_up": Case(rate=["WarmUpLR", 0.05, 3]),
    "sparse": Case(sparse=True),
    "sparse_lazy": Case({"use_lazy": True}, sparse=True),
    "sparse_decay": Case({"weight_decay": 0.1}, sparse=True),
}


def initial(case: Case) -> dict[str, Array]:
    """Return the parameters by name."""
    random = np.random.default_rng(0)
    shapes = {"table": TABLE} if case.sparse else SHAPES
    return {name: random.normal(size=s).astype(np.float32) for name, s in shapes.items()}


def dense_gradients(case: Case, step: int) -> dict[str, Array]:
    """Return one step's gradients by name, multiplied by the loss scale."""
    random = np.random.default_rng(100 + step)
    scale = case.options.get("loss_scale", 1.0)
    return {
        name: (scale * random.normal(size=shape)).astype(np.float32)
        for name, shape in SHAPES.items()
    }


def rows_and_values(step: int) -> tuple[npt.NDArray[np.int32], Array]:
    """Return the entries of the table's gradient, each row at most once."""
    random = np.random.default_rng(200 + step)
    rows = random.choice(TABLE[0], 4, replace=False).astype(np.int32)
    return rows, random.normal(size=(4, TABLE[1])).astype(np.float32)


def grouped_names(case: Case) -> list[tuple[list[str], dict[str, Any]]]:
    """Return the names of each group with its options; one without options where there are none."""
    names = list(initial(case))
    taken: list[tuple[list[str], dict[str, Any]]] = []
    rest = names
    for prefix, options in case.groups.items():
        taken.append(([name for name in names if name.startswith(prefix)], options))
        rest = [name for name in rest if not name.startswith(prefix)]
    return [*taken, (rest, {})] if rest else taken
