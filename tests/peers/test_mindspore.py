"""Our `Adam` beside the real `mindspore.nn.Adam`, element by element."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from offload_adam import Adam
from offload_adam import schedules as our_schedules
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

pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(
        importlib.util.find_spec("mindspore") is None, reason="mindspore is not installed"
    ),
]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, npt.NDArray[Any]]:
    path = tmp_path_factory.mktemp("mindspore") / "results.npz"
    subprocess.run(
        [sys.executable, "-m", "tests.peers.run_mindspore", str(path)],
        cwd=path.parent,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=True,
        timeout=500,
        capture_output=True,
    )
    return dict(np.load(path))


def run_ours(case: Case) -> dict[str, npt.NDArray[np.float32]]:
    parameters = {
        name: torch.nn.Parameter(torch.from_numpy(value)) for name, value in initial(case).items()
    }
    rate = case.rate
    if isinstance(rate, list) and isinstance(rate[0], str):
        rate = getattr(our_schedules, rate[0])(*rate[1:])
    params: list[Any] = list(parameters.items())
    if case.groups:
        params = [
            {"params": [(name, parameters[name]) for name in names], **options}
            for names, options in grouped_names(case)
        ]
    optimizer = Adam(params, rate, epsilon_hat=True, **case.options)
    names = {id(parameter): name for name, parameter in parameters.items()}
    for step in range(NUM_STEPS):
        if case.sparse:
            rows, values = rows_and_values(step)
            gradient = torch.sparse_coo_tensor(
                torch.from_numpy(rows)[None].long(), torch.from_numpy(values), TABLE
            )
            optimizer((gradient,))
        else:
            found = dense_gradients(case, step)
            given = (torch.from_numpy(found[names[id(p)]]) for p in optimizer.parameters)
            optimizer(tuple(given))
    return {name: parameter.detach().numpy() for name, parameter in parameters.items()}


@pytest.mark.filterwarnings("ignore:weight_decay acts")
@pytest.mark.parametrize("name", sorted(CASES))
def test_the_weights_are_mindspores(name: str, theirs: Mapping[str, npt.NDArray[Any]]) -> None:
    assert f"{name}/error" not in theirs, theirs[f"{name}/error"]
    for key, value in run_ours(CASES[name]).items():
        expected = theirs[f"{name}/{key}"]
        # Both are fp32. A step rounds the weight once, 2**-24 of it, and the direction a few times,
        # 2**-24 of the learning rate each; MindSpore also keeps its powers of beta in fp32, whose
        # complement 1 - b2^t at the first steps, 0.001 to 0.005, is off by up to 2**-24 / 0.001.
        rate = 0.05
        tolerance = NUM_STEPS * (2.0**-24 * (np.abs(expected) + 8 * rate) + rate * 2.0**-15)
        worst = float((np.abs(value - expected) / tolerance).max())
        assert worst <= 1.0, (key, worst)
