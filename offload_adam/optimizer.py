"""`OffloadAdam` and `OffloadAdamW`: torch's Adam and AdamW with sharded state in host memory."""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.distributed as dist
from torch.optim.optimizer import ParamsT

from offload_adam.kernels.scalars import Hyperparameters
from offload_adam.options import ExecutionOptions, FailurePolicy, OffloadPolicy, StateFormat
from offload_adam.params.groups import check_group, hyperparameters_of
from offload_adam.sharded_optimizer import ShardedOptimizer

logger = logging.getLogger(__name__)


class OffloadAdam(ShardedOptimizer):
    """Adam with fp32 state in host memory, sharded over the ranks.

    Update number t of a parameter w with gradient g is that of `torch.optim.Adam`, in fp32:

        m  = b1 * m + (1 - b1) * g
        v  = b2 * v + (1 - b2) * g^2
        w -= lr * (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    If w has 16 bits, or is on a GPU and its state is not, its fp32 master weight is updated and
    then copied to w. Construction moves each parameter's data into a flat bucket and allocates all
    state; the Parameter objects stay the same. If you set `parameter.data`, the next step copies
    the new values into the bucket. Until the first update, the model may also be moved, cast or
    wrapped in DDP: the first step then lays the parameters out again. With more than one rank,
    construction, `step`, `clip_grad_norm_`, `add_param_group`, `full_state_dict` and
    `load_state_dict` are collective.

    There are two modes:

    - Drop-in, without `module` or with `gradient_reduction="external"`: gradients stay in `.grad`
      until `step()` reads them.
    - Streaming, with `module` and `gradient_reduction="optimizer"`: each bucket's gradients are
      reduced and copied to the host during backward. `.grad` then holds stand-ins: tensors with a
      shape but without values. `torch.nn.utils.clip_grad_norm_` works on them: call it on all ranks
      and for all parameters. Stand-ins support only a 2-norm and an in-place multiplication by a
      number; other operations raise `StreamedGradientError`. `step()` uses the gradients up, so
      they do not add up over steps without `zero_grad()`.

    For example, in streaming mode:

        optimizer = OffloadAdam(model.parameters(), lr=1e-3, module=model)
        for batch in batches:
            model(batch).backward()
            optimizer.step()
            optimizer.zero_grad()

    Parameters may be sharded over the ranks by FSDP2 (`fully_shard`), HSDP or tensor parallelism.
    Each rank then keeps and updates the state of its own parts, and `state` has DTensors. FSDP2
    averages the gradients; with `module` they leave `.grad` during backward, and FSDP2 waits for
    the updates of each layer before it gathers the layer. See docs/guides/fsdp2.md.

    Construct the optimizer again to start over, as in a notebook cell that runs twice: the new one
    closes an older one of the same parameters, with a warning, right before it allocates memory. An
    older optimizer of only some of the parameters, or of further ones, is an error.

    In `torch.compile`, the optimizer runs uncompiled between the graphs of a training step. So
    `fullgraph=True` is an error, and `step()` itself waits for updates instead of the forward.

    Without `module`, the optimizer does not notice if another Parameter object takes the place of
    one in the model, for example by `load_state_dict(assign=True)`. The new one is not trained.

    Args:
        params: parameters, group dicts, or (name, parameter) pairs. fp32, bf16 and fp16 may be
            mixed. A group of DTensors on a mesh of only some ranks needs the option "replicas":
            "copies" if the other ranks have copies of them, "distinct" if they have other ones,
            such as other experts. Parameters with `requires_grad=False` get no state and are not
            updated. A parameter that requires a gradient later gets its state at the first step
            with one.
        lr: learning rate, a float or a one-element tensor. `lr`, `betas`, `eps` and `weight_decay`
            are read from `param_groups` at each step, so schedulers work.
        betas: (b1, b2), the decay rates of the moments m and v, each in [0, 1).
        eps: added to the denominator, at least 0.
        weight_decay: coefficient of the L2 penalty: `weight_decay * w` is added to g, as in
            `torch.optim.Adam`. In place of `torch.optim.AdamW` use `OffloadAdamW`, whose weight
            decay is decoupled.
        amsgrad: replace v in the last line by the largest v so far, which costs 4 more bytes of
            state per parameter. Not supported with more than one rank.
        nesterov: replace m in the last line by `b1 * m + (1 - b1) * g`.
        maximize: maximize the objective instead of minimizing it.
        decoupled_weight_decay: subtract `lr * weight_decay * w` from w, as AdamW does, instead of
            adding weight decay to the gradient.
        foreach, fused: without effect, since updates run in kernels of this package. True is
            logged once.
        capturable, differentiable: must be False or None. An update can neither be captured in a
            CUDA graph nor be differentiated.
        max_grad_norm: clip the 2-norm of each step's gradients, over all parameters and averaged
            over the ranks, to this value. None for no clipping. Needs no extra collective, unlike
            `clip_grad_norm_`.
        module: the model, for streaming and overlap. It also gives the parameters their names.
        process_group: ranks that share the state. None for the default group.
        gradient_reduction: "optimizer": backward leaves local gradients and the optimizer averages
            them over the ranks (ZeRO-2). "external": DDP or the caller averages them (ZeRO-1). None
            means "external" if a DDP module averages them, else "optimizer". The optimizer looks
            for DDP at construction and again before the first update.
        reduce_dtype: torch.float32 to average 16-bit gradients in fp32, for accuracy over many
            ranks at twice the traffic. None to average in the gradients' dtype.
        accumulate: how the gradients of several backwards of one step are summed in streaming mode.
            Otherwise they accumulate in `.grad`. "auto": the first step with a further backward
            allocates fp32 memory for the sums, and logs its bytes. Each backward's gradients are
            reduced, copied and added there: no gradients stay in `.grad`, but each backward costs a
            reduction and a copy. With `no_sync()` around all backwards but the last, the sum in
            `.grad` is reduced once, and no memory is allocated. "host": the same sums, in gradient
            shards of 4 bytes per element that are allocated at construction. "error": a further
            backward raises a ValueError. None means "auto".
        overlap: return from `step()` before the updates finish. The forward of each unit of
            `module` (see `OffloadPolicy.units`) then waits for the unit's own parameters. Call
            `synchronize()` before reading parameters in any other way. None means True if `module`
            is given and all parameters are on a GPU, or FSDP2 copies them there.
        defer: allocate the state in the first `step()` (or when state is loaded), not here. For a
            model that is sharded later, or is on the meta device still. Until then `.grad` holds
            the gradients. True by itself if an `Accelerator` is to shard the model with FSDP2.
        state_format: "fp32", or "bf16", "mixed" or "int8", each with less memory than the one
            before. These three round moments stochastically: "bf16" to bfloat16, "mixed" exp_avg to
            bfloat16 and exp_avg_sq to 8 bits, "int8" both to 8 bits. A bf16 parameter is a part of
            its master weight: "bf16" stores 16 more bits, exactly fp32. "mixed" and "int8" store 8
            more bits, rounded stochastically: prefer "bf16" at learning rates below 1e-5. The
            state of tensors with fewer than two dimensions stays in fp32. A group's own
            "state_format" applies to all of its parameters. All but "fp32" need amsgrad=False and
            state in host memory.
        num_threads: CPU threads of this rank's update. None for the allowed cores divided by the
            ranks of this node, minus one if parameters are on a GPU: the thread that launches
            kernels needs it.
        offload: pinned memory, bucket size, the share of state that stays on the GPU, and more. See
            `OffloadPolicy`.
        failures: seconds after which a rank counts as dead or hung. See `FailurePolicy`.

    Attributes:
        last_step: `StepReport` of the last step: norm, clip factor, whether the step was skipped,
            and timings. None before the first step.
        skipped_steps: number of steps that were skipped since construction.
        grad_scale: loss scale by which gradients are divided; 1 if not set. A GradScaler sets it
            for each step. Set it if you scale the loss yourself.
        resumed_step: with `OffloadPolicy(keep=...)`, the `ResumedStep` that the constructor
            has completed for an earlier process: the loop continues with the next step. None if
            there was none.
        kept_extra: with the same option, a dict of what the loop needs to continue after a step,
            such as its random state. Set it before `step()`; `resumed_step.extra` is this dict. It
            may have about 3 MiB.

    Cost: for bf16 parameters on a GPU, 14 bytes of host memory per parameter, divided by the number
        of ranks: 4 each for master weight, exp_avg and exp_avg_sq, and 2 for the gradient. With
        `state_format="bf16"` 10 bytes: 2 each for the parameter, the rest of its master weight,
        exp_avg, exp_avg_sq and the gradient. "mixed" takes 8 bytes: 1 each for the rest of the
        master weight and exp_avg_sq. "int8" takes 7 bytes: 1 for exp_avg too. Both also take 2
        bytes for each block of 128 elements. Buffers add a few buckets. `offload-adam plan`
        predicts the memory of a run.
    Owns: process groups, hooks on the parameters, and host memory. `close` releases all three.
    Threads: calls from several threads run one after another. `synchronize` and the state dicts may
        be called while another thread runs a forward or backward. With several ranks, they are
        collective, so call them from the thread that trains, in the same order on every rank.

    Raises:
        TypeError, ValueError: an argument or a parameter cannot be used. Nothing was allocated.
        RuntimeError: WORLD_SIZE > 1 and no process group is initialised.
        HostMemoryError: the state does not fit into this node's memory.
        PeerFailedError: ranks did not construct the optimizer in time. Every later collective also
            raises it if a rank dies or hangs.

    Source: Kingma and Ba, "Adam" (2015); Loshchilov and Hutter, "Decoupled Weight Decay
    Regularization" (2019); Reddi et al., "On the Convergence of Adam and Beyond" (2018);
    Rajbhandari et al., "ZeRO" (2020); Ren et al., "ZeRO-Offload" (2021).
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
        foreach: bool | None = None,
        capturable: bool | None = False,
        differentiable: bool | None = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        max_grad_norm: float | None = None,
        module: torch.nn.Module | None = None,
        process_group: dist.ProcessGroup | None = None,
        gradient_reduction: str | None = None,
        reduce_dtype: torch.dtype | None = None,
        accumulate: str | None = "auto",
        overlap: bool | None = None,
        defer: bool = False,
        state_format: StateFormat = "fp32",
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
            defer=defer,
            state_format=state_format,
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
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
        }

        self._construct(options, lambda: self._add_groups(params, defaults))
        chosen = [
            name for name in ("foreach", "fused") if any(group[name] for group in self.param_groups)
        ]
        if chosen and self.ranks.rank == 0:
            given = " and ".join(f"{name}=True" for name in chosen)
            logger.info("Ignoring %s: updates run in kernels of this package", given)

    def _check_group(self, group: dict[str, Any]) -> None:
        check_group(group)

    def _hyperparameters(self) -> list[Hyperparameters]:
        return [hyperparameters_of(group) for group in self.param_groups]


class OffloadAdamW(OffloadAdam):
    """AdamW with fp32 state in host memory: `OffloadAdam` with decoupled weight decay.

    Args:
        weight_decay: each update also subtracts `lr * weight_decay * w` from the weight w. 1e-2 by
            default, as in `torch.optim.AdamW`.

    For all other arguments, the modes and the cost, see `OffloadAdam`.

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
        foreach: bool | None = None,
        capturable: bool | None = False,
        differentiable: bool | None = False,
        fused: bool | None = None,
        max_grad_norm: float | None = None,
        module: torch.nn.Module | None = None,
        process_group: dist.ProcessGroup | None = None,
        gradient_reduction: str | None = None,
        reduce_dtype: torch.dtype | None = None,
        accumulate: str | None = "auto",
        overlap: bool | None = None,
        defer: bool = False,
        state_format: StateFormat = "fp32",
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
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
            max_grad_norm=max_grad_norm,
            module=module,
            process_group=process_group,
            gradient_reduction=gradient_reduction,
            reduce_dtype=reduce_dtype,
            accumulate=accumulate,
            overlap=overlap,
            defer=defer,
            state_format=state_format,
            num_threads=num_threads,
            offload=offload,
            failures=failures,
        )
