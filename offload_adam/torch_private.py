"""Every private or undocumented name of torch that this package uses.

When a torch release breaks something, look here first. Each name is bound once, at import, so that
hooks need no attribute look-up. If torch lacks one of them, `check` raises an error when an
optimizer is constructed. All were tested with torch 2.13; comments name other versions where they
matter.

Some private names cannot be called through this file, because torch itself looks for them:

    where                              name                         if torch ignores the name
    sharded_optimizer/optimizer.py     `_step_supports_amp_scaling` GradScaler unscales gradients
    state/state_shard.py               `__create_write_items__`     torch.distributed.checkpoint
                                       `__create_chunk_list__`      rejects the tensor
                                       `__get_tensor_shard__`
    sharded_optimizer/optimizer.py     `_opt_called`                a warning after a resume
    step/forward_waits.py              `_version`, in a list of     no effect
                                       attributes to ignore

tests/unit/test_torch_private.py checks these, how each name behaves, and that no other file of the
package uses a private name.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from operator import attrgetter
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.hooks import RemovableHandle

_missing: list[str] = []


def check() -> None:
    """Check that torch has every name that this file binds.

    Raises:
        RuntimeError: listing the missing names and torch's version.
    """
    if _missing:
        raise RuntimeError(
            f"torch {torch.__version__} lacks {', '.join(_missing)}, which offload_adam needs. "
            "Install torch 2.13, with which this version was tested."
        )


def _find(module: str, path: str) -> Any:
    """Return an object of torch. If torch lacks it, note this for `check` and return a stub."""
    try:
        return attrgetter(path)(importlib.import_module(module))
    except (ImportError, AttributeError):
        _missing.append(f"{module}.{path}")
        return _raise_missing


def _raise_missing(*_: Any, **__: Any) -> Any:
    check()


# --- Autograd. Without these, constructing an optimizer raises an error. torch has no public way to
# find out inside a hook which backward is running, or to run code at the end of a backward.

NO_GRAPH_TASK = -1
"""What `current_graph_task` returns outside of a backward."""

current_graph_task: Callable[[], int] = _find("torch", "_C._current_graph_task_id")
"""Return the number of the backward that this thread runs. A nested backward has another number.

Used to detect in a gradient hook that a new backward began.
"""

queue_backward_callback: Callable[[Callable[[], None]], None] = _find(
    "torch.autograd", "Variable._execution_engine.queue_callback"
)
"""Call a function at the end of the running backward. Raises an error outside of a backward.

Used to detect the end of a backward.
"""

current_autograd_node: Callable[[], torch.autograd.graph.Node | None] = _find(
    "torch", "_C._current_autograd_node"
)
"""Return the autograd node that this thread runs, None outside of a backward and at its end."""


def accumulating_parameter() -> torch.Tensor | None:
    """Return the parameter to whose `.grad` autograd is adding right now, None if to none."""
    node: Any = current_autograd_node()
    # If torch renames this node, a second backward that adds to a streamed gradient's stand-in
    # raises StreamedGradientError.
    if node is None or node.name() != "torch::autograd::AccumulateGrad":
        return None
    parameter: torch.Tensor = node.variable
    return parameter


def add_gradient_hook(
    parameter: torch.Tensor, hook: Callable[[torch.Tensor], None]
) -> RemovableHandle:
    """Call a hook after autograd has written `.grad`, also after `torch.utils.swap_tensors`.

    `module.to()` swaps parameters after `set_swap_module_params_on_conversion(True)`. The parameter
    then keeps torch's dict of hooks, but autograd runs none of them, nor those that are added.
    """
    handle: RemovableHandle = parameter.register_post_accumulate_grad_hook(hook)
    # The assignment lets autograd run the hooks of this dict again.
    parameter._post_accumulate_grad_hooks = parameter._post_accumulate_grad_hooks
    return handle


# --- Tensors. Without these, constructing an optimizer raises an error.

# An attrgetter costs no more than the attribute itself.
version_of: Callable[[torch.Tensor], int] = attrgetter("_version")
"""Return how often a tensor was modified in place. Used to detect edits by users. Not public."""

base_of: Callable[[torch.Tensor], torch.Tensor | None] = attrgetter("_base")
"""Return the tensor of which this one is a view, None if it is not a view. Not public."""

# For sparse gradients. The public `indices()` and `values()` raise an error on a tensor that is not
# coalesced.
coo_indices: Callable[[torch.Tensor], torch.Tensor] = _find("torch", "Tensor._indices")
coo_values: Callable[[torch.Tensor], torch.Tensor] = _find("torch", "Tensor._values")

# For a tensor subclass that replaces itself in the arguments of an operation.
tree_leaves: Callable[[Any], list[Any]] = _find("torch.utils._pytree", "tree_leaves")
tree_map_only: Callable[[type, Callable[[Any], Any], Any], Any] = _find(
    "torch.utils._pytree", "tree_map_only"
)
schema_of: Callable[[Any], Any] = attrgetter("_schema")
"""Return the schema of an operation: which arguments it writes to, and which it returns views of.
Not public."""

make_wrapper_subclass: Callable[..., Any] = _find("torch", "Tensor._make_wrapper_subclass")
"""Return a tensor of a subclass that has a shape and no memory.

Used for `.grad` while gradients are streamed, and for shards in checkpoints. A public meta tensor
has the wrong device.
"""

no_torch_function: Any = _find("torch", "_C._disabled_torch_function_impl")
"""The `__torch_function__` of a subclass whose operations return plain tensors."""

# A saved file names these functions, and torch.load(weights_only=True) accepts only such names.
rebuild_tensor: Callable[..., torch.Tensor] = _find("torch._utils", "_rebuild_tensor_v2")
rebuild_untyped_tensor: Callable[..., torch.Tensor] = _find("torch._utils", "_rebuild_tensor_v3")
"""Return a tensor of a dtype for which torch has no typed storage."""

StorageWeakRef: Any = _find("torch.multiprocessing.reductions", "StorageWeakRef")
"""A reference to a storage that does not keep it alive. torch's storages accept no `weakref.ref`.

Used to find out whether something else still refers to a parameter's data that were replaced.
"""

_storage_from_weak: Callable[[int], torch.UntypedStorage | None] = _find(
    "torch", "UntypedStorage._new_with_weak_ptr"
)


def live_storage(reference: Any) -> torch.UntypedStorage | None:
    """Return the storage of a `StorageWeakRef`, None if it no longer exists."""
    return _storage_from_weak(reference.cdata)


is_lazy: Callable[[object], bool] = _find("torch.nn.parameter", "is_lazy")
"""Return whether a parameter or buffer has no shape yet, before the first forward."""

# --- Operators. Without these, constructing an optimizer raises an error.

foreach_copy: Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor]], None] = _find(
    "torch", "_foreach_copy_"
)
"""Copy the second tensors into the first ones. On a GPU it takes a few kernels for all of them;
the public `Tensor.copy_` takes one kernel for each.
"""

foreach_add: Callable[..., None] = _find("torch", "_foreach_add_")
"""Add the second tensors times `alpha` to the first ones, in a few kernels for all of them."""

foreach_norm: Callable[..., tuple[torch.Tensor, ...]] = _find("torch", "_foreach_norm")
"""Return the norms of tensors as 0-d tensors, from (tensors, order, dtype).

On a GPU its kernel reads each element once and adds in `dtype`. The public
`torch.linalg.vector_norm(..., dtype=...)` first writes a copy of the tensor in that dtype.
"""

fused_adamw: Callable[..., None] = _find("torch", "_fused_adamw_")
"""Take a step of AdamW; see `torch.optim.AdamW(fused=True)`. Tensors of all lists have one dtype.

Without `grad_scale` and `found_inf`, gradients are only read. The steps are float32 on the device.
The kernel for GPUs rounds all scalars to float32 first, in the newest versions of torch.
"""

# A `__torch_dispatch__` sees these operators, which casts and gradient clipping call. The stand-ins
# for streamed gradients handle them.
ATEN_TO_COPY: Any = _find("torch", "ops.aten._to_copy.default")
ATEN_FOREACH_NORM: Any = _find("torch", "ops.aten._foreach_norm.Scalar")
ATEN_FOREACH_MUL: tuple[Any, ...] = (
    _find("torch", "ops.aten._foreach_mul_.Scalar"),
    _find("torch", "ops.aten._foreach_mul_.Tensor"),
)
ATEN_FOREACH_DIV: tuple[Any, ...] = (
    _find("torch", "ops.aten._foreach_div_.Scalar"),
    _find("torch", "ops.aten._foreach_div_.Tensor"),
)


# --- Modules and optimizers. Without these, constructing an optimizer raises an error; without
# `_orig_mod` alone, a module that torch.compile() returned counts as not compiled.

norm_base: type[nn.Module] = _find("torch.nn.modules.batchnorm", "_NormBase")
"""The base class of all batch and instance norms."""

registered_parameters: Callable[[nn.Module], dict[str, nn.Parameter | None]] = attrgetter(
    "_parameters"
)
"""Return the dict in which a module registers its own parameters, without those of submodules.

Used in every step to detect a replaced parameter; `named_parameters` would walk all submodules.
"""


def compiled_call(module: nn.Module) -> Callable[..., Any] | None:
    """Return the function that runs a module after `module.compile()`, None if not compiled."""
    return module._compiled_call_impl


def set_compiled_call(module: nn.Module, call: Callable[..., Any] | None) -> None:
    """Replace the function that runs a compiled module."""
    module._compiled_call_impl = call


def is_compiled(module: nn.Module) -> bool:
    """Return whether calling a module runs compiled code, by `torch.compile` or `.compile()`."""
    return hasattr(module, "_orig_mod") or compiled_call(module) is not None


_global_step_post_hooks: dict[int, Any] = _find(
    "torch.optim.optimizer", "_global_optimizer_post_hooks"
)


def has_step_post_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether post-step hooks are registered, on this optimizer or globally."""
    return bool(optimizer._optimizer_step_post_hooks or _global_step_post_hooks)


def state_dict_pre_hooks(optimizer: torch.optim.Optimizer) -> Iterable[Callable[..., Any]]:
    """Return the hooks of `register_state_dict_pre_hook`, in order."""
    return optimizer._optimizer_state_dict_pre_hooks.values()


def state_dict_post_hooks(optimizer: torch.optim.Optimizer) -> Iterable[Callable[..., Any]]:
    """Return the hooks of `register_state_dict_post_hook`, in order."""
    return optimizer._optimizer_state_dict_post_hooks.values()


def load_state_dict_pre_hooks(optimizer: torch.optim.Optimizer) -> Iterable[Callable[..., Any]]:
    """Return the hooks of `register_load_state_dict_pre_hook`, in order."""
    return optimizer._optimizer_load_state_dict_pre_hooks.values()


def load_state_dict_post_hooks(optimizer: torch.optim.Optimizer) -> Iterable[Callable[..., Any]]:
    """Return the hooks of `register_load_state_dict_post_hook`, in order."""
    return optimizer._optimizer_load_state_dict_post_hooks.values()


def found_inf_flags(
    scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer
) -> Iterable[torch.Tensor]:
    """Return the flags, one per device, from which the scaler's `update()` computes the scale."""
    return scaler._found_inf_per_device(optimizer).values()


def _note_missing_attributes() -> None:
    """Note for `check` the attributes that the functions above read from objects."""
    _find("torch", "Tensor._version")
    _find("torch", "Tensor._base")
    _find("torch", "Tensor._post_accumulate_grad_hooks")
    _find("torch.nn", "Module._compiled_call_impl")
    _find("torch.amp", "GradScaler._found_inf_per_device")
    # Constructors set these attributes, so the class has only their annotations.
    for owner, name in (
        (nn.Module, "_parameters"),
        (torch.optim.Optimizer, "_optimizer_step_post_hooks"),
        (torch.optim.Optimizer, "_optimizer_state_dict_pre_hooks"),
        (torch.optim.Optimizer, "_optimizer_state_dict_post_hooks"),
        (torch.optim.Optimizer, "_optimizer_load_state_dict_pre_hooks"),
        (torch.optim.Optimizer, "_optimizer_load_state_dict_post_hooks"),
    ):
        if name not in inspect.get_annotations(owner):
            _missing.append(f"{owner.__name__}.{name}")


_note_missing_attributes()

PARTITIONER_MARKS: Mapping[str, str] = {
    "_fsdp_flattened": "FSDP1 (FullyShardedDataParallel)",  # also with use_orig_params=True
    "_is_flat_param": "FSDP1 (FullyShardedDataParallel)",
    "ds_id": "DeepSpeed ZeRO-3",
}
"""Attributes of plain tensors that hold one rank's part of a parameter, with their libraries.

Used to reject such parameters. If a library renames its attribute, its parameters are accepted, and
rank 0's part overwrites the parts of all other ranks.
"""


def cuda_runtime_functions() -> Any:
    """Return the functions of CUDA's runtime that torch binds; torch does not document which.

    Used: cudaHostRegister, cudaHostUnregister, cudaError, cudaGetErrorString. If one is missing,
    pinning raises an AttributeError.
    """
    return torch.cuda.cudart()


# --- Profiling. Without it, constructing an optimizer raises an error.

_find("torch.autograd.profiler", "_is_profiler_enabled")


def profiler_is_on() -> bool:
    """Return whether a torch profiler or `emit_nvtx` runs in this process, on any thread."""
    # `torch.autograd._profiler_enabled` is always False under `profile_all_threads`.
    return torch.autograd.profiler._is_profiler_enabled


# --- Process groups and stores. Without these, constructing an optimizer raises an error.

# torch 2.13 renamed `*_tensor` to `*_single`; tested with 2.11 to 2.13.
reduce_scatter: Callable[..., Any] = (
    getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
)
all_gather: Callable[..., Any] = (
    getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
)

_C10D = "torch.distributed.distributed_c10d"

default_store: Callable[[], dist.Store] = _find(_C10D, "_get_default_store")
"""Return the store of the default group; raise an error if there is no such group.

The public `init_process_group(init_method=...)` creates the store and does not return it.
"""

_new_process_group: Callable[..., Any] = _find(_C10D, "_new_process_group_helper")
_group_ranks: Any = _find(_C10D, "_world.pg_group_ranks")
_find("torch.distributed", "ProcessGroup._get_backend")
_find("torch.distributed", "ProcessGroup.bound_device_id")


def connect_to_default_store(timeout: timedelta) -> dist.Store:
    """Return a new connection to the default group's store.

    Args:
        timeout: of each call on the connection.

    Raises:
        AttributeError, NotImplementedError, RuntimeError: this kind of store has no `clone`.
    """
    # While one thread waits in a store's client, other threads cannot use the client. So each
    # thread needs its own.
    store: Any = default_store()
    connection: dist.Store = store.clone()
    connection.set_timeout(timeout)
    return connection


def store_without_prefixes(store: dist.Store) -> dist.Store:
    """Return the store that a chain of `PrefixStore`s wraps, or `store` itself if it is none."""
    # If torch lacks this attribute, keys keep the prefix of one attempt. A restarted run then does
    # not find the record of a final error, and runs again.
    found: dist.Store = getattr(store, "_underlying_non_prefix_store", store)
    return found


def open_group(
    name: str, ranks: Sequence[int], rank: int, backend: str, timeout: timedelta
) -> dist.ProcessGroup:
    """Open a process group. Collective for `ranks` only, unlike the public `dist.new_group`.

    Args:
        name: never used before.
        ranks: global ranks of its members, in the group's order.
        rank: this process's rank in the group.
        backend: "gloo", or "nccl", whose kernels get a high-priority stream.
        timeout: of every collective.
    """
    options = _nccl_options(timeout) if backend == "nccl" else None
    with _unbound_default_group():
        group, _ = _new_process_group(
            len(ranks),
            rank,
            ranks,
            dist.Backend(backend),
            default_store(),
            name,
            backend_options=options,
            timeout=timeout,
        )
    assert isinstance(group, dist.ProcessGroup)
    # `dist.broadcast` and others look up here which rank of the group a global rank is.
    _group_ranks[group] = {member: place for place, member in enumerate(ranks)}
    return group


def _nccl_options(timeout: timedelta) -> Any:
    """Return options for collectives that overlap with the kernels of a forward or backward.

    As in FSDP2, a high-priority stream starts them before kernels that are queued already.
    """
    # Looked up late: a torch without NCCL has no such class.
    options: Any = dist.distributed_c10d.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options._timeout = timeout  # torch warns if this differs from the argument
    return options


@contextmanager
def _unbound_default_group() -> Iterator[None]:
    """Create NCCL groups in the body without splitting the default group's communicator."""
    # With `init_process_group(device_id=...)`, torch splits a new group's communicator from that of
    # the default group. A split is a collective over all ranks, so it hangs unless every rank opens
    # a group. Without a bound device, only the members create the communicator.
    default: Any = dist.group.WORLD
    device = default.bound_device_id
    default.bound_device_id = None
    try:
        yield
    finally:
        default.bound_device_id = device


def timeout_of(group: dist.ProcessGroup) -> timedelta:
    """Return the timeout that the user set for a group, 30 minutes if the group has no backend.

    torch has a public way to set it, and none to read it. If `_timeout` is missing, constructing an
    optimizer with several ranks raises an AttributeError.
    """
    for device_type in ("cpu", "cuda"):
        try:
            options = group._get_backend(torch.device(device_type)).options
        except RuntimeError:
            continue
        return timedelta(seconds=options._timeout.total_seconds())
    return timedelta(minutes=30)  # torch's default


def abort_collectives(group: dist.ProcessGroup, device_type: str) -> None:
    """Abort a group's collectives on a device. If torch lacks `abort`, they time out."""
    with suppress(AttributeError, RuntimeError):
        backend: Any = group._get_backend(torch.device(device_type))
        backend.abort()
