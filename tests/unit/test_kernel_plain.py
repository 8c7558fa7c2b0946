"""The plain loop and the IR kernel: the same bits for every format, and one function chooses."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from offload_adam.kernels import adam, adam_bf16_ir, adam_ir, adam_plain, sparse
from offload_adam.kernels.adam import Float32Array
from offload_adam.kernels.compilation import jit_inlined
from offload_adam.kernels.formats import FloatFormat
from tests.unit.kernel_cases import (
    MODES,
    CarriedArray,
    HostState,
    Segment,
    displaced,
    random_segments,
    random_state,
    rows,
    run_update,
)
from tests.unit.kernel_subprocess import ONE_UPDATE, run_python

NUMEL = 1000  # not a multiple of 16: the IR kernel updates the last elements singly
PARAM_FORMATS = (None, FloatFormat.BFLOAT16, FloatFormat.FLOAT16)
FORMATS = [
    (gradient, param, (row + column) % 2 == 1)
    for (row, gradient), (column, param) in itertools.product(
        enumerate(FloatFormat), enumerate(PARAM_FORMATS)
    )
]
"""All pairs of formats; both values of amsgrad occur with each single format."""

plain_range = jit_inlined(adam_plain.update_range)

needs_ir = pytest.mark.skipif(
    not adam_ir.supports_ir(), reason="this machine uses the plain loop only"
)


def updated_by_ir(
    before: HostState, gradient: CarriedArray, scalars: Float32Array, source: FloatFormat
) -> HostState:
    after = before.copied(offset=3)  # the IR kernel updates the first elements singly, too
    run_update(after, [Segment(gradient, 0)], scalars.reshape(1, -1), source, num_pieces=1)
    return after


def updated_by_plain(before: HostState, gradient: CarriedArray, scalars: Float32Array) -> HostState:
    after = before.copied()
    plain_range(
        gradient,
        after.master,
        None,
        after.exp_avg,
        after.exp_avg_sq,
        after.max_exp_avg_sq,
        after.param_out,
        0,
        0,
        scalars,
        None,
        0,
    )
    return after


def make_extreme(state: HostState, gradient: CarriedArray, source: FloatFormat) -> None:
    """Put denormal and infinite moments, and gradients whose squares overflow, side by side."""
    tiny = np.float32(2.0**-130)
    state.exp_avg[0:200:2], state.exp_avg[1:200:2] = tiny, -tiny
    state.exp_avg_sq[100:300] = tiny
    state.exp_avg_sq[250:400] = np.inf
    state.master[350:450] = 0.0
    if state.max_exp_avg_sq is not None:
        state.max_exp_avg_sq[200:280] = tiny
        state.max_exp_avg_sq[280:320] = np.inf
    if source is not FloatFormat.FLOAT16:
        # 1e30 as float32, and its upper half as bfloat16.
        huge = np.full(100, 1e30, dtype=np.float32)
        narrow = (huge.view(np.uint32) >> 16).astype(np.uint16)
        gradient[380:480] = narrow if source is FloatFormat.BFLOAT16 else huge


@needs_ir
@pytest.mark.parametrize(("source", "param_format", "amsgrad"), FORMATS)
def test_both_loops_compute_the_same_bits(
    source: FloatFormat, param_format: FloatFormat | None, amsgrad: bool
) -> None:
    for number, (mode, hyper) in enumerate(MODES.items()):
        rng = np.random.default_rng(number)
        (segment,) = random_segments(rng, (NUMEL,), source)
        gradient = displaced(segment.gradient, number % 2)
        before = random_state(rng, NUMEL, param_format, amsgrad=amsgrad)
        make_extreme(before, gradient, source)
        (scalars,) = rows((hyper, 3, 0.37))
        ir = updated_by_ir(before, gradient, scalars, source)
        plain = updated_by_plain(before, gradient, scalars)
        assert np.any(plain.master != before.master)
        assert np.all(np.isfinite(plain.master))
        for name in ("master", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "param_out"):
            one, other = getattr(ir, name), getattr(plain, name)
            assert (one is None) == (other is None)
            if one is not None:
                bits = f"u{one.itemsize}"
                np.testing.assert_array_equal(one.view(bits), other.view(bits), f"{mode}: {name}")


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        ("x86_64", True),
        ("AMD64", True),
        ("aarch64", True),
        ("arm64", True),
        ("ppc64le", False),
        ("riscv64", False),
        ("s390x", False),
        ("", False),
    ],
)
def test_the_architecture_decides(
    machine: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    assert adam_ir.supports_ir() is expected


def test_the_dense_and_the_sparse_kernel_share_the_chosen_loop() -> None:
    chosen = adam_ir if adam_ir.supports_ir() else adam_plain
    assert adam._float32_range.py_func is chosen.update_range
    chosen = adam_bf16_ir if adam_ir.supports_ir() else adam_plain
    assert adam._bfloat16_range.py_func is chosen.update_range
    assert vars(sparse)["update_range"] is adam.update_range


def test_the_plain_loop_updates_a_table_where_it_is_chosen(tmp_path: Path) -> None:
    # A cache of its own: in the usual one the architecture tells the two choices apart.
    chosen, weight = run_python(
        "from offload_adam.kernels import adam_ir\n"
        "adam_ir.supports_ir = lambda: False\n"
        + ONE_UPDATE
        + "run_one_update(); print(adam._float32_range.py_func.__module__, weight[0])",
        NUMBA_CACHE_DIR=str(tmp_path),
    ).split()
    assert chosen == "offload_adam.kernels.adam_plain"
    assert float(weight) == pytest.approx(-0.1)
