"""Lightning, in one process and on gloo ranks, held to AdamW in a Trainer."""

from __future__ import annotations

import logging
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

from offload_adam import CheckpointError, OffloadAdamW
from offload_adam.errors import StreamedGradientError
from offload_adam.integrations import OffloadAdamStrategy
from tests.support.ranks import RankError, RankPool

# So that Lightning takes RANK and WORLD_SIZE, and the process group that is there.
UNDER_TORCHRUN = {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
NUM_STEPS = 6  # batches in two epochs
# fp32 roundings of the update, of the averaged gradients, and of the clip factor.
TOLERANCE = 3e-6

OPTIONS: dict[str, dict[str, Any]] = {
    "drop-in": {},
    "streaming": {},
    "streaming, summed on the host": {"accumulate": "host"},
    "drop-in, int8": {"state_format": "int8"},
}


def make(kind: str, module: torch.nn.Module) -> torch.optim.Optimizer:
    """Return an optimizer of a key of `OPTIONS`, or torch's own."""
    if kind == "torch":
        return torch.optim.AdamW(module.parameters(), lr=1e-2, eps=1e-4)
    streamed = module if kind.startswith("streaming") else None
    options = OPTIONS[kind]
    return OffloadAdamW(
        module.parameters(), lr=1e-2, eps=1e-4, module=streamed, num_threads=1, **options
    )


class Module(LightningModule):
    """Trains on this rank's rows of each batch, so that every world size has the same loss.

    Args:
        kind: as in `make`.
        manual: clip to `clip` and step every `accumulate` batches in `training_step`.
        seed: of the initial weights.
    """

    def __init__(
        self,
        kind: str,
        *,
        manual: bool = False,
        accumulate: int = 1,
        clip: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.net = torch.nn.Sequential(
            torch.nn.Linear(8, 33), torch.nn.Tanh(), torch.nn.Linear(33, 1)
        )
        for parameter in self.net.parameters():
            torch.nn.init.normal_(parameter, std=0.5, generator=generator)
        self.register_buffer("offset", torch.tensor(float(seed)))
        self.kind = kind
        self.accumulate, self.clip = accumulate, clip
        self.automatic_optimization = not manual
        self.losses: list[float] = []

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor | None:
        world_size, rank = self.trainer.world_size, self.trainer.global_rank
        loss: torch.Tensor = (self.net(batch.chunk(world_size)[rank]) - 1.0).square().mean()
        mean = loss.detach().clone()
        if world_size > 1:
            dist.all_reduce(mean)
        self.losses.append(mean.item() / world_size)
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        self.manual_backward(loss / self.accumulate)
        if (index + 1) % self.accumulate == 0:
            if self.clip is not None:
                self.clip_gradients(optimizer, self.clip, "norm")
            optimizer.step()
            optimizer.zero_grad()
            self.lr_schedulers().step()
        return None

    def configure_optimizers(self) -> Any:
        optimizer = make(self.kind, self)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def batches() -> torch.utils.data.DataLoader[torch.Tensor]:
    rows = torch.randn(24, 8, generator=torch.Generator().manual_seed(1))
    return torch.utils.data.DataLoader(rows, batch_size=8)  # type: ignore[arg-type]


def fit(
    module: Module, strategy: Any = "auto", *, resume: Path | None = None, **options: Any
) -> Any:
    """Train in a Trainer and return it. Three batches are an epoch."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    options = {"max_epochs": 2, "enable_checkpointing": False, **options}
    trainer = Trainer(
        accelerator="cpu",
        devices=dist.get_world_size() if dist.is_initialized() else 1,
        strategy=strategy,
        use_distributed_sampler=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few workers, and of a batch that is not resumed
        validation = batches() if isinstance(module, TwoOptimizers) else None
        trainer.fit(module, batches(), validation, ckpt_path=resume)
    return trainer


def on_ranks(
    ranks: RankPool, function: Callable[..., Any], world_size: int, *args: Any, **options: Any
) -> list[Any]:
    """Call the function on each rank, in an environment as of torchrun."""
    # The first call imports Lightning in each process.
    options = {"timeout": 110.0, "env": UNDER_TORCHRUN, **options}
    return ranks.run(function, world_size, *args, **options)


def close(trainer: Any) -> None:
    for optimizer in trainer.optimizers:
        if isinstance(optimizer, OffloadAdamW):
            optimizer.close()


class Run(dict[str, Any]):
    """What a run leaves: its losses, and its weights by name."""

    def __init__(self, module: Module) -> None:
        weights = {name: value.detach().clone() for name, value in module.state_dict().items()}
        super().__init__(losses=module.losses, weights=weights)


def assert_close(found: Run, expected: Run, steps: slice = slice(None)) -> None:
    assert found["losses"] == pytest.approx(expected["losses"][steps], abs=TOLERANCE)
    assert found["weights"].keys() == expected["weights"].keys()
    for name, weight in expected["weights"].items():
        found_weight = found["weights"][name]
        assert torch.allclose(found_weight, weight, rtol=0.0, atol=TOLERANCE), name


def train(
    kind: str, strategy: Any = "auto", options: dict[str, Any] | None = None, **of_module: Any
) -> Run:
    module = Module(kind, **of_module)
    close(fit(module, strategy, **(options or {})))
    return Run(module)


# Options of Trainer, and of Module.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "automatic": ({}, {}),
    "clipped": ({"gradient_clip_val": 0.3}, {}),
    "accumulated": ({"accumulate_grad_batches": 2}, {}),
    "accumulated and clipped": ({"accumulate_grad_batches": 3, "gradient_clip_val": 0.3}, {}),
    "bf16-mixed": ({"precision": "bf16-mixed"}, {}),
    "manual": ({}, {"manual": True}),
    "manual, accumulated and clipped": ({}, {"manual": True, "accumulate": 3, "clip": 0.3}),
}


def streaming_kind(options: dict[str, Any], of_module: dict[str, Any]) -> str:
    accumulates = "accumulate_grad_batches" in options or "accumulate" in of_module
    return "streaming, summed on the host" if accumulates else "streaming"


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_alone_equals_adamw(variant: str) -> None:
    options, of_module = VARIANTS[variant]
    expected = train("torch", "auto", options, **of_module)
    assert len(expected["losses"]) == NUM_STEPS
    for kind in ("drop-in", streaming_kind(options, of_module)):
        assert_close(train(kind, "auto", options, **of_module), expected)


def train_on_ranks(rank: int, world_size: int, variant: str) -> list[Run]:
    """Train with AdamW in DDP, then with DDP, with this package's strategy, and streaming."""
    options, of_module = VARIANTS[variant]
    return [
        train(kind, strategy, options, **of_module)
        for kind, strategy in [
            ("torch", "ddp"),
            ("drop-in", "ddp"),
            ("drop-in", OffloadAdamStrategy(find_unused_parameters=True)),
            (streaming_kind(options, of_module), OffloadAdamStrategy(streaming=True)),
        ]
    ]


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(variant, marks=() if "clipped" in variant else pytest.mark.slow)
        for variant in VARIANTS
    ],
)
def test_training_on_two_ranks_equals_adamw_in_ddp(ranks: RankPool, variant: str) -> None:
    first, second = on_ranks(ranks, train_on_ranks, 2, variant)
    expected, *found = first
    for run, other in zip(found, second[1:], strict=True):
        assert_close(run, expected)
        assert all(
            torch.equal(run["weights"][name], other["weights"][name]) for name in run["weights"]
        )


def train_with_module_in_ddp(rank: int, world_size: int, folder: Path) -> list[Run]:
    """Train with AdamW, then with `module=` in DDP, which one device also uses."""
    options = {"gradient_clip_val": 0.3}
    strategies = ["ddp", OffloadAdamStrategy()]
    runs = [train("torch", "ddp", options)]
    runs += [train("streaming", strategy, options) for strategy in strategies]
    train_and_save(rank, world_size, "streaming", OffloadAdamStrategy(), folder, 1)
    return [*runs, train_and_save(rank, world_size, "streaming", OffloadAdamStrategy(), folder, 2)]


def test_ddp_on_one_device_keeps_gradients_in_grad(ranks: RankPool, tmp_path: Path) -> None:
    ((expected, *found, resumed),) = on_ranks(ranks, train_with_module_in_ddp, 1, tmp_path)
    for run in found:
        assert_close(run, expected)
    assert_close(resumed, train("torch"), slice(3, None))


def test_clipping_by_value_works_only_without_streaming() -> None:
    options = {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"}
    expected = train("torch", "auto", options)
    assert_close(train("drop-in", "auto", options), expected)
    with pytest.raises(StreamedGradientError, match=r"clamp_ needs the gradient .* 2-norm"):
        train("streaming", "auto", options)


# --- checkpoints ---


def save_every_epoch(folder: Path, **options: Any) -> Any:
    """Return a callback that saves at the end of each epoch, which is three steps."""
    return ModelCheckpoint(folder, **{"save_top_k": -1, "save_last": True, **options})


def train_and_save(
    rank: int, world_size: int, kind: str, strategy: Any, folder: Path, epochs: int
) -> Run:
    """Train up to `epochs`; go on from the folder's last.ckpt if it exists."""
    module = Module(kind)
    last = folder / "last.ckpt"
    resume = last if last.exists() else None
    dist.barrier()
    options = {"callbacks": [save_every_epoch(folder)], "enable_checkpointing": True}
    close(fit(module, strategy, resume=resume, max_epochs=epochs, **options))
    return Run(module)


def test_state_in_codes_is_resumed_with_all_bits(ranks: RankPool, tmp_path: Path) -> None:
    run = ("drop-in, int8", OffloadAdamStrategy())
    expected = on_ranks(ranks, train_and_save, 2, *run, tmp_path / "whole", 2)[0]
    on_ranks(ranks, train_and_save, 2, *run, tmp_path / "parts", 1)
    resumed = on_ranks(ranks, train_and_save, 2, *run, tmp_path / "parts", 2)[0]
    assert resumed["losses"] == expected["losses"][3:]
    for name, weight in expected["weights"].items():
        assert torch.equal(resumed["weights"][name], weight), name


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("saved", "resumed"),
    [(2, 2), (2, 1), *(pytest.param(1, n, marks=pytest.mark.slow) for n in (1, 2))],
)
def test_resuming_in_any_world_equals_training_without_a_break(
    ranks: RankPool, tmp_path: Path, saved: int, resumed: int, streaming: bool
) -> None:
    expected = train("torch")
    kind = "streaming" if streaming else "drop-in"
    strategy = OffloadAdamStrategy(streaming=streaming)
    run = (kind, strategy, tmp_path)
    start = on_ranks(ranks, train_and_save, saved, *run, 1)[0]
    assert start["losses"] == pytest.approx(expected["losses"][:3], abs=TOLERANCE)
    rest = on_ranks(ranks, train_and_save, resumed, *run, 2)[0]
    assert_close(rest, expected, slice(3, None))
    # The files of `last.ckpt` were overwritten: of its states, one remains.
    files = ["epoch=0-step=3.ckpt", "epoch=1-step=6.ckpt", "last.ckpt"]
    assert files_in(tmp_path) == sorted(files + [f"{name}.optimizer" for name in files])
    for name in files:
        assert len(files_in(tmp_path / f"{name}.optimizer")) == 1


def test_the_ddp_strategy_saves_the_state_of_all_ranks(ranks: RankPool, tmp_path: Path) -> None:
    """Its file holds all of it, which any strategy, any world size and AdamW itself can load."""
    expected = train("torch")
    on_ranks(ranks, train_and_save, 2, "drop-in", "ddp", tmp_path / "first", 1)
    assert files_in(tmp_path / "first") == ["epoch=0-step=3.ckpt", "last.ckpt"]
    for number, (kind, strategy, world_size) in enumerate(
        [("drop-in", "ddp", 2), ("streaming", OffloadAdamStrategy(streaming=True), 2)]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "last.ckpt").write_bytes((tmp_path / "first" / "last.ckpt").read_bytes())
        run = (train_and_save, world_size, kind, strategy, folder, 2)
        assert_close(on_ranks(ranks, *run)[0], expected, slice(3, None))
    for kind in ("torch", "drop-in", "streaming"):
        module = Module(kind)
        close(fit(module, resume=tmp_path / "first" / "last.ckpt"))
        assert_close(Run(module), expected, slice(3, None))


def save_with_the_strategy(rank: int, world_size: int, folder: Path) -> None:
    train_and_save(rank, world_size, "streaming", OffloadAdamStrategy(streaming=True), folder, 1)


def resume_with_ddp(rank: int, world_size: int, folder: Path) -> None:
    train_and_save(rank, world_size, "drop-in", "ddp", folder, 2)


def test_a_strategy_that_does_not_know_the_folder_raises(ranks: RankPool, tmp_path: Path) -> None:
    on_ranks(ranks, save_with_the_strategy, 2, tmp_path)
    errors = on_ranks(ranks, resume_with_ddp, 2, tmp_path, expect_errors=True)
    for error in errors:
        assert isinstance(error, RankError)
        assert error.type is CheckpointError
        assert "strategy=OffloadAdamStrategy()" in error.message


def test_a_checkpoint_can_be_moved_and_linked_to(ranks: RankPool, tmp_path: Path) -> None:
    expected = train("torch")
    old, new = tmp_path / "old", tmp_path / "new"
    on_ranks(ranks, save_with_the_strategy, 2, old)
    new.mkdir()
    for name in ("last.ckpt", "last.ckpt.optimizer"):
        (old / name).rename(new / f"moved-{name}")
    for path in old.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (new / "last.ckpt").symlink_to("moved-last.ckpt")
    run = ("streaming", OffloadAdamStrategy(streaming=True), new, 2)
    rest = on_ranks(ranks, train_and_save, 1, *run)[0]
    assert_close(rest, expected, slice(3, None))


def resume_without_the_folder(rank: int, world_size: int, folder: Path) -> None:
    strategy = OffloadAdamStrategy(streaming=True)
    fit(Module("streaming"), strategy, resume=folder / "last.ckpt")


def test_a_checkpoint_without_its_folder_raises_on_all_ranks(
    ranks: RankPool, tmp_path: Path
) -> None:
    on_ranks(ranks, save_with_the_strategy, 2, tmp_path)
    shutil.rmtree(tmp_path / "last.ckpt.optimizer")
    run = (resume_without_the_folder, 2, tmp_path)
    for error in on_ranks(ranks, *run, expect_errors=True):
        assert isinstance(error, RankError)
        assert error.type is CheckpointError
        assert re.search(
            r"state is in a folder named offload_adam-\w+, which is in none", str(error)
        )


class FullDisk(TorchCheckpointIO):
    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        raise OSError("No space left on device")


def overwrite_on_a_full_disk(rank: int, world_size: int, folder: Path) -> tuple[str, Run]:
    """Fail to overwrite last.ckpt, then resume from it."""
    strategy = OffloadAdamStrategy(streaming=True)
    trainer = fit(Module("streaming"), strategy, resume=folder / "last.ckpt")
    working, strategy.checkpoint_io = strategy.checkpoint_io, FullDisk()
    try:
        trainer.save_checkpoint(folder / "last.ckpt")
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
    close(trainer)
    strategy = OffloadAdamStrategy(streaming=True, checkpoint_io=working)
    module = Module("streaming")
    close(fit(module, strategy, resume=folder / "last.ckpt"))
    return message, Run(module)


def test_a_failed_save_raises_on_all_ranks_and_keeps_the_old_checkpoint(
    ranks: RankPool, tmp_path: Path
) -> None:
    expected = train("torch")
    on_ranks(ranks, save_with_the_strategy, 2, tmp_path)
    first, second = on_ranks(ranks, overwrite_on_a_full_disk, 2, tmp_path)
    assert first[0] == "OSError: No space left on device"
    assert re.match(r"PeerError: Rank\(s\) \[0\] failed in writing Lightning's", second[0])
    for _, run in (first, second):
        assert_close(run, expected, slice(3, None))


def keep_the_best(rank: int, world_size: int, folder: Path) -> None:
    module = Module("drop-in")
    callback = save_every_epoch(folder, save_top_k=1, save_last="link", every_n_train_steps=1)
    options: dict[str, Any] = {"callbacks": [callback], "enable_checkpointing": True}
    close(fit(module, OffloadAdamStrategy(), max_epochs=1, **options))


def test_removed_checkpoints_take_their_state_along(ranks: RankPool, tmp_path: Path) -> None:
    expected = train("torch")
    on_ranks(ranks, keep_the_best, 2, tmp_path)
    kept = ["epoch=0-step=3.ckpt", "epoch=0-step=3.ckpt.optimizer", "last.ckpt"]
    assert files_in(tmp_path) == kept
    run = ("drop-in", OffloadAdamStrategy(), tmp_path, 2)
    rest = on_ranks(ranks, train_and_save, 2, *run)[0]
    assert_close(rest, expected, slice(3, None))


class TwoOptimizers(Module):
    """Trains two networks in turn, with an optimizer each, and validates."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind, manual=True)
        self.critic = torch.nn.Linear(1, 1)
        torch.nn.init.constant_(self.critic.weight, 0.5)
        torch.nn.init.zeros_(self.critic.bias)

    def training_step(self, batch: torch.Tensor, index: int) -> None:
        for optimizer, sign in zip(self.optimizers(), (1.0, -1.0), strict=True):
            self.toggle_optimizer(optimizer)
            rows = batch.chunk(self.trainer.world_size)[self.trainer.global_rank]
            loss = sign * self.critic(self.net(rows)).square().mean()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def validation_step(self, batch: torch.Tensor, index: int) -> None:
        self.log("validation", self.critic(self.net(batch)).mean(), sync_dist=True)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [make(self.kind, self.net), make(self.kind, self.critic)]


def train_two_optimizers(
    rank: int, world_size: int, kind: str, strategy: Any, folder: Path, epochs: int
) -> Run:
    module = TwoOptimizers(kind)
    last = folder / "last.ckpt"
    resume = last if last.exists() else None
    dist.barrier()
    options = {"callbacks": [save_every_epoch(folder)], "enable_checkpointing": True}
    close(fit(module, strategy, resume=resume, max_epochs=epochs, **options))
    return Run(module)


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_two_optimizers_are_trained_and_resumed(
    ranks: RankPool, tmp_path: Path, streaming: bool
) -> None:
    strategy = OffloadAdamStrategy(
        streaming=streaming, **({} if streaming else {"find_unused_parameters": True})
    )
    ours = "streaming" if streaming else "drop-in"
    run = (
        train_two_optimizers,
        2,
        "torch",
        "ddp_find_unused_parameters_true",
        tmp_path / "torch",
        2,
    )
    expected = on_ranks(ranks, *run)[0]
    for world_size, epochs in [(2, 1), (1, 2)]:
        folder = tmp_path / "ours"
        found = on_ranks(ranks, train_two_optimizers, world_size, ours, strategy, folder, epochs)[0]
    assert_close(found, expected)
    assert len(files_in(tmp_path / "ours" / "last.ckpt.optimizer")) == 2


# --- what streaming=True does in place of DDP, and what is rejected ---


def train_from_different_weights(rank: int, world_size: int) -> Run:
    return train("streaming", OffloadAdamStrategy(streaming=True), seed=rank)


def test_all_ranks_begin_with_the_weights_and_buffers_of_rank_0(ranks: RankPool) -> None:
    expected = train("torch")
    for run in on_ranks(ranks, train_from_different_weights, 2):
        assert_close(run, expected)


def messages_of(rank: int, world_size: int) -> list[str]:
    found = []
    for kind in ("torch", "drop-in"):
        try:
            train(kind, OffloadAdamStrategy(streaming=True))
        except ValueError as error:
            found.append(str(error))
    return found


def test_streaming_needs_optimizers_that_stream(ranks: RankPool) -> None:
    for adamw, drop_in in on_ranks(ranks, messages_of, 2):
        assert re.match(r"AdamW does not average .* OffloadAdamW\(\.\.\., module=self\)", adamw)
        assert re.match(r"OffloadAdamW does not average .* module=self", drop_in)


def test_options_of_ddp_are_rejected_when_streaming() -> None:
    with pytest.raises(ValueError, match=r"^ddp_comm_hook, static_graph configures DDP"):
        OffloadAdamStrategy(streaming=True, static_graph=True, ddp_comm_hook=None)


def test_paths_and_plugins_that_cannot_work_are_rejected(ranks: RankPool, tmp_path: Path) -> None:
    url, plugin = on_ranks(ranks, rejected_saves, 1, tmp_path)[0]
    assert "needs a path in a file system that all ranks share, not 's3://bucket/a.ckpt'" in url
    assert "does not support AsyncCheckpointIO" in plugin
    assert files_in(tmp_path) == []


def rejected_saves(rank: int, world_size: int, folder: Path) -> list[str]:
    found = []
    for path, checkpoint_io in [
        ("s3://bucket/a.ckpt", TorchCheckpointIO()),
        (str(folder / "a.ckpt"), AsyncCheckpointIO(TorchCheckpointIO())),
    ]:
        trainer = fit(Module("drop-in"), OffloadAdamStrategy(checkpoint_io=checkpoint_io))
        try:
            trainer.save_checkpoint(path)
        except ValueError as error:
            found.append(str(error))
        close(trainer)
    return found
