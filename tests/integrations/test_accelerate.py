"""The optimizers with an Accelerator: equal to torch's AdamW, and loaded in any world size."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from offload_adam import CheckpointError, OffloadAdamW
from offload_adam.checkpoint.commit import partial_name
from offload_adam.integrations import keep_state_sharded
from tests.integrations.accelerate_runs import Loop, loop
from tests.integrations.language_model import forget_accelerator, make_model
from tests.integrations.trainer_runs import ENVIRONMENT, Result, assert_close, assert_equal
from tests.support.ranks import RankPool

CASES = {
    "drop-in": Loop(),
    "streaming": Loop("streaming", wrap=False),
    "clipping": Loop(max_norm=0.2),
    "streaming and clipping": Loop("streaming", wrap=False, max_norm=0.2),
    "accumulation": Loop(accumulate=2, max_norm=0.2),
    "autocast to bf16": Loop(arguments={"mixed_precision": "bf16"}),
}


def loops(rank: int, world_size: int, folder: Path, run: Loop) -> list[Result]:
    """Train with this optimizer, with torch's, and from the middle of the first."""
    with_torch = Loop(
        "torch", arguments=run.arguments, accumulate=run.accumulate, max_norm=run.max_norm
    )
    ours, _ = loop(rank, world_size, folder / "ours", run)
    expected, _ = loop(rank, world_size, folder / "torch", with_torch)
    resumed, _ = loop(rank, world_size, folder / "ours", run, resume=True)
    return [ours, expected, resumed]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_a_loop_equals_torch_and_resumes_to_the_same_bits(
    name: str, world_size: int, ranks: RankPool, tmp_path: Path
) -> None:
    if world_size == 1:
        results = [loops(0, 1, tmp_path, CASES[name])]
    else:
        results = ranks.run(loops, 2, tmp_path, CASES[name], env=ENVIRONMENT)
    # Rounding to bf16 turns differences of 1e-8 into some of 1e-3.
    tolerance = 1e-3 if CASES[name].arguments else 2e-6
    for ours, expected, resumed in results:
        assert_close(ours, expected, tolerance)
        assert_equal(resumed.losses, ours.losses[len(ours.losses) // 2 :])
        assert_equal(resumed.weights, ours.weights)
        assert_equal(resumed.state, ours.state)
    assert_equal(results[-1][0].weights, results[0][0].weights)


@pytest.mark.parametrize(
    ("dtype", "state_format"),
    [(torch.float32, "fp32"), (torch.bfloat16, "fp32"), (torch.bfloat16, "bf16")],
)
def test_two_ranks_load_what_one_rank_saved_and_the_reverse(
    dtype: torch.dtype, state_format: str, ranks: RankPool, tmp_path: Path
) -> None:
    run = Loop(dtype=dtype, max_norm=0.2, options={"state_format": state_format})
    tolerance = 2e-6 if dtype is torch.float32 else 2e-2
    alone, saved = loop(0, 1, tmp_path / "one", run)
    (resumed, loaded), _ = ranks.run(loop, 2, tmp_path / "one", run, True, env=ENVIRONMENT)
    assert_equal(loaded, saved)
    torch.testing.assert_close(resumed.weights, alone.weights, atol=tolerance, rtol=0)
    (together, saved), _ = ranks.run(loop, 2, tmp_path / "two", run, env=ENVIRONMENT)
    resumed, loaded = loop(0, 1, tmp_path / "two", run, True)
    assert_equal(loaded, saved)
    torch.testing.assert_close(resumed.weights, together.weights, atol=tolerance, rtol=0)


def test_two_models_with_two_optimizers(tmp_path: Path) -> None:
    def start() -> tuple[Accelerator, list[OffloadAdamW], list[torch.nn.Module]]:
        forget_accelerator()
        accelerator = Accelerator(cpu=True)
        models = [torch.nn.Linear(3, 2), torch.nn.Linear(2, 4)]
        # The second optimizer trains parameters of both models.
        optimizers = [
            OffloadAdamW([models[0].weight]),
            OffloadAdamW([models[0].bias, *models[1].parameters()]),
        ]
        prepared = accelerator.prepare(*models, *optimizers)
        keep_state_sharded(accelerator, *prepared[2:])
        return accelerator, optimizers, prepared[:2]

    accelerator, optimizers, (first, second) = start()
    for _ in range(2):
        second(first(torch.randn(5, 3))).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        accelerator.save_state(str(tmp_path))
    saved = [optimizer.full_state_dict() for optimizer in optimizers]
    assert len(list(tmp_path.glob("offload_adam-*"))) == 2  # those of the last save
    accelerator, optimizers, _ = start()
    accelerator.load_state(str(tmp_path))
    for optimizer, expected in zip(optimizers, saved, strict=True):
        assert_equal(optimizer.full_state_dict(), expected)


def test_a_save_removes_what_a_killed_one_has_written(tmp_path: Path) -> None:
    killed = tmp_path / partial_name(f"offload_adam-{'0' * 32}")
    killed.mkdir()
    loop(0, 1, tmp_path, Loop())
    assert not killed.exists()


def test_a_model_without_an_optimizer_may_be_absent_when_the_state_is_loaded(
    tmp_path: Path,
) -> None:
    states = []
    for others in ([torch.nn.Linear(2, 2)], []):
        forget_accelerator()
        accelerator = Accelerator(cpu=True)
        model = torch.nn.Linear(3, 2)
        optimizer = OffloadAdamW(model.parameters())
        accelerator.prepare(model, optimizer, *others)
        keep_state_sharded(accelerator, optimizer)
        if others:
            model(torch.ones(5, 3)).square().mean().backward()
            optimizer.step()
            accelerator.save_state(str(tmp_path))
        else:
            accelerator.load_state(str(tmp_path))
        states.append(optimizer.full_state_dict())
    assert_equal(states[1], states[0])


def test_a_state_dict_after_a_save_holds_the_state(tmp_path: Path) -> None:
    forget_accelerator()
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(
        model := torch.nn.Linear(3, 2), OffloadAdamW(model.parameters())
    )
    keep_state_sharded(accelerator, optimizer)
    accelerator.save_state(str(tmp_path))
    assert len(optimizer.state_dict()["state"]) == 2


def test_a_load_without_the_hooks_is_rejected(tmp_path: Path) -> None:
    loop(0, 1, tmp_path, Loop())
    expected = rf"in a folder in {tmp_path}, .* call keep_state_sharded\(accelerator, optimizer\)"
    with pytest.raises(CheckpointError, match=expected):
        loop(0, 1, tmp_path, Loop(sharded=False), resume=True)


def test_accelerate_itself_saves_the_state_of_one_rank(tmp_path: Path) -> None:
    whole, _ = loop(0, 1, tmp_path, Loop(sharded=False))
    for sharded in (False, True):
        resumed, _ = loop(0, 1, tmp_path, Loop(sharded=sharded), resume=True)
        assert_equal(resumed.weights, whole.weights)


def test_the_state_of_torch_is_loaded(tmp_path: Path) -> None:
    whole, _ = loop(0, 1, tmp_path, Loop("torch"))
    resumed, _ = loop(0, 1, tmp_path, Loop(), resume=True)
    torch.testing.assert_close(resumed.weights, whole.weights, atol=2e-6, rtol=0)


def test_a_lost_or_foreign_state_is_rejected(tmp_path: Path) -> None:
    for name in ("one", "other"):
        loop(0, 1, tmp_path / name, Loop())
    (own,) = (tmp_path / "one").glob("offload_adam-*")
    (others,) = (tmp_path / "other").glob("offload_adam-*")
    shutil.rmtree(own)
    with pytest.raises(CheckpointError, match=r"in none of .* resume from the copy\.$"):
        loop(0, 1, tmp_path / "one", Loop(), resume=True)
    shutil.copytree(others, own)
    with pytest.raises(CheckpointError, match=r"holds the state of another save"):
        loop(0, 1, tmp_path / "one", Loop(), resume=True)


def test_other_optimizers_are_rejected() -> None:
    forget_accelerator()
    accelerator = Accelerator(cpu=True)
    model = make_model()
    optimizer = accelerator.prepare(torch.optim.AdamW(model.parameters()))
    with pytest.raises(TypeError, match=r"not AdamW\. Leave it out"):
        keep_state_sharded(accelerator, optimizer)
    with pytest.raises(TypeError, match=r"needs an optimizer"):
        keep_state_sharded(accelerator)
