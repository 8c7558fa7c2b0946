"""Runs of a transformers Trainer, alone or as one of several ranks, and what they leave."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from offload_adam import OffloadAdamW
from offload_adam.integrations import OffloadAdamCallback
from tests.integrations.language_model import EPS, LR, Texts, forget_accelerator, make_model

NUM_STEPS = 6
GLOBAL_BATCH = 4
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}
"""For ranks: without it, Accelerate sets the number of torch's threads."""


@dataclass(frozen=True)
class Run:
    """One call of `Trainer.train`.

    optimizer: "drop-in", "streaming", or "torch" for torch.optim.AdamW.
    made_by: "trainer": passed as a class with arguments. "caller": passed as an object.
    callback: pass an OffloadAdamCallback, with `checkpoint` as its argument.
    options: of the optimizer.
    arguments: of TrainingArguments, over the defaults here.
    accumulate: backwards in a step; the batch of a step stays the same.
    """

    optimizer: str = "drop-in"
    made_by: str = "trainer"
    options: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    accumulate: int = 1
    dtype: torch.dtype = torch.float32
    dropout: float = 0.0
    callback: bool = True
    checkpoint: Path | None = None


@dataclass(frozen=True)
class Result:
    """What a run leaves: `state` is the full state on rank 0, empty elsewhere and for torch."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, torch.Tensor]
    state: dict[str, Any]


def train(rank: int, world_size: int, folder: Path, run: Run, resume: str | None = None) -> Result:
    """Train with Trainer in `folder`; `resume` is the name of a checkpoint in it."""
    trainer = make_trainer(world_size, folder, run)
    trainer.train(resume_from_checkpoint=None if resume is None else str(folder / resume))
    return result_of(trainer)


def make_trainer(
    world_size: int, folder: Path, run: Run, more: tuple[TrainerCallback, ...] = ()
) -> Trainer:
    forget_accelerator()
    set_seed(11)
    arguments = TrainingArguments(
        **{
            "output_dir": str(folder),
            "per_device_train_batch_size": GLOBAL_BATCH // (world_size * run.accumulate),
            "gradient_accumulation_steps": run.accumulate,
            "max_steps": NUM_STEPS,
            "save_steps": 3,
            "logging_steps": 1,
            "use_cpu": True,
            "ddp_backend": "gloo" if world_size > 1 else None,
            "ddp_find_unused_parameters": False,
            "disable_tqdm": True,
            "report_to": [],
            **run.arguments,
        }
    )
    model = make_model(run.dtype, run.dropout)
    options: dict[str, Any] = {"lr": LR, "eps": EPS, "weight_decay": 0.1, **run.options}
    cls: type[torch.optim.Optimizer] = OffloadAdamW
    if run.optimizer == "torch":
        cls = torch.optim.AdamW
    elif run.optimizer == "streaming":
        options["module"] = model
    passed: dict[str, Any] = {"optimizer_cls_and_kwargs": (cls, options)}
    if run.made_by == "caller":
        passed = {"optimizers": (cls(model.parameters(), **options), None)}
    ours = run.callback and run.optimizer != "torch"
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=Texts(),
        eval_dataset=Texts(),
        callbacks=[*([OffloadAdamCallback(run.checkpoint)] if ours else []), *more],
        **passed,
    )


def result_of(trainer: Trainer) -> Result:
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    optimizer = trainer.optimizer.optimizer
    state = optimizer.full_state_dict() if isinstance(optimizer, OffloadAdamW) else {}
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    return Result(
        [entry["loss"] for entry in history],
        [float(entry["grad_norm"]) for entry in history],
        weights,
        state,
    )


def assert_equal(found: Any, expected: Any, name: str = "") -> None:
    """Check that two nestings of values are the same to the bit."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), name
        for key in expected:
            assert_equal(found[key], expected[key], f"{name}/{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), name
        for number, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_equal(one, other, f"{name}/{number}")
    elif isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype, name
        assert torch.equal(found, expected), name
    else:
        assert found == expected, name


def assert_close(found: Result, expected: Result, atol: float = 2e-6) -> None:
    """Check that two runs have the same losses, gradient norms and weights but for rounding."""
    assert len(found.losses) == len(expected.losses)
    torch.testing.assert_close(found.losses, expected.losses, atol=atol, rtol=0)
    torch.testing.assert_close(found.norms, expected.norms, atol=10 * atol, rtol=1e-5)
    torch.testing.assert_close(found.weights, expected.weights, atol=atol, rtol=0)


class Recorder(TrainerCallback):
    """Keeps the full state on rank 0 when training begins and at each save. Collective."""

    def __init__(self) -> None:
        self.begun: dict[str, Any] = {}
        self.saved: dict[int, dict[str, Any]] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.begun = given["optimizer"].optimizer.full_state_dict()

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.saved[state.global_step] = given["optimizer"].optimizer.full_state_dict()


def record(
    rank: int, world_size: int, folder: Path, run: Run, resume: str | None = None
) -> tuple[Result, Recorder]:
    """Train as `train` does, and also return the states on the way."""
    recorder = Recorder()
    trainer = make_trainer(world_size, folder, run, more=(recorder,))
    trainer.train(resume_from_checkpoint=None if resume is None else str(folder / resume))
    return result_of(trainer), recorder
