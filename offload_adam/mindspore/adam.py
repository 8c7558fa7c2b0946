"""`Adam`, which follows the specification of `mindspore.nn.Adam` for PyTorch parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from offload_adam.coordinator.rank_checks import Field, raise_on_all_ranks
from offload_adam.errors import warn_user
from offload_adam.kernels.scalars import Hyperparameters
from offload_adam.mindspore.arguments import (
    check_amsgrad,
    check_beta,
    check_eps,
    check_flag,
    check_kwargs,
    check_loss_scale,
)
from offload_adam.mindspore.decay_filter import is_decayed, norm_parameters, warn_if_all_decay
from offload_adam.mindspore.dynamic import (
    Dynamic,
    load_dynamic,
    read_learning_rate,
    read_weight_decay,
)
from offload_adam.mindspore.given_gradients import check_given, in_place_of_grad
from offload_adam.mindspore.groups import (
    AdamGroup,
    GroupDefaults,
    Groups,
    read_group,
    read_groups,
    reject_repeated,
    reject_unequal_lengths,
)
from offload_adam.mindspore.inspection import InspectableAdam
from offload_adam.options import ExecutionOptions, FailurePolicy, OffloadPolicy, StateFormat
from offload_adam.params.groups import check_group, hyperparameters_of
from offload_adam.params.selection import Selection
from offload_adam.printable import show
from offload_adam.sharded_optimizer.state_access import serialized
from offload_adam.step.messages import StepInputs, StepReport

_DYNAMIC_KEYS = ("lr", "weight_decay")


class Adam(InspectableAdam):
    """Adam with the arguments, groups, modes and order of operations of `mindspore.nn.Adam`.

    Update number t of the optimizer (1, 2, ...) computes in fp32, whatever the parameters' dtype:

        g  = gradient / loss_scale + weight_decay * w
        m  = beta1 * m + (1 - beta1) * g
        v  = beta2 * v + (1 - beta2) * g^2
        w -= lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    Pass gradients as a tuple, `opt(gradients)`, or leave them in `.grad` and call `opt.step()`.
    With more than one rank, construction and both calls are collective. A skipped step does not
    advance the step counter or the schedules. The attributes `last_step`, `skipped_steps` and
    `grad_scale` are those of `OffloadAdam`.

    A state dict holds the global step, this package's schedules and learning rates given as one
    value per step. Of your own callables it holds only the result of their `state_dict()`, if they
    have one: construct the optimizer with the same callables before loading.

    Args:
        params: parameters, (name, parameter) pairs, or group dicts with the keys `params`, `lr`,
            `weight_decay` and `grad_centralization`. One more dict with the key `order_params` may
            give the order of all parameters. `grad_centralization` (default False) subtracts from
            each gradient of 2 or more dimensions the mean over all dimensions but the first; it has
            no effect with `use_offload`.
        learning_rate: a number or a 0-d tensor; a 1-d tensor or an iterable with one value per
            step, read at construction; or a callable of the 0-based step, such as those of
            `offload_adam.schedules`. A step after the last value raises ValueError.
        beta1: decay rate of m, a float in the open interval (0.0, 1.0).
        beta2: decay rate of v, a float in the open interval (0.0, 1.0).
        eps: a float above 0, added to the denominator.
        use_locking: has no effect, since calls from several threads always run one after another.
        use_nesterov: replace m in the last line by `beta1 * m + (1 - beta1) * g`. Not supported
            with `use_amsgrad`.
        weight_decay: L2 penalty, a number or a callable of the 0-based step. If `params` are not in
            groups, it does not apply to parameters with beta or gamma in their names and, with
            `module`, to those of torch's norm layers.
        loss_scale: gradients are divided by it. Multiply the loss by the same number.
        use_amsgrad: replace v in the last line by the largest v so far. Not supported with more
            than one rank, `use_lazy` or `use_offload`.
        epsilon_hat: replace the last line by
            `w -= lr * sqrt(1 - beta2^t) / (1 - beta1^t) * m / (sqrt(v) + eps)`, the arithmetic that
            MindSpore was observed to use. `use_nesterov` is then ignored with `use_amsgrad`.
        decay_norms: apply weight decay to the norm layers of `module` too.
        module: the model. It gives the parameters their names. With `use_offload`, gradients are
            also moved to the host during backward, as in the streaming mode of `OffloadAdam`.
        max_grad_norm: clip the 2-norm of each step's gradients, over all parameters and averaged
            over the ranks, to this value. None for no clipping.
        process_group: ranks that share the state. None for the default group.
        gradient_reduction: "optimizer" or "external", as for `OffloadAdam`: who averages gradients.
        reduce_dtype: torch.float32 to average 16-bit gradients in fp32.
        state_format: "fp32", "bf16", "mixed" or "int8", as for `OffloadAdam`.
        accumulate: "auto", "host" or "error", as for `OffloadAdam`: how gradients of several
            backwards of one step are summed while they leave `.grad`.
        overlap: return from `step()` before the updates finish, as for `OffloadAdam`.
        defer: allocate the state in the first `step()`.
        num_threads: CPU threads of this rank's update, as for `OffloadAdam`.
        offload: pinned memory, bucket size and more. See `OffloadPolicy`.
        failures: seconds after which a rank counts as dead or hung. See `FailurePolicy`.
        **kwargs: `use_lazy` (default False): a sparse gradient updates only the rows that it
            touches. `use_offload` (default False): store the state sharded in host memory, instead
            of whole on every rank and on the parameter's device. It needs less GPU memory, but
            each step copies gradients and parameters. Both cannot be set together. Without
            `use_offload`, `accumulate`, `overlap` and `OffloadPolicy.units` must have their
            defaults.

    Raises:
        KeyError, TypeError, ValueError, RuntimeError: an argument is wrong; the message names it.
            Nothing was allocated.

    Source: the documentation of `mindspore.nn.Adam` (MindSpore 2.10); Kingma and Ba, "Adam"
    (2015); Dozat, "Incorporating Nesterov Momentum into Adam" (2016); Reddi et al., "On the
    Convergence of Adam" (2018).
    """

    def __init__(
        self,
        params: Any,
        learning_rate: Any = 1e-3,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
        use_locking: bool = False,
        use_nesterov: bool = False,
        weight_decay: Any = 0.0,
        loss_scale: float = 1.0,
        use_amsgrad: bool = False,
        *,
        epsilon_hat: bool = False,
        decay_norms: bool = False,
        module: torch.nn.Module | None = None,
        max_grad_norm: float | None = None,
        process_group: dist.ProcessGroup | None = None,
        gradient_reduction: str | None = None,
        reduce_dtype: torch.dtype | None = None,
        state_format: StateFormat = "fp32",
        accumulate: str | None = "auto",
        overlap: bool | None = None,
        defer: bool = False,
        num_threads: int | None = None,
        offload: OffloadPolicy = OffloadPolicy(),
        failures: FailurePolicy = FailurePolicy(),
        **kwargs: Any,
    ) -> None:
        self._global_step = 0
        options = ExecutionOptions(
            module=module,
            process_group=process_group,
            gradient_reduction=gradient_reduction,
            reduce_dtype=reduce_dtype,
            state_format=state_format,
            max_grad_norm=max_grad_norm,
            accumulate=accumulate,
            overlap=overlap,
            defer=defer,
            num_threads=num_threads,
            offload=offload,
            failures=failures,
        )

        def add_groups() -> None:
            for name, value in (
                ("use_locking", use_locking),
                ("use_nesterov", use_nesterov),
                ("use_amsgrad", use_amsgrad),
                ("epsilon_hat", epsilon_hat),
                ("decay_norms", decay_norms),
            ):
                check_flag(name, value)
            self.use_lazy, self.use_offload = check_kwargs(kwargs)
            check_amsgrad(amsgrad=use_amsgrad, lazy=self.use_lazy, offload=self.use_offload)
            betas = check_beta("beta1", beta1), check_beta("beta2", beta2)
            self.loss_scale = check_loss_scale(loss_scale)
            self._group_defaults = GroupDefaults(
                read_learning_rate("learning_rate", learning_rate),
                read_weight_decay("weight_decay", weight_decay),
            )
            defaults = {
                "lr": _first(self._group_defaults.lr),
                "betas": betas,
                "eps": check_eps(eps),
                "weight_decay": _first(self._group_defaults.weight_decay),
                "amsgrad": use_amsgrad,
                "nesterov": use_nesterov
                and not _ignores_nesterov(use_nesterov, use_amsgrad, epsilon_hat),
                "maximize": False,
                "decoupled_weight_decay": False,
                "epsilon_hat": epsilon_hat,
                "grad_centralization": False,
            }
            self._read_groups(params, defaults, module, decay_norms)

        self._construct(
            options,
            add_groups,
            replicated=kwargs.get("use_offload") is not True,  # its type is checked in `add_groups`
            accepts_sparse=True,  # sparse gradients
        )

    def _read_groups(
        self,
        params: object,
        defaults: dict[str, Any],
        module: torch.nn.Module | None,
        decay_norms: bool,
    ) -> None:
        """Read the groups and let torch add them."""
        groups = read_groups(params, self._group_defaults)
        reject_unequal_lengths(groups.members)
        self._norms = set() if decay_norms else norm_parameters(module)
        self._order = groups.order
        self._grouped = groups.grouped
        self._add_groups(groups.members, defaults)
        if self.use_offload and any(group["grad_centralization"] for group in self.param_groups):
            warn_user(
                "grad_centralization has no effect with use_offload=True. Leave one of them out."
            )
        self._warn_of_decay(groups, module)

    def _own_fields(self) -> list[Field]:
        return [("loss_scale", str(self.loss_scale)), ("use_lazy", str(self.use_lazy))]

    def _warn_of_decay(self, groups: Groups, module: torch.nn.Module | None) -> None:
        group = groups.members[0]
        decays = group["weight_decay"] > 0 or "weight_decay" in group.dynamic
        if not groups.grouped and module is None and decays:
            # `_select` gives even numbers to the parameters with weight decay.
            warn_if_all_decay(item.group % 2 == 0 for item in self._select(0).new)

    @serialized
    def __call__(self, gradients: Sequence[torch.Tensor | None]) -> torch.Tensor:
        """Take one step with these gradients instead of those in `.grad`. Collective.

        Args:
            gradients: one for each of `parameters`, in that order, or None. Each has its
                parameter's shape, dtype and device, and is dense or sparse COO. They are read only
                during the call.

        Returns:
            A bool tensor with the value True, even if the step was skipped (`last_step.skipped`).

        Raises:
            TypeError, ValueError: a gradient is wrong; the message names the parameter. No rank
                modified anything.
            PeerError: another rank rejected its gradients.
        """
        core = self._adapt()
        names = {id(parameter): name for name, parameter in core.named_parameters()}
        parameters = self.parameters
        named = [names.get(id(p), "(frozen)") for p in parameters]
        with raise_on_all_ranks(self._ranks, "reading the given gradients"):
            checked = check_given(gradients, named, parameters)
        # A backward may have moved gradients out of .grad. The given ones replace them, so drop
        # what the reduction and the hooks hold of that backward.
        core.reduction.reset()
        if self._hooks is not None:
            self._hooks.forget()
        with in_place_of_grad(parameters, checked):
            self.step()
        return torch.tensor(True, dtype=torch.bool, device="cpu")

    def _append_group(self, param_group: dict[str, Any]) -> None:
        if not isinstance(param_group, AdamGroup):
            param_group = read_group(param_group, self._group_defaults, "the new group")
            reject_repeated([param_group], self.param_groups)
            reject_unequal_lengths([*self._groups(), param_group])
        super()._append_group(param_group)

    def _check_group(self, group: dict[str, Any]) -> None:
        check_group(group)
        check_eps(group["eps"])
        for name, beta in zip(("beta1", "beta2"), group["betas"], strict=True):
            check_beta(name, beta)
        for name in ("maximize", "decoupled_weight_decay"):
            if group[name]:
                raise ValueError(f"{name}=True is not supported by Adam. Use OffloadAdam instead.")

    def _select(self, first_group: int) -> Selection:
        """Set each parameter's `group` to 2 * group with weight decay, 2 * group + 1 without.

        `_hyperparameters` returns two entries for each group in this order.
        """
        selection = super()._select(first_group)
        new = []
        for item in selection.new:
            group = self._groups()[item.group]
            decays = not group.filtered or is_decayed(item.name, item.parameter, self._norms)
            centralized = item.centralized and not self.use_offload
            new.append(replace(item, group=2 * item.group + (not decays), centralized=centralized))
        return Selection(new, selection.frozen)

    def _hyperparameters(self) -> list[Hyperparameters]:
        every = []
        for group in self._groups():
            decayed = hyperparameters_of({**group, **group.values_at(self._global_step)})
            every += [decayed, replace(decayed, weight_decay=0.0)]
        return every

    def _step_inputs(self) -> StepInputs:
        return StepInputs(
            hyperparameters=self._hyperparameters(),
            grad_scale=self.loss_scale,
            step=self._global_step + 1,  # t of the formulas, for every parameter
            lazy=self.use_lazy,
            num_per_group=2,  # with and without weight decay
        )

    def _stepped(self, report: StepReport) -> None:
        if report.skipped:
            return
        for group in self._groups():
            if group.dynamic:
                group.show(group.shown_at(self._global_step))  # what this step has used
        self._global_step += 1

    def _further_state(self) -> dict[str, Any]:
        return {
            "global_step": self._global_step,
            "dynamic": [
                {key: value.to_state() for key, value in group.dynamic.items()}
                for group in self._groups()
            ],
        }

    def _plan_further_state(
        self, further: Mapping[str, Any], entries: Mapping[int, Mapping[str, Any]]
    ) -> Callable[[], None]:
        if "global_step" not in further:
            # Saved by torch or OffloadAdam, which count the updates of each parameter. A parameter
            # without a gradient in some steps has a smaller count.
            steps = [int(entry["step"]) for entry in entries.values() if "step" in entry]
            return lambda: setattr(self, "_global_step", max(steps, default=0))
        loaded = [
            {
                key: load_dynamic(key, saved.get(key), group.dynamic.get(key))
                for key in _DYNAMIC_KEYS
            }
            for group, saved in zip(self._groups(), further["dynamic"], strict=True)
        ]

        global_step = further["global_step"]
        # It comes from a file, so it may be of any type.
        if not isinstance(global_step, int) or global_step < 0:
            raise ValueError(
                f"The saved global_step is {show(global_step)}, not a number of steps."
            )

        def load() -> None:
            self._global_step = global_step
            for group, functions in zip(self._groups(), loaded, strict=True):
                group.dynamic = {k: f for k, (f, _) in functions.items() if f is not None}
                for _, load_function in functions.values():
                    load_function()

        return load


def _first(value: float | Dynamic) -> float:
    """Return the value that a group shows before the first step."""
    return value.at(0) if isinstance(value, Dynamic) else value


def _ignores_nesterov(use_nesterov: bool, use_amsgrad: bool, epsilon_hat: bool) -> bool:
    """Return whether nesterov is ignored because amsgrad is set, and warn if it is.

    Raises:
        ValueError: both are set without `epsilon_hat`: the specification does not define the pair.
    """
    if not (use_nesterov and use_amsgrad):
        return False
    if not epsilon_hat:
        raise ValueError(
            "use_nesterov=True and use_amsgrad=True exclude each other. Pass one of them, or "
            "epsilon_hat=True to ignore use_nesterov as MindSpore does."
        )
    warn_user("use_nesterov has no effect together with use_amsgrad. Leave it out.")
    return True
