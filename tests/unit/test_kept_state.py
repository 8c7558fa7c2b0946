"""State that outlives its optimizer: what the next one continues with, and what it rejects."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from offload_adam import OffloadAdam, OffloadAdamW, OffloadPolicy, load_checkpoint, save_checkpoint
from offload_adam.errors import KeptInUseError, KeptStateError
from offload_adam.mindspore import Adam
from offload_adam.sharded_optimizer import ShardedOptimizer
from tests.support.devices import HOST_AS_DEVICE
from tests.support.keepers import keeper_folder

pytestmark = pytest.mark.filterwarnings(
    "ignore:.* is not in memory:UserWarning",
    "error:Detected call of `lr_scheduler.step:UserWarning",
)

Build = Callable[[nn.Module, OffloadPolicy], ShardedOptimizer]


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """Return a folder for kept state. It is not in memory, which only makes it slower."""
    return str(tmp_path / "kept")


def kept(folder: str, **options: Any) -> OffloadPolicy:
    return OffloadPolicy(keep="shared", keep_path=folder, attach_timeout=0.0, **options)


class Net(nn.Module):
    """A model with buffers, dropout and a state that only `get_extra_state` shows."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(24, 40, dtype=dtype)
        self.norm = nn.BatchNorm1d(40, dtype=dtype)
        self.last = nn.Linear(40, 3, dtype=dtype)
        self.register_buffer("scratch", torch.zeros(2, dtype=torch.float32), persistent=False)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        hidden = nn.functional.dropout(torch.relu(self.norm(self.first(x))), 0.2)
        output: torch.Tensor = self.last(hidden)
        return output

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": self.calls}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.calls = state["calls"]


class Run:
    """A model, its optimizer and its schedule, and a loop that continues from kept state."""

    def __init__(
        self, build: Build, policy: OffloadPolicy, dtype: torch.dtype = torch.float32
    ) -> None:
        self.model = Net(dtype)
        self.optimizer = build(self.model, policy)
        self.schedule = CosineAnnealingLR(self.optimizer, 40)
        self._has_model = self.optimizer._module is not None
        self.step = 0
        torch.manual_seed(1)
        resumed = self.optimizer.resumed_step
        if resumed is not None:
            self.step = resumed.step
            self.schedule.load_state_dict(resumed.extra["schedule"])
            torch.set_rng_state(resumed.extra["random"])
            if resumed.extra["model"] is not None:
                self.model.load_state_dict(resumed.extra["model"], strict=False)
            self._end_step()

    def train(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.step += 1
            generator = torch.Generator().manual_seed(self.step)
            x = torch.randn(16, 24, generator=generator, dtype=torch.float32)
            loss = self.model(x.to(self.model.first.weight.dtype)).float().square().mean()
            if self.step % 5 == 0:
                loss = loss * float("inf")  # this step is skipped
            loss.backward()
            self.optimizer.kept_extra = {
                "schedule": self.schedule.state_dict(),
                "random": torch.get_rng_state(),
                "model": None if self._has_model else self._buffers(),
            }
            self.optimizer.step()
            self.optimizer.zero_grad()
            self._end_step()

    def _buffers(self) -> dict[str, Any]:
        """Return what an optimizer keeps itself if it has the model."""
        trained = dict(self.model.named_parameters())
        return {k: v for k, v in self.model.state_dict().items() if k not in trained}

    def _end_step(self) -> None:
        assert self.optimizer.last_step is not None
        if not self.optimizer.last_step.skipped:
            self.schedule.step()

    def values(self) -> dict[str, Any]:
        """Return everything that has to be the same after a resumption."""
        self.optimizer.synchronize()
        state = {
            f"{index}/{key}": torch.as_tensor(value).clone()
            for index, entry in self.optimizer.state_dict()["state"].items()
            for key, value in entry.items()
        }
        model = {
            name: value.clone() if isinstance(value, torch.Tensor) else value
            for name, value in self.model.state_dict().items()
        }
        return {
            **state,
            **model,
            "random": torch.get_rng_state(),
            "groups": [
                {k: v for k, v in group.items() if k != "params"}
                for group in self.optimizer.param_groups
            ],
            "schedule": self.schedule.state_dict(),
            "further": self.optimizer._further_state(),
            "num_steps": self.optimizer.num_steps,
            "skipped": self.optimizer.skipped_steps,
            "calls": self.model.calls,
        }


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert found[name].dtype == value.dtype, name
            torch.testing.assert_close(found[name], value, rtol=0, atol=0, equal_nan=True)
        else:
            assert found[name] == value, name


def adamw(*, has_model: bool = True, **options: Any) -> Build:
    def build(model: nn.Module, policy: OffloadPolicy) -> ShardedOptimizer:
        groups: list[dict[str, Any]] = [
            {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.dim() < 2], "lr": 3e-3},
        ]
        module = model if has_model else None
        return OffloadAdamW(groups, lr=1e-2, module=module, offload=policy, **options)

    return build


ADAMW = adamw()


def mindspore_adam(model: nn.Module, policy: OffloadPolicy) -> ShardedOptimizer:
    parameters = list(model.named_parameters())
    return Adam(parameters, 1e-2, use_offload=True, module=model, offload=policy)


BUILDS: dict[str, tuple[Build, torch.dtype]] = {
    "fp32": (adamw(max_grad_norm=0.5), torch.float32),
    "fp32, amsgrad": (adamw(amsgrad=True), torch.float32),
    "bf16 with masters": (adamw(), torch.bfloat16),
    "bf16 state": (adamw(state_format="bf16"), torch.bfloat16),
    "mixed state": (adamw(state_format="mixed"), torch.bfloat16),
    "int8 state": (adamw(state_format="int8"), torch.float32),
    "gradients in .grad": (adamw(has_model=False), torch.bfloat16),
    "mindspore": (mindspore_adam, torch.float32),
}


@pytest.mark.parametrize("num_steps", [1, 4, 5])  # step 5 is skipped
@pytest.mark.parametrize("name", BUILDS)
def test_the_next_optimizer_continues_to_the_bit(name: str, num_steps: int, folder: str) -> None:
    build, dtype = BUILDS[name]
    undisturbed = Run(build, OffloadPolicy(), dtype)
    undisturbed.train(num_steps)
    expected = undisturbed.values()
    undisturbed.train(3)
    expected_later = undisturbed.values()
    first = Run(build, kept(folder), dtype)
    assert first.optimizer.resumed_step is None
    first.train(num_steps)
    first.optimizer.close()

    second = Run(build, kept(folder), dtype)
    resumed = second.optimizer.resumed_step
    assert resumed is not None
    assert resumed.step == num_steps
    assert resumed.report.skipped == (num_steps == 5)
    assert_same(second.values(), expected)
    second.train(3)
    assert_same(second.values(), expected_later)


def test_a_keeper_holds_the_state_for_the_next_optimizer() -> None:
    undisturbed = Run(ADAMW, OffloadPolicy())
    undisturbed.train(7)
    with keeper_folder() as folder:
        policy = OffloadPolicy(keep="keeper", keep_path=str(folder), attach_timeout=0.0)
        first = Run(ADAMW, policy)
        first.train(4)
        with pytest.raises(KeptInUseError, match="is in use by another optimizer of this process"):
            Run(ADAMW, policy)
        first.optimizer.close()
        second = Run(ADAMW, policy)
        assert second.step == 4
        second.train(3)
        assert_same(second.values(), undisturbed.values())
        second.optimizer.discard_kept()
        second.optimizer.close()
        assert Run(ADAMW, policy).step == 0


@pytest.mark.parametrize("pin", ["all", "none"])
@pytest.mark.parametrize("state_format", ["fp32", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offloaded_state_continues_to_the_bit(
    dtype: torch.dtype,
    state_format: str,
    pin: Any,
    folder: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ShardedOptimizer, "_backend", HOST_AS_DEVICE)
    build = adamw(state_format=state_format, max_grad_norm=0.5, overlap=True)
    undisturbed = Run(build, OffloadPolicy(pin=pin), dtype)
    undisturbed.train(4)
    expected = undisturbed.values()
    undisturbed.train(3)
    expected_later = undisturbed.values()
    first = Run(build, kept(folder, pin=pin), dtype)
    first.train(4)
    finish(first)
    second = Run(build, kept(folder, pin=pin), dtype)
    assert second.optimizer.resumed_step is not None
    assert_same(second.values(), expected)
    second.train(3)
    assert_same(second.values(), expected_later)
    finish(second)


def finish(run: Run) -> None:
    run.optimizer.synchronize()
    run.optimizer.close()


def resumed_step(folder: str, build: Build = ADAMW, dtype: torch.dtype = torch.float32) -> int:
    """Return the step from which the next optimizer continues, 0 if it begins anew."""
    run = Run(build, kept(folder), dtype)
    run.optimizer.close()
    return 0 if run.optimizer.resumed_step is None else run.optimizer.resumed_step.step


def test_a_load_makes_the_kept_state_invalid_until_the_next_step(
    folder: str, tmp_path: Path
) -> None:
    for load in (
        lambda run: run.optimizer.load_state_dict(run.optimizer.state_dict()),
        lambda run: load_checkpoint(tmp_path / "c", model=run.model, optimizer=run.optimizer),
        lambda run: run.optimizer.refresh_master(),
        lambda run: assign(run.optimizer),
    ):
        run = Run(adamw(), kept(folder, resume_kept=False))
        run.train(2)
        if not (tmp_path / "c").exists():
            save_checkpoint(tmp_path / "c", model=run.model, optimizer=run.optimizer)
        load(run)
        run.train(1)
        finish(run)
        assert resumed_step(folder) in (3, 5), "a step after the load is a start"
        run = Run(adamw(), kept(folder))
        load(run)
        finish(run)
        assert resumed_step(folder) == 0


def assign(optimizer: ShardedOptimizer) -> None:
    for entry in optimizer.state.values():
        entry["exp_avg"] = torch.zeros_like(entry["exp_avg"])
    optimizer.synchronize()  # loads what was assigned


def test_a_step_after_an_edit_is_not_a_start_but_the_next_one_is(folder: str) -> None:
    run = Run(adamw(), kept(folder), torch.bfloat16)
    run.train(2)
    with torch.no_grad():
        run.model.last.bias.add_(1.0)
    run.train(1)
    finish(run)
    assert resumed_step(folder, dtype=torch.bfloat16) == 0
    run = Run(adamw(), kept(folder), torch.bfloat16)
    run.train(2)
    with torch.no_grad():
        run.model.last.bias.add_(1.0)
    run.train(2)
    finish(run)
    assert resumed_step(folder, dtype=torch.bfloat16) == 4


def test_resume_kept_false_begins_anew(folder: str) -> None:
    run = Run(adamw(), kept(folder))
    run.train(2)
    finish(run)
    assert Run(adamw(), kept(folder, resume_kept=False)).optimizer.resumed_step is None


def test_discarded_state_is_not_resumed(folder: str) -> None:
    run = Run(adamw(), kept(folder))
    run.train(2)
    run.optimizer.discard_kept()
    run.optimizer.discard_kept()
    run.train(1)  # works on, without a file
    finish(run)
    assert resumed_step(folder) == 0


def test_a_step_after_an_edit_is_a_start_if_the_parameters_are_the_masters(folder: str) -> None:
    run = Run(adamw(), kept(folder))
    for _ in range(3):
        run.train(1)
        with torch.no_grad():
            run.model.last.weight.clamp_(-0.01, 0.01)
    run.train(1)
    expected = run.values()
    finish(run)
    second = Run(adamw(), kept(folder))
    assert second.optimizer.resumed_step is not None
    assert_same(second.values(), expected)
    finish(second)


@pytest.mark.parametrize(
    ("build", "dtype", "says"),
    [
        (adamw(), torch.bfloat16, "layout|parameters"),
        (adamw(state_format="int8"), torch.float32, "layout"),
        (adamw(amsgrad=True), torch.float32, "optimizer"),
        (mindspore_adam, torch.float32, "optimizer"),
    ],
)
def test_another_layout_is_not_adopted(
    build: Build, dtype: torch.dtype, says: str, folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(adamw(), kept(folder))
    run.train(2)
    finish(run)
    with caplog.at_level(logging.INFO):
        assert resumed_step(folder, build, dtype) == 0
    text = next(m for m in caplog.messages if m.startswith("Not resuming from kept state"))
    assert any(word in text for word in says.split("|")), text


def test_two_optimizers_cannot_use_one_folder(folder: str) -> None:
    run = Run(adamw(), kept(folder))
    run.train(1)
    with pytest.raises(KeptInUseError, match="another optimizer of this process"):
        Run(adamw(), kept(folder))
    run.train(1)
    finish(run)
    assert resumed_step(folder) == 2


def rejected(error: str, build: Callable[[nn.Module], object]) -> None:
    with pytest.raises(ValueError, match=error):
        build(Net())


def test_what_cannot_be_kept_is_rejected_at_construction(folder: str) -> None:
    rejected("needs keep_path=", lambda m: adamw()(m, OffloadPolicy(keep="shared")))
    rejected("without defer=True", lambda m: adamw(defer=True)(m, kept(folder)))
    rejected(
        "grad_centralization",
        lambda m: Adam(
            [{"params": list(m.parameters()), "grad_centralization": True}], offload=kept(folder)
        ),
    )

    def with_large_buffer(model: nn.Module) -> object:
        model.register_buffer("table", torch.zeros(2**24 + 1, dtype=torch.float32))
        return adamw()(model, kept(folder))

    rejected("'table'.*persistent=False", with_large_buffer)
    assert not Path(folder).exists() or not list(Path(folder).glob("rank-?????"))


def test_what_cannot_be_kept_is_rejected_in_a_step(folder: str) -> None:
    run = Run(adamw(), kept(folder))
    with pytest.raises(ValueError, match=r"kept state, the constructor must get all parameters"):
        run.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    assert len(run.optimizer.param_groups) == 2
    run.train(1)

    x = torch.zeros(4, 24, dtype=torch.float32)
    run.model(x).sum().backward()
    with pytest.raises(ValueError, match="accumulate='host'"):
        run.model(x).sum().backward()
    run.optimizer.zero_grad()

    run.optimizer.kept_extra = {"object": object()}
    run.model(x).sum().backward()
    with pytest.raises(RuntimeError, match=r"kept_extra.*object"):
        run.optimizer.step()
    run.optimizer.zero_grad()
    run.train(1)
    finish(run)
    assert resumed_step(folder) == 2


def test_a_norm_records_no_step(folder: str) -> None:
    run = Run(adamw(), kept(folder))
    run.train(1)
    run.model(torch.ones(4, 24, dtype=torch.float32)).sum().backward()
    run.optimizer.clip_grad_norm_(1.0)
    core = run.optimizer._alive()
    assert core.kept is not None
    assert core.kept.file is not None
    assert core.kept.file.found().prepared == 1
    run.optimizer.step()
    assert core.kept.file.found().prepared == 2
    finish(run)


def test_sparse_gradients_are_rejected(folder: str) -> None:
    table = nn.Embedding(8, 4, sparse=True)
    optimizer = Adam(table.parameters(), offload=kept(folder))
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match=r"sparse gradient, which kept state does not support"):
        optimizer.step()


def test_several_backwards_are_kept_with_accumulate_host(folder: str) -> None:
    def train(policy: OffloadPolicy) -> list[torch.Tensor]:
        model = nn.Linear(6, 5)
        with torch.no_grad():
            model.weight.fill_(0.5)
            model.bias.fill_(0.25)
        optimizer = OffloadAdam(
            model.parameters(), lr=0.1, module=model, accumulate="host", offload=policy
        )
        for _ in range(3 if optimizer.resumed_step is None else 0):
            for part in range(2):
                model(torch.full((2, 6), 1.0 + part, dtype=torch.float32)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        optimizer.close()
        return [parameter.detach().clone() for parameter in model.parameters()]

    expected = train(OffloadPolicy())
    for _ in range(2):  # the second one only resumes
        for found, value in zip(train(kept(folder)), expected, strict=True):
            assert torch.equal(found, value)


def interrupt(run: Run, monkeypatch: pytest.MonkeyPatch, *, in_decide: bool) -> None:
    """Take a step that Ctrl-C interrupts right after its decision is recorded, or a bit later."""
    core = run.optimizer._alive()
    assert core.kept is not None
    assert core.kept.file is not None
    write_decision = core.kept.file.write_decision

    def write_and_stop(sequence: int, content: bytes) -> None:
        write_decision(sequence, content)
        raise KeyboardInterrupt

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if in_decide:
            patch.setattr(core.kept.file, "write_decision", write_and_stop)
        else:
            patch.setattr(core.external_edits, "bump_versions", stop)
        with pytest.raises(KeyboardInterrupt):
            run.train(1)


@pytest.mark.parametrize("in_decide", [False, True])
def test_an_interrupted_step_is_completed_until_other_gradients_replace_its_own(
    in_decide: bool, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = Run(adamw(), OffloadPolicy())
    undisturbed.train(2)
    expected = undisturbed.values()
    run = Run(adamw(), kept(folder))
    run.train(1)
    interrupt(run, monkeypatch, in_decide=in_decide)
    shutil.copytree(folder, tmp_path / "at_once")
    run.optimizer.zero_grad()
    run.model(torch.ones(16, 24, dtype=torch.float32)).sum().backward()
    run.optimizer.refresh_master()  # must not make the step valid again
    shutil.copytree(folder, tmp_path / "later")
    run.optimizer.zero_grad()
    run.train(3)
    finish(run)

    second = Run(adamw(), kept(str(tmp_path / "at_once")))
    assert second.optimizer.resumed_step is not None
    assert_same(second.values(), expected)
    finish(second)
    assert resumed_step(str(tmp_path / "later")) == 0
    assert resumed_step(folder) > 2, "later steps are complete"


class Buffers(nn.Module):
    """A module whose buffers are odd, or change."""

    def __init__(self, **buffers: torch.Tensor | None) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 2)
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.inner(x)
        return output


def renaming(model: nn.Module) -> None:
    """Let the state dict have other names, as `checkpoint_wrapper` does."""

    def rename(_: object, state: dict[str, Any], prefix: str, __: object) -> None:
        for name in list(state):
            state[f"{prefix}other_{name.removeprefix(prefix)}"] = state.pop(name)

    model._register_state_dict_hook(rename)


def one_step(model: Buffers, policy: OffloadPolicy) -> OffloadAdam:
    optimizer = OffloadAdam(model.parameters(), module=model, offload=policy)
    if optimizer.resumed_step is None:
        model(torch.ones(4, 3, dtype=torch.float32)).sum().backward()
        optimizer.step()
    optimizer.synchronize()
    return optimizer


def test_odd_buffers_are_restored(folder: str) -> None:
    def build(start: float) -> Buffers:
        model = Buffers(
            empty=torch.zeros(0, dtype=torch.float32),
            scalar=torch.tensor(start, dtype=torch.float64),
            view=torch.full((4, 6), start, dtype=torch.float32).t()[:, 1:],
            absent=None,
        )
        renaming(model)
        return model

    one_step(build(1.5), kept(folder)).close()
    model = build(0.0)
    optimizer = one_step(model, kept(folder))
    assert optimizer.resumed_step is not None
    assert float(model.get_buffer("scalar")) == 1.5
    assert torch.equal(model.get_buffer("view"), torch.full((6, 3), 1.5, dtype=torch.float32))
    optimizer.close()


def test_another_set_of_buffers_is_not_adopted(folder: str) -> None:
    one_step(Buffers(a=torch.zeros(3, dtype=torch.float32)), kept(folder)).close()
    for buffers in ({"a": torch.zeros(3, dtype=torch.int32)}, {"b": torch.zeros(3)}, {}):
        optimizer = one_step(Buffers(**buffers), kept(folder))
        assert optimizer.resumed_step is None
        optimizer.close()


def test_a_buffer_that_changes_is_rejected_in_a_step(folder: str) -> None:
    x = torch.ones(4, 3, dtype=torch.float32)
    for change in (torch.zeros(4, dtype=torch.float32), None):
        model = Buffers(a=torch.zeros(3, dtype=torch.float32), late=None)
        optimizer = OffloadAdam(model.parameters(), module=model, offload=kept(folder))
        model(x).sum().backward()
        optimizer.step()
        model.register_buffer("a", change)
        model(x).sum().backward()
        with pytest.raises(ValueError, match=r"Buffer 'a' was torch.float32 \[3\] .* and is"):
            optimizer.step()
        optimizer.close()
    model.register_buffer("a", torch.zeros(3, dtype=torch.float32))
    model.register_buffer("late", None)
    optimizer = OffloadAdam(model.parameters(), module=model, offload=kept(folder))
    model.register_buffer("late", x)
    model(x).sum().backward()
    with pytest.raises(ValueError, match="Buffer 'late' was absent at construction"):
        optimizer.step()
    optimizer.close()
    model.register_buffer("late", torch.zeros(1, dtype=torch.float32).expand(3))
    with pytest.raises(ValueError, match="'late', which is expanded"):
        OffloadAdam(model.parameters(), module=model, offload=kept(folder))


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (None, "kept_extra must be a dict, not None"),
        ({str(n): torch.zeros(2**18) for n in range(7)}, "Make kept_extra smaller"),
    ],
)
def test_a_wrong_kept_extra_says_what_to_do(extra: Any, says: str, folder: str) -> None:
    run = Run(adamw(), kept(folder))
    run.train(1)
    run.optimizer.kept_extra = extra
    run.model(torch.ones(4, 24, dtype=torch.float32)).sum().backward()
    with pytest.raises((TypeError, ValueError), match=says):
        run.optimizer.step()
    run.optimizer.zero_grad()
    run.train(1)
    finish(run)
    assert resumed_step(folder) == 2


def test_files_of_others_are_left_alone(folder: str, caplog: pytest.LogCaptureFixture) -> None:
    place = Path(folder)
    place.mkdir()
    names = ["rank-1", "rank-00001", "rank-results-2024", "rank-00007.txt"]
    for name in names:
        (place / name).write_text("mine")
    run = Run(adamw(), kept(folder))
    run.train(1)
    finish(run)
    assert all((place / name).read_text() == "mine" for name in names)
    (place / "rank-00000").rename(place / "rank-00002")  # of a rank that no longer exists
    assert resumed_step(folder) == 0
    assert not (place / "rank-00002").exists()
    assert all((place / name).read_text() == "mine" for name in names)


def test_a_folder_that_cannot_be_used_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(KeptStateError, match=r"choose another memory\.keep_path"):
        Run(adamw(), kept(str(tmp_path / "file")))
    (tmp_path / "rank-00000").mkdir()
    with pytest.raises(KeptStateError, match="Is a directory"):
        Run(adamw(), kept(str(tmp_path)))
    with pytest.raises(ValueError, match="keep_path must be text"):
        Run(adamw(), kept(""))


def test_edits_before_every_step_are_warned_of(
    folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(adamw(), kept(folder), torch.bfloat16)
    for _ in range(14):
        run.train(1)
        with torch.no_grad():
            run.model.last.bias.add_(1.0)
    finish(run)
    found = [m for m in caplog.messages if m.startswith("Parameters were modified before each")]
    assert len(found) == 1
