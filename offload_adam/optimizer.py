"""`OffloadAdam` and `OffloadAdamW`: state sharded in host memory, by torch's conventions."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.optim.optimizer import ParamsT

from offload_adam.kernels.scalars import Hyperparameters
from offload_adam.options import ExecutionOptions, FailurePolicy, OffloadPolicy
from offload_adam.params.groups import check_group, hyperparameters_of
from offload_adam.sharded_optimizer import ShardedOptimizer


class OffloadAdam(ShardedOptimizer):
    """Adam and AdamW with fp32 state in host memory, sharded over the ranks.

    The update is torch's: `w - lr * m_hat / (sqrt(v_hat) + eps)`, in fp32 from fp32 master weights,
    whatever the parameters' dtype. Construction moves each parameter into a flat bucket (the
    objects stay the same) and allocates all state; with more than one rank it is collective, as are
    `step`, `clip_grad_norm_`, `add_param_group` and `full_state_dict`.

    Drop-in, without `module`: gradients stay in `.grad` until `step()` reads them. Streaming, with
    `module`: gradients leave during backward, bucket by bucket, and `.grad` then holds stand-ins.
    `torch.nn.utils.clip_grad_norm_` clips through them, collectively: call it on all ranks and for
    all parameters. Any operation besides a 2-norm and an in-place multiplication by a number raises
    an error. Without `module` nobody can tell that a parameter of the model was replaced by another
    (`load_state_dict(assign=True)`), which is not trained then.

    Calls of several threads run one after the other, each as a whole.

    Args:
        params: parameters, group dicts, or (name, parameter) pairs; fp32, bf16 and fp16 may be
            mixed. Parameters that do not require a gradient are left out.
        lr, betas, eps, weight_decay: as in torch; read from the groups at each step. Betas in [0,
            1).
        amsgrad: keep the maximum of exp_avg_sq; with one rank only.
        nesterov: look ahead with the first moment: `b1 * m + (1 - b1) * g` in its place.
        maximize: ascend.
        decoupled_weight_decay: AdamW's decay instead of L2.
        max_grad_norm: clip gradients to this global 2-norm inside the update.
        module: the model, for streaming.
        process_group: ranks that share the state; None for the default group.
        gradient_reduction: "optimizer": local gradients are averaged here (ZeRO-2); "external": DDP
            or the caller has averaged them (ZeRO-1). With `module` and not given: external where it
            is or contains DDP, else optimizer. Must be given with more than one rank and no
            `module`.
        reduce_dtype: torch.float32 to average 16-bit gradients in fp32; None for their own dtype.
        accumulate: "host" reserves fp32 room for gradients, so that several reduced backwards add
            up.
        overlap: let `step()` return before the updates are over, and each part of `module` wait for
            its own parameters. What reads parameters otherwise calls `synchronize` first. None for
            parameters on a GPU and `module` given; on a CPU there is nothing to hide updates under.
        state_dtype: torch.float32, or None for the same.
        num_threads: threads of this rank's kernels; None for allowed cores / ranks on this node,
            less one, for the thread that launches work, where parameters are on a GPU.
        offload: where the state lies and how it is moved: pinned memory, bucket size, the share
            that stays on the GPU, and so on. See `OffloadPolicy`.
        failures: after how many seconds a rank is declared dead or hung. See `FailurePolicy`.

    Owns: process groups of its own, hooks on the parameters, host memory. `close` ends all three.

    Raises:
        TypeError, ValueError: for arguments and parameters that cannot be used, by name, before
            anything is allocated.
        RuntimeError: WORLD_SIZE > 1 and no process group is initialised.
        HostMemoryError: the state does not fit into this node's memory.
        PeerFailedError: ranks never come; from any collective later, ranks that die or hang.

    Source: Kingma and Ba, "Adam" (2015); Loshchilov and Hutter, "Decoupled Weight Decay" (2019);
    Reddi et al., "On the Convergence of Adam" (2018); Rajbhandari et al., "ZeRO" (2020); Ren et
    al., "ZeRO-Offload" (2021).
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        nesterov: bool = False,
        maximize: bool = False,
        decoupled_weight_decay: bool = False,
        max_grad_norm: float | None = None,
        module: torch.nn.Module | None = None,
        process_group: dist.ProcessGroup | None = None,
        gradient_reduction: str | None = None,
        reduce_dtype: torch.dtype | None = None,
        accumulate: str | None = None,
        overlap: bool | None = None,
        state_dtype: torch.dtype | None = None,
        num_threads: int | None = None,
        offload: OffloadPolicy = OffloadPolicy(),
        failures: FailurePolicy = FailurePolicy(),
    ) -> None:
        options = ExecutionOptions(
            module=module,
            process_group=process_group,
            gradient_reduction=gradient_reduction,
            reduce_dtype=reduce_dtype,
            max_grad_norm=max_grad_norm,
            accumulate=accumulate,
            overlap=overlap,
            state_dtype=state_dtype,
            num_threads=num_threads,
            offload=offload,
            failures=failures,
        )
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "nesterov": nesterov,
            "maximize": maximize,
            "decoupled_weight_decay": decoupled_weight_decay,
        }

        self._construct(options, lambda: self._add_groups(params, defaults))

    def _check_group(self, group: dict[str, Any]) -> None:
        check_group(group)

    def _hyperparameters(self) -> list[Hyperparameters]:
        return [hyperparameters_of(group) for group in self.param_groups]


class OffloadAdamW(OffloadAdam):
    """AdamW with fp32 state in host memory: `OffloadAdam` with decoupled weight decay.

    Args:
        weight_decay: decoupled from the gradient, 1e-2 by default, as in `torch.optim.AdamW`.

    All other arguments, and everything else, are as for `OffloadAdam`.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (2019).
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        nesterov: bool = False,
        maximize: bool = False,
        max_grad_norm: float | None = None,
        module: torch.nn.Module | None = None,
        process_group: dist.ProcessGroup | None = None,
        gradient_reduction: str | None = None,
        reduce_dtype: torch.dtype | None = None,
        accumulate: str | None = None,
        overlap: bool | None = None,
        state_dtype: torch.dtype | None = None,
        num_threads: int | None = None,
        offload: OffloadPolicy = OffloadPolicy(),
        failures: FailurePolicy = FailurePolicy(),
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            nesterov=nesterov,
            maximize=maximize,
            decoupled_weight_decay=True,
            max_grad_norm=max_grad_norm,
            module=module,
            process_group=process_group,
            gradient_reduction=gradient_reduction,
            reduce_dtype=reduce_dtype,
            accumulate=accumulate,
            overlap=overlap,
            state_dtype=state_dtype,
            num_threads=num_threads,
            offload=offload,
            failures=failures,
        )
