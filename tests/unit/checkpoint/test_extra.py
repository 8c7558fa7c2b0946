"""`extra` holds the states of torch's schedulers, samplers, generators and scalers, exactly."""

from __future__ import annotations

import inspect
import json
import random
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import SWALR

from offload_adam import CheckpointError, OffloadAdam, load_checkpoint, save_checkpoint
from offload_adam.checkpoint.format import MANIFEST_NAME, read_manifest, sealed
from tests.unit.test_encoding import bits


class Warmup:
    """A callable object. torch saves its attributes."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.seen: dict[int, float] = {}

    def __call__(self, epoch: int) -> float:
        self.seen[epoch] = min(1.0, (epoch + 1) / self.steps)
        return self.seen[epoch]


S: Any = schedulers
MAKERS: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: S.LambdaLR(o, Warmup(5)),
    "MultiplicativeLR": lambda o: S.MultiplicativeLR(o, lambda epoch: 0.9 + epoch / 100),
    "StepLR": lambda o: S.StepLR(o, 2),
    "MultiStepLR": lambda o: S.MultiStepLR(o, [2, 4, 4, 7]),
    "ConstantLR": lambda o: S.ConstantLR(o, 0.5, 5),
    "LinearLR": lambda o: S.LinearLR(o, 0.1, 1.0, 6),
    "ExponentialLR": lambda o: S.ExponentialLR(o, 0.9),
    "CosineAnnealingLR": lambda o: S.CosineAnnealingLR(o, 7, 0.01),
    "CosineAnnealingWarmRestarts": lambda o: S.CosineAnnealingWarmRestarts(o, 2, 2),
    "ReduceLROnPlateau": lambda o: S.ReduceLROnPlateau(o, patience=1, cooldown=1),
    "CyclicLR": lambda o: S.CyclicLR(o, 0.1, 1.0, 2, 3, cycle_momentum=False),
    "OneCycleLR": lambda o: S.OneCycleLR(o, 1.0, 12, cycle_momentum=False),
    "PolynomialLR": lambda o: S.PolynomialLR(o, 8, 2.0),
    "SequentialLR": lambda o: S.SequentialLR(
        o, [S.LinearLR(o, 0.1, 1.0, 2), S.MultiStepLR(o, [2, 4])], [2]
    ),
    "ChainedScheduler": lambda o: S.ChainedScheduler([S.LinearLR(o), S.MultiStepLR(o, [2, 5])]),
    "SWALR": lambda o: SWALR(o, 0.01, 6),
}


def run(scheduler: Any, optimizer: Optimizer, start: int, end: int) -> list[Any]:
    """Return the learning rate after each of some steps."""
    rates = []
    for epoch in range(start, end):
        optimizer.step()
        is_plateau = isinstance(scheduler, schedulers.ReduceLROnPlateau)
        scheduler.step(*([min(epoch, 3.0)] if is_plateau else []))
        rates.append(bits(optimizer.param_groups[0]["lr"]))
    return rates


def make(name: str, lr: Any = 0.7) -> tuple[nn.Module, OffloadAdam, Any]:
    model = nn.Linear(2, 1)
    optimizer = OffloadAdam(model.parameters(), lr=lr)
    model(torch.ones(2)).sum().backward()
    return model, optimizer, MAKERS[name](optimizer)


def test_every_scheduler_of_torch_is_tested() -> None:
    found = {
        name
        for name, kind in vars(schedulers).items()
        if inspect.isclass(kind)
        and issubclass(kind, schedulers.LRScheduler)
        and not name.startswith("_")
        and name != "LRScheduler"
    }
    assert found <= MAKERS.keys()


@pytest.mark.parametrize("name", MAKERS)
def test_a_resumed_schedule_equals_an_uninterrupted_one(name: str, tmp_path: Path) -> None:
    model, optimizer, scheduler = make(name)
    run(scheduler, optimizer, 0, 3)
    state = scheduler.state_dict()
    save_checkpoint(tmp_path / "c", model=model, optimizer=optimizer, extra={"scheduler": state})
    before = bits(state)
    expected = run(scheduler, optimizer, 3, 12)
    model, optimizer, scheduler = make(name)
    extra = load_checkpoint(tmp_path / "c", model=model, optimizer=optimizer)
    assert bits(extra["scheduler"]) == before
    scheduler.load_state_dict(extra["scheduler"])
    assert run(scheduler, optimizer, 3, 12) == expected


def test_generators_samplers_and_scalers(tmp_path: Path) -> None:
    scaler: Any = torch.amp.GradScaler("cpu", init_scale=3.0)
    scaler.scale(torch.ones(()))
    numpys = np.random.default_rng(3)
    own = torch.Generator().manual_seed(4)
    sampler = torch.utils.data.WeightedRandomSampler([1.0, 2.0], 5, generator=own)
    model = nn.Linear(2, 1)
    optimizer = OffloadAdam(model.parameters())
    extra = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "generator": numpys.bit_generator.state,
        "sampler": own.get_state(),
        "every device": [torch.get_rng_state()],
        "scaler": scaler.state_dict(),
        "weights": sampler.weights,
        5: "a key that is a number",
    }
    save_checkpoint(tmp_path / "c", model=model, optimizer=optimizer, extra=extra)  # type: ignore[arg-type]
    draws: list[Callable[[], Any]] = [
        lambda: torch.rand(3).tolist(),
        lambda: [random.gauss(0, 1) for _ in range(3)],
        lambda: np.random.standard_normal(3).tolist(),
        lambda: numpys.random(3).tolist(),
        lambda: list(sampler),
    ]
    expected = [draw() for draw in draws]
    found: Any = load_checkpoint(tmp_path / "c", model=model, optimizer=optimizer)
    assert bits(found) == bits(extra)
    torch.set_rng_state(found["torch"])
    random.setstate(found["python"])
    np.random.set_state(found["numpy"])
    numpys.bit_generator.state = found["generator"]
    own.set_state(found["sampler"])
    assert [draw() for draw in draws] == expected
    other: Any = torch.amp.GradScaler("cpu")
    other.load_state_dict(found["scaler"])
    assert bits(other.state_dict()) == bits(scaler.state_dict())


def test_a_value_that_cannot_be_saved_is_rejected_and_no_file_is_left(tmp_path: Path) -> None:
    model, optimizer, scheduler = make("StepLR")
    state = {**scheduler.state_dict(), "fn": [make]}
    with pytest.raises(CheckpointError, match=r"\['fn'\]\[0\] is of type function"):
        save_checkpoint(
            tmp_path / "c", model=model, optimizer=optimizer, extra={"scheduler": state}
        )
    optimizer.param_groups[0]["callback"] = make
    with pytest.raises(
        CheckpointError,
        match=r"^optimizer\['groups'\]\[0\]\['options'\]\['callback'\] is",
    ):
        save_checkpoint(tmp_path / "c", model=model, optimizer=optimizer)
    assert list(tmp_path.iterdir()) == []


def test_options_of_a_group_come_back_as_they_were(tmp_path: Path) -> None:
    model, optimizer, _ = make("StepLR")
    options = {"lr": torch.tensor(0.25), "tag": (1, float("inf")), "layers": {3: "a"}}
    optimizer.param_groups[0].update(options)
    save_checkpoint(tmp_path / "c", model=model, optimizer=optimizer)
    expected = {key: bits(v) for key, v in optimizer.param_groups[0].items() if key != "params"}
    model, optimizer, _ = make("StepLR")
    load_checkpoint(tmp_path / "c", model=model, optimizer=optimizer)
    found = {key: bits(v) for key, v in optimizer.param_groups[0].items() if key != "params"}
    assert {key: found[key] for key in expected} == expected


def test_a_dict_of_format_2_is_not_decoded(tmp_path: Path) -> None:
    model, optimizer, _ = make("StepLR")
    extra = {"mine": {"$type": "tuple", "items": [1]}}
    save_checkpoint(tmp_path / "c", model=model, optimizer=optimizer, extra=extra)
    assert load_checkpoint(tmp_path / "c", model=model, optimizer=optimizer) == extra
    values = read_manifest(tmp_path / "c").model_dump()
    del values["values"]
    values |= {"format_version": 2, "extra": extra}
    values["optimizer"]["groups"][0]["options"]["betas"] = [0.5, 0.75]
    text = sealed(json.loads(json.dumps(values)))
    (tmp_path / "c" / MANIFEST_NAME).write_text(text)
    assert load_checkpoint(tmp_path / "c", model=model, optimizer=optimizer) == extra
    assert optimizer.param_groups[0]["betas"] == (0.5, 0.75)


@pytest.mark.parametrize(("betas", "words"), [(5, "betas must be two numbers, not 5"), (None, "")])
def test_betas_of_format_2_may_be_missing_but_not_wrong(
    tmp_path: Path, betas: int | None, words: str
) -> None:
    model, optimizer, _ = make("StepLR")
    save_checkpoint(tmp_path / "c", model=model, optimizer=optimizer)
    values = read_manifest(tmp_path / "c").model_dump()
    options = values["optimizer"]["groups"][0]["options"]
    del values["values"], options["betas"]
    if betas is not None:
        options["betas"] = betas
    text = sealed({**values, "format_version": 2})
    (tmp_path / "c" / MANIFEST_NAME).write_text(text)
    with pytest.raises(CheckpointError, match=words) if words else nullcontext():
        load_checkpoint(tmp_path / "c", model=model, optimizer=optimizer)


def test_a_later_change_of_extra_does_not_reach_the_checkpoint(tmp_path: Path) -> None:
    from offload_adam import begin_checkpoint

    model, optimizer, _ = make("StepLR")
    extra: dict[str, Any] = {"history": [1], "state": torch.ones(1)}
    pending = begin_checkpoint(tmp_path / "c", model=model, optimizer=optimizer, extra=extra)
    extra["history"].append(2)
    extra["state"].zero_()
    pending.wait()
    found = load_checkpoint(tmp_path / "c", model=model, optimizer=optimizer)
    assert bits(found) == bits({"history": [1], "state": torch.ones(1)})
