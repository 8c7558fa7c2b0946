"""The optimizers in a transformers Trainer on one rank: equal to torch's AdamW, and resumed."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import TrainerCallback

from offload_adam import CheckpointError, OffloadAdamW, load_checkpoint
from offload_adam.integrations import OffloadAdamCallback
from tests.integrations.language_model import make_model
from tests.integrations.trainer_runs import (
    Recorder,
    Run,
    assert_close,
    assert_equal,
    make_trainer,
    record,
    result_of,
    train,
)
from tests.unit.overlap.lazy_worker import Lazy

CASES = {
    "made by Trainer": Run(),
    "made by the caller": Run(made_by="caller"),
    "streaming": Run("streaming", made_by="caller"),
    "clipping": Run(arguments={"max_grad_norm": 0.2}),
    "streaming and clipping": Run("streaming", "caller", arguments={"max_grad_norm": 0.2}),
    "no clipping": Run(arguments={"max_grad_norm": 0.0}),
    "accumulation": Run(accumulate=2),
    "gradient checkpointing": Run(arguments={"activation_checkpointing": True}),
    "autocast to bf16": Run(arguments={"bf16": True}),
    "epochs": Run(arguments={"save_strategy": "epoch", "num_train_epochs": 1, "max_steps": -1}),
    "cosine with warmup": Run(arguments={"lr_scheduler_type": "cosine", "warmup_steps": 2}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_run_equals_torch_and_resumes_to_the_same_bits(name: str, tmp_path: Path) -> None:
    run = CASES[name]
    ours = train(0, 1, tmp_path / "ours", run)
    with_torch = Run("torch", run.made_by, arguments=run.arguments, accumulate=run.accumulate)
    # Rounding to bf16 turns differences of 1e-8 into some of 1e-3.
    tolerance = 1e-3 if run.arguments.get("bf16") else 2e-6
    assert_close(ours, train(0, 1, tmp_path / "torch", with_torch), tolerance)
    if name == "epochs":
        return  # the only checkpoint is that of the end
    resumed = train(0, 1, tmp_path / "ours", run, resume="checkpoint-3")
    assert_equal(resumed.losses, ours.losses)
    assert_equal(resumed.weights, ours.weights)
    assert_equal(resumed.state, ours.state)


@pytest.mark.parametrize("state_format", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("callback", [True, False])
def test_bf16_weights_and_dropout_resume_to_the_same_bits(
    tmp_path: Path, state_format: str, callback: bool
) -> None:
    options = {"state_format": state_format}
    run = Run(dtype=torch.bfloat16, dropout=0.2, callback=callback, options=options)
    whole = train(0, 1, tmp_path, run)
    resumed = train(0, 1, tmp_path, run, resume="checkpoint-3")
    assert_equal(resumed.losses, whole.losses)
    assert_equal(resumed.weights, whole.weights)
    assert_equal(resumed.state, whole.state)


def test_trainer_itself_saves_the_state_of_one_rank(tmp_path: Path) -> None:
    whole = train(0, 1, tmp_path, Run(callback=False))
    assert not states_in(tmp_path / "checkpoint-3")
    for callback in (False, True):
        resumed = train(0, 1, tmp_path, Run(callback=callback), resume="checkpoint-3")
        assert_equal(resumed.weights, whole.weights)
        assert_equal(resumed.state, whole.state)


def test_the_state_of_torch_is_resumed(tmp_path: Path) -> None:
    whole = train(0, 1, tmp_path, Run("torch"))
    assert_close(train(0, 1, tmp_path, Run(), resume="checkpoint-3"), whole)


def test_torch_resumes_the_full_state_of_a_resumed_run(tmp_path: Path) -> None:
    whole = train(0, 1, tmp_path, Run())
    _, recorder = record(0, 1, tmp_path, Run(), resume="checkpoint-3")
    torch.save(recorder.begun, tmp_path / "checkpoint-3" / "optimizer.pt")
    assert_close(train(0, 1, tmp_path, Run("torch"), resume="checkpoint-3"), whole)


def test_torch_rejects_a_reference(tmp_path: Path) -> None:
    train(0, 1, tmp_path, Run())
    with pytest.raises(ValueError, match=r"different number of parameter groups"):
        train(0, 1, tmp_path, Run("torch"), resume="checkpoint-3")


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    arguments = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "best",
        "metric_for_best_model": "loss",
        "load_best_model_at_end": True,
        "save_total_limit": 1,
        "learning_rate": 0.3,
    }
    run = Run("streaming", options={"lr": 0.3}, arguments=arguments)
    recorder = Recorder()
    trainer = make_trainer(1, tmp_path, run, more=(recorder,))
    trainer.train()
    best = trainer.state.best_global_step
    folder = Path(trainer.state.best_model_checkpoint)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [folder.name]
    assert folder.name == f"checkpoint-{best}"
    saved = safetensors.torch.load_file(folder / "model.safetensors")
    for name, value in saved.items():
        assert torch.equal(trainer.model.state_dict()[name], value), name
    # From here, training goes on with the loaded weights and the state of the best step.
    _, resumed = record(0, 1, tmp_path, run, resume=folder.name)
    assert_equal(resumed.begun, recorder.saved[best])


def test_only_the_model_is_saved_on_request(tmp_path: Path) -> None:
    train(0, 1, tmp_path, Run(arguments={"save_only_model": True}))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-6"]
    assert not states_in(tmp_path / "checkpoint-3")


class Reader(TrainerCallback):
    """Reads the optimizer and the parameters in an event."""

    def __init__(self, event: str) -> None:
        self.states: list[dict[str, Any]] = []
        self.parameters: dict[str, torch.Tensor] = {}
        setattr(self, event, self._read)

    def _read(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.states.append(given["optimizer"].state_dict())
        named = given["model"].named_parameters()
        self.parameters = {name: parameter.detach().clone() for name, parameter in named}


@pytest.mark.parametrize(
    ("event", "arguments"),
    [("on_save", {"save_only_model": True}), ("on_train_end", {"save_strategy": "no"})],
)
def test_state_dict_holds_the_state_when_nothing_is_saved(
    event: str, arguments: dict[str, Any], tmp_path: Path
) -> None:
    reader = Reader(event)
    trainer = make_trainer(1, tmp_path, Run(arguments=arguments), more=(reader,))
    trainer.train()
    expected = trainer.optimizer.optimizer.full_state_dict()["state"]
    for found in (reader.states[-1], trainer.optimizer.state_dict()):
        assert found["state"].keys() == expected.keys()


def test_updates_are_over_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OffloadAdamW, "_backend", Lazy._backend)
    run = Run("streaming", "caller", {"overlap": True}, {"save_strategy": "no"})
    trainer = make_trainer(1, tmp_path, run)
    reader = Reader("on_train_end")
    trainer.callback_handler.callbacks.insert(0, reader)
    trainer.train()
    expected = trainer.model.state_dict()  # waits for updates
    for name, found in reader.parameters.items():
        assert torch.equal(found, expected[name]), name


def test_a_checkpoint_that_is_saved_again_holds_one_state(tmp_path: Path) -> None:
    train(0, 1, tmp_path, Run())
    before = states_in(tmp_path / "checkpoint-6")
    train(0, 1, tmp_path, Run(), resume="checkpoint-3")
    after = states_in(tmp_path / "checkpoint-6")
    assert len(before) == len(after) == 1
    assert before != after


class Stop(TrainerCallback):
    """Ends training with an error in an event of step 6.

    Args:
        event: a method of TrainerCallback. "on_save" comes after Trainer has written checkpoint-6
            and has deleted older ones.
    """

    def __init__(self, event: str) -> None:
        setattr(self, event, self._stop)

    def _stop(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if state.global_step == 6:
            raise KeyboardInterrupt


def kill(folder: Path, run: Run, event: str, *, first: bool = True) -> None:
    """Train until the event of step 6, where this package's callback is called later."""
    trainer = make_trainer(1, folder, run)
    trainer.callback_handler.callbacks.insert(0 if first else 99, Stop(event))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()


def test_a_run_that_is_killed_during_a_save_resumes(tmp_path: Path) -> None:
    run = Run(arguments={"save_total_limit": 1, "max_steps": 9})
    whole = train(0, 1, tmp_path / "whole", run)
    kill(tmp_path / "killed", run, "on_save")
    assert [path.name for path in (tmp_path / "killed").glob("check*")] == ["checkpoint-6"]
    assert not states_in(tmp_path / "killed" / "checkpoint-6")
    last = str(tmp_path / "killed" / "checkpoint-6")
    trainer = make_trainer(1, tmp_path / "elsewhere", run)
    trainer.train(resume_from_checkpoint=last)
    for resumed in (
        result_of(trainer),
        train(0, 1, tmp_path / "killed", run, resume="checkpoint-6"),
    ):
        assert_equal(resumed.weights, whole.weights)
        assert_equal(resumed.state, whole.state)
    assert not pending_in(tmp_path / "killed")


def test_a_later_run_keeps_the_state_of_a_killed_one(tmp_path: Path) -> None:
    run = Run(arguments={"max_steps": 9})
    whole = train(0, 1, tmp_path / "whole", run)
    kill(tmp_path / "killed", run, "on_save")
    # It saves checkpoints of other steps.
    other = Run(arguments={"max_steps": 5, "save_steps": 1})
    train(0, 1, tmp_path / "killed", other, resume="checkpoint-3")
    resumed = train(0, 1, tmp_path / "killed", run, resume="checkpoint-6")
    assert_equal(resumed.weights, whole.weights)
    assert_equal(resumed.state, whole.state)


def test_a_killed_run_whose_checkpoint_was_renamed_resumes(tmp_path: Path) -> None:
    run = Run(arguments={"max_steps": 9})
    whole = train(0, 1, tmp_path / "whole", run)
    kill(tmp_path / "killed", run, "on_save")
    (tmp_path / "killed" / "checkpoint-6").rename(tmp_path / "killed" / "good")
    for _ in range(2):  # the first one saves a checkpoint
        resumed = train(0, 1, tmp_path / "killed", run, resume="good")
        assert_equal(resumed.state, whole.state)


def test_states_without_a_checkpoint_are_removed(tmp_path: Path) -> None:
    kill(tmp_path, Run(), "on_step_end", first=False)
    (state,) = pending_in(tmp_path)
    state.rename(state.with_name(f"{state.name}.0-0-0.partial"))
    kill(tmp_path, Run(), "on_step_end", first=False)
    assert [path.suffix for path in pending_in(tmp_path)] == [""]
    (tmp_path / "checkpoint-3").rename(tmp_path / "kept")
    train(0, 1, tmp_path, Run(arguments={"save_strategy": "no"}))
    assert not pending_in(tmp_path)


class Cancel(TrainerCallback):
    """Cancels the save of step 3."""

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        control.should_save &= state.global_step != 3


def test_the_state_of_a_cancelled_save_is_removed(tmp_path: Path) -> None:
    make_trainer(1, tmp_path, Run(), more=(Cancel(),)).train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-6"]


def test_a_moved_checkpoint_is_found(tmp_path: Path) -> None:
    whole = train(0, 1, tmp_path / "old", Run())
    (tmp_path / "kept").mkdir()
    moved = (tmp_path / "old" / "checkpoint-3").rename(tmp_path / "kept" / "good")
    expected = (
        r"none of .*checkpoint-3.*\. If the checkpoint was moved or renamed, pass its path to the "
        r"callback: OffloadAdamCallback\(checkpoint=path\)\. Otherwise copy a checkpoint with all "
    )
    with pytest.raises(CheckpointError, match=expected):
        train(0, 1, tmp_path / "kept", Run(), resume="good")
    named = Run(arguments={"resume_from_checkpoint": str(moved)})
    for run in (Run(checkpoint=moved), named):
        assert_equal(train(0, 1, tmp_path / "kept", run, resume="good").state, whole.state)


def test_a_run_resumes_in_another_output_dir_and_after_this_was_moved(tmp_path: Path) -> None:
    whole = train(0, 1, tmp_path / "old", Run())
    trainer = make_trainer(1, tmp_path / "other", Run())
    trainer.train(resume_from_checkpoint=str(tmp_path / "old" / "checkpoint-3"))
    assert_equal(result_of(trainer).state, whole.state)
    (tmp_path / "old").rename(tmp_path / "new")
    assert_equal(train(0, 1, tmp_path / "new", Run(), resume="checkpoint-3").state, whole.state)


def test_a_checkpoint_without_its_state_is_rejected(tmp_path: Path) -> None:
    train(0, 1, tmp_path, Run())
    shutil.rmtree(states_in(tmp_path / "checkpoint-3")[0])
    with pytest.raises(CheckpointError, match=r"Otherwise copy a checkpoint with all"):
        train(0, 1, tmp_path, Run(), resume="checkpoint-3")


def test_the_state_of_another_run_is_rejected(tmp_path: Path) -> None:
    for name in ("one", "other"):
        train(0, 1, tmp_path / name, Run())
    (own,) = states_in(tmp_path / "one" / "checkpoint-3")
    (others,) = states_in(tmp_path / "other" / "checkpoint-3")
    shutil.rmtree(own)
    shutil.copytree(others, own.with_name(others.name))
    with pytest.raises(CheckpointError, match=r"These folders hold the state of other saves"):
        train(0, 1, tmp_path / "one", Run(), resume="checkpoint-3")
    own.with_name(others.name).rename(own)
    with pytest.raises(CheckpointError, match=r"its label is '[0-9a-f]+-3', not"):
        train(0, 1, tmp_path / "one", Run(), resume="checkpoint-3")


def test_a_damaged_state_is_rejected(tmp_path: Path) -> None:
    train(0, 1, tmp_path, Run())
    (folder,) = states_in(tmp_path / "checkpoint-3")
    (file,) = folder.glob("rank-*")
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"damaged"):
        train(0, 1, tmp_path, Run(), resume="checkpoint-3")


def test_other_groups_and_dtypes_are_rejected(tmp_path: Path) -> None:
    train(0, 1, tmp_path, Run())
    with pytest.raises(ValueError, match=r"groups of \[10, 18\] parameters, .* groups of \[28\]"):
        train(0, 1, tmp_path, Run(made_by="caller"), resume="checkpoint-3")
    with pytest.raises(CheckpointError, match=r"was F32 when the state was saved and is BF16"):
        train(0, 1, tmp_path, Run(dtype=torch.bfloat16), resume="checkpoint-3")


def test_a_resume_without_the_callback_is_rejected(tmp_path: Path) -> None:
    train(0, 1, tmp_path, Run())
    with pytest.raises(CheckpointError, match=r"pass OffloadAdamCallback\(\) in callbacks="):
        train(0, 1, tmp_path, Run(callback=False), resume="checkpoint-3")


def test_another_optimizer_is_rejected(tmp_path: Path) -> None:
    trainer = make_trainer(1, tmp_path, Run("torch"), more=(OffloadAdamCallback(),))
    with pytest.raises(TypeError, match=r"Trainer has the optimizer AdamW"):
        trainer.train()


UNUSED = {"learning_rate": 3e-5, "adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6}
USED = {"lr": 3e-5, "betas": (0.8, 0.95), "eps": 1e-6}


def warnings_of(folder: Path, caplog: pytest.LogCaptureFixture, run: Run, **given: Any) -> str:
    caplog.clear()
    with caplog.at_level(logging.WARNING, "offload_adam"):
        train(0, 1, folder, run, **given)
    return caplog.text


def test_arguments_that_the_optimizer_does_not_use_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(arguments={**UNUSED, "warmup_steps": 2})
    text = warnings_of(tmp_path, caplog, run)
    assert text.count("The optimizer does not use") == 1
    for words in (
        "learning_rate=3e-05 (the optimizer has 0.01)",
        "adam_beta1=0.8 (the optimizer has 0.9)",
        "adam_beta2=0.95 (the optimizer has 0.999)",
        "adam_epsilon=1e-06 (the optimizer has 0.01)",
        "{'lr': 3e-05, 'betas': (0.8, 0.95), 'eps': 1e-06}",
    ):
        assert words in text
    # The groups of a resumed run have the values of the checkpoint, which the dict cannot change.
    assert "does not use" not in warnings_of(tmp_path, caplog, run, resume="checkpoint-3")
    one = Run(options=USED, arguments={**UNUSED, "adam_beta2": 0.9})
    text = warnings_of(tmp_path, caplog, one)
    assert "does not use adam_beta2=0.9 (the optimizer has 0.95) of TrainingArguments" in text


def test_arguments_that_the_optimizer_uses_or_that_are_defaults_are_not_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # With warmup, the scheduler has changed the lr to 0 before the training begins.
    for run in (Run(), Run(options=USED, arguments={**UNUSED, "warmup_steps": 2})):
        assert "does not use" not in warnings_of(tmp_path, caplog, run)


def test_an_argument_that_one_group_uses_is_not_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(1, tmp_path, Run(arguments={"learning_rate": 0.02}))
    model = trainer.model
    groups = [
        {"params": list(model.transformer.wte.parameters()), "lr": 0.02},
        {"params": [p for n, p in model.named_parameters() if "wte" not in n], "lr": 0.1},
    ]
    trainer.optimizer_cls_and_kwargs = None
    trainer.optimizer = OffloadAdamW(groups)
    with caplog.at_level(logging.WARNING, "offload_adam"):
        trainer.train()
    assert "does not use" not in caplog.text


def test_folders_of_the_user_stay(tmp_path: Path) -> None:
    names = ["offload_adam-tries", "offload_adam-", f"offload_adam-{'0' * 32}-tries"]
    for name in names:
        (tmp_path / name).mkdir()
    train(0, 1, tmp_path, Run())
    assert sorted(states_in(tmp_path)) == sorted(tmp_path / name for name in names)


def test_the_state_is_no_checkpoint_of_the_model(tmp_path: Path) -> None:
    train(0, 1, tmp_path, Run())
    (folder,) = states_in(tmp_path / "checkpoint-3")
    model = make_model()
    optimizer = OffloadAdamW(model.parameters())
    with pytest.raises(CheckpointError, match=r"without the model"):
        load_checkpoint(folder, model=model, optimizer=optimizer)


def states_in(folder: Path) -> list[Path]:
    return list(folder.glob("offload_adam-*"))


def pending_in(folder: Path) -> list[Path]:
    return list(folder.glob("_offload_adam_pending/*"))
