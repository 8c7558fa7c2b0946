"""The contenders of `bench train`: each makes an optimizer for a model and trains with it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import nn

from offload_adam.bench.harness import OURS
from offload_adam.bench.peers import (
    MAX_GRAD_NORM,
    OUR_SETTINGS,
    SETTINGS,
    PeerUnavailableError,
    deepspeed_adamw,
    import_peer,
)
from offload_adam.bench.training.model import Decoder
from offload_adam.optimizer import OffloadAdam

MODEL_ALONE = "model_alone"
"""Forward and backward without an optimizer; the exposed time of a step is measured against it."""
OVERLAPPED, SEQUENTIAL, PLAIN = OURS, f"{OURS}_sequential", "torch_fused"
TORCHAO, FSDP2, DEEPSPEED = "torchao_cpu_offload", "fsdp2_cpu_offload", "deepspeed_zero_offload"
LABELS = {
    MODEL_ALONE: "forward and backward alone",
    OVERLAPPED: "offload_adam, overlapped",
    SEQUENTIAL: "offload_adam, sequential",
    PLAIN: "torch AdamW(fused=True), nothing offloaded",
    FSDP2: "FSDP2 + CPUOffloadPolicy + fused AdamW",
    TORCHAO: "torchao CPUOffloadOptimizer",
    DEEPSPEED: "DeepSpeed ZeRO-2 + CPU offload",
}
PACKAGES = {TORCHAO: "torchao", DEEPSPEED: "deepspeed"}
"""The package that a contender needs in addition to those of this one."""


class TrainContender:
    """A model and its optimizer.

    Lifecycle: may move the model to another device or wrap it; call `close` at the end.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        self.model = model
        self._optimizer = optimizer

    def backward(self, tokens: torch.Tensor) -> None:
        """Run forward and backward."""
        self.model(tokens).backward()

    def update(self) -> None:
        """Clip, step and free the gradients. The update may still run when this returns."""
        assert self._optimizer is not None
        self.clip()
        self._optimizer.step()
        self._optimizer.zero_grad()

    def clip(self) -> None:
        """Clip the gradients to MAX_GRAD_NORM."""
        nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)

    def finish(self) -> None:
        """Wait until the updates on the host have finished; the device may still be copying."""

    def close(self) -> None:
        """Free the optimizer's threads, memory and process groups."""


class ModelAlone(TrainContender):
    """The model without an optimizer."""

    def __init__(self, model: Decoder) -> None:
        super().__init__(model, None)

    def update(self) -> None:
        self.model.zero_grad()


class Offloading(TrainContender):
    """This package, streaming: `OffloadAdam(model.parameters(), module=model)`."""

    def __init__(self, model: nn.Module, overlap: bool) -> None:
        self.optimizer = OffloadAdam(
            model.parameters(), **OUR_SETTINGS, module=model, overlap=overlap
        )
        super().__init__(model, self.optimizer)

    def clip(self) -> None:
        """Do nothing: `OffloadAdam.step` clips."""

    def finish(self) -> None:
        self.optimizer.synchronize()

    def close(self) -> None:
        self.optimizer.close()


def _plain(model: Decoder) -> TrainContender:
    return TrainContender(model, torch.optim.AdamW(model.parameters(), **SETTINGS, fused=True))


class _Torchao(TrainContender):
    """torchao's optimizer, which copies gradients to the host and frees them during backward."""

    def __init__(self, model: Decoder) -> None:
        _require_gpu(model)
        offload = import_peer("torchao.optim", "CPUOffloadOptimizer")
        optimizer = offload(
            model.parameters(), torch.optim.AdamW, offload_gradients=True, fused=True, **SETTINGS
        )
        super().__init__(model, optimizer)

    def clip(self) -> None:
        """Do nothing: no gradients are left after backward, so torchao cannot clip."""


class _Fsdp2(TrainContender):
    """FSDP2 over one rank; parameters, gradients, clipping and fused AdamW are on the host."""

    def __init__(self, model: Decoder) -> None:
        _require_gpu(model)
        policy = import_peer("torch.distributed.fsdp", "CPUOffloadPolicy")()
        shard = import_peer("torch.distributed.fsdp", "fully_shard")
        _init_process_group()
        for block in model.blocks:
            shard(block, offload_policy=policy)
        shard(model, offload_policy=policy)
        super().__init__(model, torch.optim.AdamW(model.parameters(), **SETTINGS, fused=True))

    def close(self) -> None:
        dist.destroy_process_group()


class _DeepSpeed(TrainContender):
    """ZeRO-2 over one rank with its optimizer on the host."""

    def __init__(self, model: Decoder) -> None:
        _require_gpu(model)
        initialize = import_peer("deepspeed", "initialize")
        _init_process_group()
        optimizer = deepspeed_adamw(model.parameters())
        dtype = next(model.parameters()).dtype
        self._engine, *_ = initialize(
            model=model,
            optimizer=optimizer,
            config={
                # DeepSpeed requires this number, but only counts samples with it.
                "train_micro_batch_size_per_gpu": 1,
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
        self._engine.backward(self._engine(tokens))

    def update(self) -> None:
        self._engine.step()  # which clips and frees the gradients

    def close(self) -> None:
        dist.destroy_process_group()


def _require_gpu(model: nn.Module) -> None:
    if not next(model.parameters()).is_cuda:
        raise PeerUnavailableError("needs a GPU")


def _init_process_group() -> None:
    """Create a process group of this process alone, for peers that need one."""
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
"""By name. The most important ones come first, in case the time limit ends the measurement.

Each raises PeerUnavailableError if it does not work on this machine.
"""
