"""This package, plain AdamW on the device, and other offload optimizers, each training a model."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from offload_adam.bench.contender import ADAMW, MAX_GRAD_NORM
from offload_adam.bench.peers import PeerUnavailableError
from offload_adam.bench.training.model import Decoder
from offload_adam.optimizer import OffloadAdam

MODEL_ALONE = "model_alone"
"""Forward and backward without an optimizer: a step's exposed time is measured against it."""
OVERLAPPED, SEQUENTIAL, PLAIN = "offload_adam", "offload_adam_sequential", "torch_fused"
TORCHAO, FSDP2, DEEPSPEED = "torchao_cpu_offload", "fsdp2_cpu_offload", "deepspeed_zero_offload"
PACKAGES = {TORCHAO: "torchao", DEEPSPEED: "deepspeed"}
"""The package that a contender needs in addition to those of this one."""


class TrainContender:
    """A model with its optimizer; `update` is what a training step does beside the model's work.

    Lifecycle: made for one model, which it may move; `close` when it is done.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model = model
        self._optimizer = optimizer

    def backward(self, tokens: torch.Tensor) -> None:
        """Run forward and backward."""
        self.model(tokens).backward()

    def update(self) -> None:
        """Clip, step, and drop the gradients; it may return before all of that is over."""
        self.clip()
        self._optimizer.step()
        self._optimizer.zero_grad()

    def clip(self) -> None:
        """Clip the gradients to MAX_GRAD_NORM."""
        nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)

    def finish(self) -> None:
        """Return when the parameters hold the last step's result, as far as the host knows."""

    def close(self) -> None:
        """End what the contender began."""


class Offloading(TrainContender):
    """This package, streaming: `OffloadAdam(model.parameters(), module=model)`."""

    def __init__(self, model: nn.Module, overlap: bool) -> None:
        self.optimizer = OffloadAdam(
            model.parameters(),
            **_settings(),
            decoupled_weight_decay=True,
            max_grad_norm=MAX_GRAD_NORM,
            module=model,
            overlap=overlap,
        )
        super().__init__(model, self.optimizer)

    def clip(self) -> None:
        """Do nothing: the optimizer clips in its step."""

    def finish(self) -> None:
        """Wait for the updates."""
        self.optimizer.synchronize()

    def close(self) -> None:
        """Close the optimizer."""
        self.optimizer.close()


def _settings() -> dict[str, Any]:
    """Return the hyperparameters as torch names them, the same for all."""
    return {
        "lr": ADAMW.lr,
        "betas": (ADAMW.beta1, ADAMW.beta2),
        "eps": ADAMW.eps,
        "weight_decay": ADAMW.weight_decay,
    }


def _plain(model: Decoder) -> TrainContender:
    return TrainContender(model, torch.optim.AdamW(model.parameters(), **_settings(), fused=True))


class _Torchao(TrainContender):
    """torchao's optimizer, which copies gradients to the host and frees them during backward."""

    def __init__(self, model: Decoder) -> None:
        _require_gpu(model)
        try:
            offload: Any = importlib.import_module("torchao.optim").CPUOffloadOptimizer
        except (ImportError, AttributeError) as error:
            raise PeerUnavailableError(f"not importable: {error}") from error
        optimizer = offload(
            model.parameters(), torch.optim.AdamW, offload_gradients=True, fused=True, **_settings()
        )
        super().__init__(model, optimizer)

    def clip(self) -> None:
        """Do nothing: no gradients are left after backward, so torchao cannot clip."""


class _Fsdp2(TrainContender):
    """FSDP2 over one rank; parameters, gradients, clipping and fused AdamW are on the host."""

    def __init__(self, model: Decoder) -> None:
        _require_gpu(model)
        try:
            fsdp: Any = importlib.import_module("torch.distributed.fsdp")
            policy, shard = fsdp.CPUOffloadPolicy(), fsdp.fully_shard
        except (ImportError, AttributeError) as error:
            raise PeerUnavailableError(f"not importable: {error}") from error
        _init_alone()
        for block in model.blocks:
            shard(block, offload_policy=policy)
        shard(model, offload_policy=policy)
        super().__init__(model, torch.optim.AdamW(model.parameters(), **_settings(), fused=True))

    def close(self) -> None:
        """End the process group."""
        dist.destroy_process_group()


class _DeepSpeed(TrainContender):
    """ZeRO-2 over one rank with its optimizer on the host."""

    def __init__(self, model: Decoder) -> None:
        _require_gpu(model)
        try:
            deepspeed: Any = importlib.import_module("deepspeed")
            adam: Any = importlib.import_module("deepspeed.ops.adam").DeepSpeedCPUAdam
        except ImportError as error:
            raise PeerUnavailableError(f"not importable: {error}") from error
        _init_alone()
        try:
            optimizer = adam(model.parameters(), **_settings(), adamw_mode=True)
        except RuntimeError as error:
            raise PeerUnavailableError(f"does not work here: {error}") from error
        dtype = next(model.parameters()).dtype
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config={
                "train_micro_batch_size_per_gpu": 1,  # it counts samples, and nothing else
                "gradient_clipping": MAX_GRAD_NORM,
                "zero_optimization": {
                    "stage": 2,
                    "overlap_comm": True,
                    "contiguous_gradients": True,
                    "offload_optimizer": {"device": "cpu", "pin_memory": True},
                },
                "bf16": {"enabled": dtype == torch.bfloat16},
                "fp16": {"enabled": dtype == torch.float16},
                "zero_allow_untested_optimizer": True,
            },
        )
        super().__init__(self._engine, optimizer)

    def backward(self, tokens: torch.Tensor) -> None:
        """Run forward and backward through the engine."""
        self._engine.backward(self._engine(tokens))

    def update(self) -> None:
        """Step; the engine clips and drops the gradients."""
        self._engine.step()

    def close(self) -> None:
        """End the process group."""
        dist.destroy_process_group()


def _require_gpu(model: nn.Module) -> None:
    if not next(model.parameters()).is_cuda:
        raise PeerUnavailableError("works on a GPU only")


def _init_alone() -> None:
    """Make this process a world of its own, for peers that know no other way."""
    os.environ.setdefault("LOCAL_RANK", "0")
    torch.cuda.set_device(0)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)


CONTENDERS: Mapping[str, Callable[[Decoder], TrainContender]] = {
    OVERLAPPED: lambda model: Offloading(model, overlap=True),
    PLAIN: _plain,
    SEQUENTIAL: lambda model: Offloading(model, overlap=False),
    FSDP2: _Fsdp2,
    TORCHAO: _Torchao,
    DEEPSPEED: _DeepSpeed,
}
"""By name, in the order in which they are measured: the most wanted first, should time run out.

Each takes the model, and raises PeerUnavailableError where it does not work here.
"""
