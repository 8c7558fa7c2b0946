"""The arguments of torch's Adam and AdamW, and of `torch.nn.utils.clip_grad_norm_`."""

from __future__ import annotations

import inspect
import io
import logging
import math
from typing import Any

import numpy as np
import pytest
import torch

from offload_adam import Adam, FailurePolicy, OffloadAdam, OffloadAdamW, OffloadPolicy
from offload_adam.schedules import ExponentialDecayLR
from tests.support.reference import bits

OURS: list[Any] = [OffloadAdam, OffloadAdamW]
PAIRS = [(OffloadAdam, torch.optim.Adam), (OffloadAdamW, torch.optim.AdamW)]


def pair() -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    values = torch.linspace(-1.0, 1.0, 7, dtype=torch.float32, device="cpu")
    return torch.nn.Parameter(values.clone()), torch.nn.Parameter(values.clone())


def set_gradient(parameter: torch.nn.Parameter, step: int) -> None:
    parameter.grad = (parameter.detach() * 0.5 + 0.25 * step).clone()


@pytest.mark.parametrize(("ours", "torchs"), PAIRS)
def test_the_arguments_are_those_of_torch(ours: type, torchs: type) -> None:
    accepted = inspect.signature(ours).parameters
    given = inspect.signature(torchs).parameters
    positional = [n for n, p in given.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == list(accepted)[: len(positional)]
    # decoupled_weight_decay is what tells OffloadAdamW from OffloadAdam.
    for name in given.keys() - {"params"}:
        assert (accepted[name].default, accepted[name].kind) == (
            given[name].default,
            given[name].kind,
        )


@pytest.mark.parametrize(("ours", "torchs"), PAIRS)
def test_weight_decay_is_that_of_the_class_that_it_replaces(ours: Any, torchs: Any) -> None:
    parameter, reference = pair()
    optimizers = [
        ours([parameter], 1e-2, (0.8, 0.9), 1e-6, 0.3),
        torchs([reference], 1e-2, (0.8, 0.9), 1e-6, 0.3),
    ]
    for step in range(20):
        for optimizer, of in zip(optimizers, (parameter, reference), strict=True):
            set_gradient(of, step)
            optimizer.step()
    torch.testing.assert_close(parameter, reference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", OURS)
def test_options_of_torchs_kernels_have_no_effect(
    kind: Any, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = pair()
    with caplog.at_level(logging.INFO, logger="offload_adam.optimizer"):
        off = dict.fromkeys(("foreach", "fused", "capturable", "differentiable"))
        kind([pair()[0]], **off)
        kind([pair()[0]], **dict.fromkeys(off, False))
        assert not [r for r in caplog.records if r.name == "offload_adam.optimizer"]
        plain = kind([first], lr=0.1)
        chosen = kind([{"params": [second], "fused": True}], lr=0.1, foreach=True)
    (record,) = [r for r in caplog.records if r.name == "offload_adam.optimizer"]
    assert record.getMessage() == (
        "Ignoring foreach=True and fused=True: updates run in kernels of this package"
    )
    assert chosen.param_groups[0]["foreach"] is True
    for step in range(3):
        for optimizer, parameter in ((plain, first), (chosen, second)):
            set_gradient(parameter, step)
            optimizer.step()
    assert bits([first]) == bits([second])


@pytest.mark.parametrize(
    ("name", "reason"),
    [("capturable", "no CUDA graph can capture"), ("differentiable", "autograd cannot follow")],
)
def test_options_that_cannot_work_are_rejected(name: str, reason: str) -> None:
    words = f"{name}=True is not supported, because {reason}.* Leave {name} out"
    parameter, other = pair()
    for kind in OURS:
        with pytest.raises(ValueError, match=words):
            kind([parameter], **{name: True})
        with pytest.raises(ValueError, match=words):
            kind([{"params": [parameter], name: True}])
        with pytest.raises(TypeError, match=f"{name} must be a bool or None, not 1"):
            kind([parameter], **{name: 1})
    optimizer = OffloadAdamW([parameter])
    with pytest.raises(ValueError, match=words):
        optimizer.add_param_group({"params": [other], name: True})
    before = bits([parameter])
    set_gradient(parameter, 1)
    optimizer.param_groups[0][name] = True
    with pytest.raises(ValueError, match=words):
        optimizer.step()
    optimizer.param_groups[0][name] = False
    assert bits([parameter]) == before
    optimizer.step()
    assert bits([parameter]) != before


@pytest.mark.parametrize("options", [{"fused": True}, {"capturable": True}, {"foreach": True}])
def test_a_state_dict_of_torch_does_not_bring_its_kernels(options: dict[str, Any]) -> None:
    parameter, reference = pair()
    theirs = torch.optim.AdamW([reference], lr=0.05, fused=options.get("fused"))
    set_gradient(reference, 0)
    theirs.step()
    saved = theirs.state_dict()
    saved["param_groups"][0].update(options)
    with torch.no_grad():
        parameter.copy_(reference)
    optimizer = OffloadAdamW([parameter])
    optimizer.load_state_dict(saved)
    group = optimizer.param_groups[0]
    assert [group[name] for name in ("foreach", "fused", "capturable", "differentiable")] == [
        *(None, None),
        *(False, False),
    ]
    for step in range(3):
        for one, of in ((optimizer, parameter), (theirs, reference)):
            set_gradient(of, step)
            one.step()
    torch.testing.assert_close(parameter, reference, rtol=1e-5, atol=1e-6)
    # The other way round: torch finds the options that it needs.
    torch.optim.AdamW([reference]).load_state_dict(optimizer.full_state_dict())


def test_numbers_of_numpy_give_the_bits_of_pythons() -> None:
    first, second = pair()
    lr, eps = np.float32(0.1), np.float16(1e-3)
    options: dict[str, Any] = {
        "betas": (np.float32(0.75), np.float64(0.5)),
        "max_grad_norm": np.float32(0.5),
        "num_threads": np.int64(1),
        "offload": OffloadPolicy(bucket_nbytes=np.int32(4096), offload_fraction=np.float32(1.0)),  # type: ignore[arg-type]
        "failures": FailurePolicy(dead_after=np.float32(5.0), stuck_after=np.int64(60)),  # type: ignore[arg-type]
    }
    given = OffloadAdam([first], lr, eps=eps, weight_decay=np.int64(1), **options)  # type: ignore[arg-type]
    plain = OffloadAdam(
        [second],
        float(lr),
        (0.75, 0.5),
        float(eps),
        1,
        max_grad_norm=0.5,
        num_threads=1,
        offload=OffloadPolicy(bucket_nbytes=4096),
    )
    for step in range(4):
        factor = np.float32(0.5**step)
        given.param_groups[0]["lr"] = lr * factor  # as a schedule in NumPy does
        plain.param_groups[0]["lr"] = float(lr * factor)
        for optimizer, parameter in ((given, first), (plain, second)):
            set_gradient(parameter, step)
            optimizer.step()
    assert bits([first]) == bits([second])
    group = given.param_groups[0]
    stored = [group["lr"], group["eps"], *group["betas"], given.max_grad_norm]
    assert [type(value) for value in stored] == [float] * 5
    assert type(group["weight_decay"]) is int
    # torch.load reads no NumPy number by default.
    file = io.BytesIO()
    torch.save(given.state_dict(), file)
    file.seek(0)
    assert torch.load(file)["param_groups"][0]["lr"] == float(lr * np.float32(0.125))


def test_numbers_of_numpy_in_a_loaded_state_become_pythons() -> None:
    parameter, _ = pair()
    optimizer = OffloadAdam([parameter])
    saved = optimizer.state_dict()
    saved["param_groups"][0].update(lr=np.float32(0.5), betas=(np.float64(0.5), 0.75))
    optimizer.load_state_dict(saved)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"]) == (0.5, (0.5, 0.75))
    assert [type(value) for value in (group["lr"], *group["betas"])] == [float] * 3


@pytest.mark.parametrize("value", [True, np.True_, torch.tensor(True), torch.tensor(1j), "1", None])
def test_what_is_not_a_number_is_rejected(value: Any) -> None:
    parameter, _ = pair()
    with pytest.raises(TypeError, match=r"lr must be a number, not"):
        OffloadAdam([parameter], lr=value)
    with pytest.raises(TypeError, match=r"betas\[1\] must be a number, not"):
        OffloadAdam([parameter], betas=(0.9, value))
    optimizer = OffloadAdam([parameter])
    set_gradient(parameter, 1)
    with pytest.raises(TypeError, match="max_norm must be a number, not"):
        optimizer.clip_grad_norm_(value)


def test_the_specified_adam_takes_shared_options_and_schedules_of_numpy() -> None:
    """Its own arguments follow the specification, which wants Python's floats."""
    parameter, _ = pair()
    decay = ExponentialDecayLR(np.float32(0.5), 0.5, np.int64(2))  # type: ignore[arg-type]
    optimizer = Adam([parameter], decay, max_grad_norm=np.float32(1.0))  # type: ignore[arg-type]
    set_gradient(parameter, 0)
    optimizer.step()
    (saved,) = optimizer.state_dict()["offload_adam"]["dynamic"]
    values = [saved["lr"]["schedule"][name] for name in ("learning_rate", "decay_steps")]
    assert [(value, type(value)) for value in values] == [(0.5, float), (2, int)]
    for name in ("beta1", "eps", "loss_scale"):
        own: dict[str, Any] = {name: np.float32(0.5)}
        with pytest.raises(TypeError, match=f"{name} must be a"):
            Adam([parameter], **own)


def clipped_pair(max_norm: Any) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Return our norm, torch's norm, and both parameters after a clipped step."""
    parameter, reference = pair()
    optimizer = OffloadAdam([parameter], lr=0.1, eps=1.0)
    theirs = torch.optim.Adam([reference], lr=0.1, eps=1.0)
    set_gradient(parameter, 3)
    set_gradient(reference, 3)
    found = optimizer.clip_grad_norm_(max_norm)
    expected = torch.nn.utils.clip_grad_norm_([reference], max_norm)
    optimizer.step()
    theirs.step()
    return found, expected, [parameter, reference]


@pytest.mark.parametrize(
    "max_norm",
    [0.25, 1, np.float32(0.25), torch.tensor(0.25), torch.tensor([0.25], dtype=torch.float64)],
)
def test_clip_grad_norm_takes_torchs_limits(max_norm: Any) -> None:
    found, expected, (parameter, reference) = clipped_pair(max_norm)
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    torch.testing.assert_close(parameter, reference, rtol=1e-6, atol=1e-7)


def test_clip_grad_norm_has_torchs_signature() -> None:
    accepted = inspect.signature(OffloadAdam.clip_grad_norm_).parameters
    given = inspect.signature(torch.nn.utils.clip_grad_norm_).parameters
    names = list(given)[1:-1]  # without `parameters` and `foreach`
    assert list(accepted)[1:] == names
    assert [accepted[name].default for name in names] == [given[name].default for name in names]


@pytest.mark.parametrize("norm_type", [1, 3.0, math.inf, np.float32(1.0)])
def test_clip_grad_norm_rejects_other_norms(norm_type: Any) -> None:
    parameter, _ = pair()
    optimizer = OffloadAdam([parameter])
    set_gradient(parameter, 1)
    with pytest.raises(ValueError, match=r"norm_type must be 2\.0, not .*module="):
        optimizer.clip_grad_norm_(0.5, norm_type)
    with pytest.raises(TypeError, match="norm_type must be a number, not 'inf'"):
        optimizer.clip_grad_norm_(0.5, "inf")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="error_if_nonfinite must be a bool, not 1"):
        optimizer.clip_grad_norm_(0.5, error_if_nonfinite=1)  # type: ignore[arg-type]
    assert float(optimizer.clip_grad_norm_(0.5, np.int64(2))) > 0.5  # type: ignore[arg-type]
    optimizer.step()
    report = optimizer.last_step
    assert report is not None
    assert report.clip_factor == pytest.approx(0.5 / report.total_norm, rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_clip_grad_norm_rejects_non_finite_norms_if_asked(bad: float) -> None:
    parameter, reference = pair()
    optimizer = OffloadAdam([parameter])
    for of in (parameter, reference):
        set_gradient(of, 1)
        assert of.grad is not None
        of.grad[2] = bad
    with pytest.raises(RuntimeError, match="non-finite"):
        torch.nn.utils.clip_grad_norm_([reference], 1.0, error_if_nonfinite=True)
    with pytest.raises(RuntimeError, match=r"norm of the gradients is (nan|inf), so they cannot"):
        optimizer.clip_grad_norm_(1.0, error_if_nonfinite=True)
    before = bits([parameter])
    assert not math.isfinite(optimizer.clip_grad_norm_(1.0))
    optimizer.step()
    assert optimizer.last_step is not None
    assert optimizer.last_step.skipped
    assert bits([parameter]) == before
    set_gradient(parameter, 1)
    assert math.isfinite(optimizer.clip_grad_norm_(1.0, 2.0, True))
